"""Texts in rows of their own, and how their vectors lie: closed forms, sums over batches, the alarm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpt.objectives.text_vectors import collapse_alarm, separate, vector_metrics, vector_sums

ANTIPODAL = [[1.0, 0.0], [-1.0, 0.0]]
TRIANGLE = [[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]]


@pytest.mark.parametrize(
    "vectors, uniformity, rank",
    [
        (ANTIPODAL, -8.0, 1.0),
        (TRIANGLE, -6.0, 2.0),
        (np.eye(5), -4.0, 4.0),  # centred, orthonormal vectors span one dimension less
        (np.ones((4, 3)), 0.0, 0.0),  # collapsed
    ],
)
def test_closed_forms(vectors, uniformity: float, rank: float):
    """Of Wang & Isola's uniformity, whatever the vectors' lengths; invalid rows count for nothing."""
    vectors = jnp.asarray(vectors) * jnp.arange(1, len(vectors) + 1)[:, None]
    filler = jnp.concatenate([vectors, jnp.full((2, vectors.shape[1]), 7.0)])
    valid = jnp.array([1.0] * len(vectors) + [0.0, 0.0])
    for metrics in (
        vector_metrics(vector_sums(vectors, jnp.ones(len(vectors)))),
        vector_metrics(vector_sums(filler, valid)),
    ):
        assert metrics["uniformity"] == pytest.approx(uniformity, abs=1e-5)
        if rank:
            assert metrics["effective_rank"] == pytest.approx(rank, rel=1e-4)
        else:
            assert metrics["spread"] == pytest.approx(0, abs=1e-5)
            assert metrics["cosine_of_others"] == pytest.approx(1, abs=1e-5)


def test_random_directions_are_uniform():
    """About -4 + 8/d, and as many dimensions as there are: 1 / (1/d + 1/n) by chance of n vectors."""
    vectors = jax.random.normal(jax.random.key(0), (2048, 64))
    metrics = vector_metrics(vector_sums(vectors, jnp.ones(2048)))
    assert metrics["uniformity"] == pytest.approx(-3.8753, abs=0.005)
    assert metrics["effective_rank"] == pytest.approx(1 / (1 / 64 + 1 / 2048), rel=0.02)
    assert metrics["spread"] == pytest.approx(1, abs=0.01)


def test_sums_of_batches_are_those_of_all():
    vectors = jax.random.normal(jax.random.key(1), (12, 5)) + 1
    halves = [vector_sums(half, jnp.ones(6)) for half in (vectors[:6], vectors[6:])]
    added, whole = vector_metrics(jax.tree.map(jnp.add, *halves)), vector_metrics(vector_sums(vectors, jnp.ones(12)))
    for name in ("effective_rank", "spread", "cosine_of_others"):
        assert added[name] == pytest.approx(float(whole[name]), rel=1e-4)


@pytest.mark.parametrize(
    "vectors, armed, rings",
    [
        (np.ones((8, 4)) + 0.05 * np.eye(8, 4), 8, True),  # all nearly one
        (np.outer([1, -1, 1, -1, 2, -3, 1, -1], [1, 2, 3, 4]), 8, True),  # on a line
        (np.eye(8, 4) + np.eye(8, 4, -4), 8, False),
        (np.eye(2, 4), 2, False),  # two vectors, far apart, have one direction between them
        (np.ones((8, 4)), 0, False),  # too early
    ],
)
def test_the_alarm_rings_where_vectors_collapse(vectors, armed: int, rings: bool):
    metrics = vector_metrics(vector_sums(jnp.asarray(vectors, jnp.float32), jnp.ones(len(vectors))))
    assert collapse_alarm(metrics, jnp.float32(armed), 0.02) == {"alarm/collapse": float(rings)}


def test_no_gradient_passes_the_sums():
    vectors = jax.random.normal(jax.random.key(2), (4, 3))
    grad = jax.grad(lambda v: vector_sums(v, jnp.ones(4))["vector_potential"])(vectors)
    assert (grad == 0).all()


def test_texts_of_an_example_get_rows_of_their_own():
    """Row 0: three texts, the second missing, another document behind them. Row 1: one text of two sentences."""
    tokens = jnp.array([[7, 8, 9, 6, 5, 4], [1, 2, 3, 4, 5, 0]])
    segment_ids = jnp.array([[1, 1, 1, 1, 1, 2], [1, 1, 1, 1, 1, 0]])
    sentence_ids = jnp.array([[0, 0, 2, 2, 2, 0], [0, 0, 0, 1, 1, 0]])
    three, cut = separate(tokens, segment_ids, sentence_ids, 3, 2)
    assert three.tokens.tolist() == [[[7, 8], [0, 0], [9, 6]], [[1, 2], [4, 5], [0, 0]]]
    assert three.segment_ids.tolist() == [[[1, 1], [0, 0], [1, 1]], [[1, 1], [1, 1], [0, 0]]]
    assert three.present.tolist() == [[1, 0, 1], [1, 1, 0]]
    assert cut.tolist() == [1, 1]
    one, cut = separate(tokens, segment_ids, sentence_ids, 1, 6)
    assert one.tokens.tolist() == [[[7, 8, 9, 6, 5, 0]], [[1, 2, 3, 4, 5, 0]]] and cut.tolist() == [0, 0]
