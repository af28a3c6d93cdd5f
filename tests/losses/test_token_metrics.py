"""Token metrics against counts made by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpt.losses.cross_entropy import cross_entropy
from jaxpt.losses.token_metrics import ratio, token_metrics, token_sums, token_tables
from jaxpt.types import Vocab

VOCAB = Vocab(
    size=5,
    pad=0,
    eos=1,
    is_special=np.array([1, 1, 0, 0, 0], bool),
    unigram_counts=np.array([0, 0, 7, 0, 1]),
    token_bytes=np.array([0, 0, 3, 1, 4]),
)


def sums_of(logits, targets, weights):
    return token_sums(cross_entropy(logits, targets), targets, weights, token_tables(VOCAB))


def test_the_unigram_model_is_smoothed_over_ordinary_tokens():
    table = token_tables(VOCAB).unigram_nll
    np.testing.assert_allclose(np.exp(-table[2:]), np.array([8, 1, 2]) / 11, rtol=1e-6)
    assert (table[:2] == 0).all()


def test_metrics_of_a_known_batch():
    targets = jnp.array([[2, 2, 4, 1]])
    weights = jnp.array([[1.0, 1.0, 1.0, 0.0]])
    logits = jnp.log(jnp.array([[[0.1, 0.1, 0.5, 0.2, 0.1], [0.1, 0.1, 0.2, 0.5, 0.1]] * 2]))
    metrics = token_metrics(sums_of(logits, targets, weights), likelihood=True)
    nll = -(np.log(0.5) + np.log(0.2) + np.log(0.1))
    assert metrics["nll"] == pytest.approx(nll / 3, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(np.exp(nll / 3), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["unigram_loss"] == pytest.approx(-(2 * np.log(8 / 11) + np.log(2 / 11)) / 3, rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(nll / np.log(2) / (3 + 3 + 4), rel=1e-5)
    assert "bits_per_byte" not in token_metrics(sums_of(logits, targets, weights), likelihood=False)


def test_the_unigram_loss_of_special_tokens_is_that_of_the_best_constant_guess():
    """The model that mixes "special" at its own frequency with the unigram model, written as one table."""
    targets = jnp.array([[2, 1, 3, 2, 1, 2, 4, 2]])
    metrics = token_metrics(sums_of(jnp.zeros((1, 8, 5)), targets, jnp.ones((1, 8))), likelihood=True)
    mixed = np.r_[0, 2 / 8, 6 / 8 * np.array([8, 1, 2]) / 11]
    assert mixed.sum() == pytest.approx(1)
    assert metrics["unigram_loss"] == pytest.approx(-np.log(mixed[np.asarray(targets[0])]).mean(), rel=1e-5)


def test_sums_add_over_batches_and_leave_out_weight_zero():
    targets = jnp.array([[2, 3], [4, 2], [3, 1]])
    weights = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    logits = jnp.arange(30.0).reshape(3, 2, 5) % 7
    whole = sums_of(logits, targets, weights)
    parts = [sums_of(logits[i : i + 1], targets[i : i + 1], weights[i : i + 1]) for i in range(3)]
    for name, value in whole.items():
        assert float(value) == pytest.approx(sum(float(part[name]) for part in parts), rel=1e-6)
    assert whole["tokens"] == 3


def test_nothing_scored_gives_zeros_not_nan():
    metrics = token_metrics(sums_of(jnp.zeros((1, 2, 5)), jnp.zeros((1, 2), int), jnp.zeros((1, 2))), likelihood=True)
    assert {name: float(value) for name, value in metrics.items()} == {
        "nll": 0,
        "perplexity": 1,
        "accuracy": 0,
        "unigram_loss": 0,
        "bits_per_byte": 0,
    }
    assert float(ratio(jnp.float32(3), jnp.float32(0))) == 0
    assert float(ratio(jnp.float32(3), jnp.float32(2))) == 1.5
