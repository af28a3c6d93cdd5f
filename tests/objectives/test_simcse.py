"""SimCSE: two passes that differ by dropout alone, who is a negative, what stands where, the published MLP."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import packed_batch, tiny_vocab

from jaxpt.corruption.rows import row_keys
from jaxpt.losses.contrastive import normalize
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import pool
from jaxpt.models.patterns import bidirectional
from jaxpt.models.transformer import transformer
from jaxpt.objectives.simcse import SimCSE
from jaxpt.objectives.text_vectors import Texts, enclose, vector_metrics
from jaxpt.step import batch_gradient, make_eval_step, make_example
from jaxpt.types import Batch, Snapshot

VOCAB = tiny_vocab()
ENCODER = TransformerConfig(depth=1, width=16, heads=2, positions="rotary", dropout=0.1, layers="unroll")
CONFIG = SimCSE(encoder=ENCODER)
BATCH = packed_batch(CONFIG.build(VOCAB).rows, VOCAB, length=16)


@functools.cache
def passes(config: SimCSE):
    """(params, batch, key) -> (example, vectors [R, 2, E], losses [R], stats, gradient)."""
    objective = config.build(VOCAB)

    @jax.jit
    def run(params: dict, batch: Batch, key: jax.Array):
        snapshot = Snapshot(params, {}, jnp.int32(0))
        example = make_example(objective, snapshot, batch, key)
        keys = row_keys(key, example.row_ids)
        features = objective.loss(snapshot, example, keys).features
        losses, stats = objective.couple(snapshot, features, example)
        grads = batch_gradient(objective, objective.specs, snapshot, example, keys, 1).grads
        return example, features["vectors"], losses["contrastive"], stats, grads

    return run


@functools.cache
def params() -> dict:
    made = jax.jit(CONFIG.build(VOCAB).init)(jax.random.key(3))
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, made)  # so that texts differ


def run(config: SimCSE = CONFIG, batch: Batch = BATCH, seed: int = 0):
    read = {name: params()[name] for name in config.build(VOCAB).specs}
    return jax.device_get(passes(config)(read, batch, jax.random.key(seed)))


def test_a_text_stands_between_cls_and_sep():
    """A piece of a long document has both, too, and the longest text fits."""
    tokens = jnp.array([[7, 8, 9], [7, 8, 0], [0, 0, 0]])
    got, segment_ids = enclose(Texts(tokens, jnp.array([[1, 1, 1], [1, 1, 0], [0, 0, 0]])), 4, 5, 0)
    assert got.tolist() == [[4, 7, 8, 9, 5], [4, 7, 8, 5, 0], [0, 0, 0, 0, 0]]
    assert segment_ids.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]
    example = run()[0]
    assert example.inputs["tokens"].shape == (8, 16)


def test_the_views_differ_by_dropout_alone():
    """Another mask for each view and each key, the same one for the same key; none where there is no dropout."""
    vectors = run()[1]
    assert (np.abs(vectors[:, 0] - vectors[:, 1]).max(-1) > 1e-3).all()
    np.testing.assert_array_equal(run()[1], vectors)
    assert (np.abs(run(seed=1)[1] - vectors).max(-1) > 1e-3).all()
    # the row's key alone says which: the same text in other rows has other masks
    same = BATCH._replace(tokens=np.repeat(BATCH.tokens[:1], 8, 0), segment_ids=np.repeat(BATCH.segment_ids[:1], 8, 0))
    of_copies = run(batch=same)[1].reshape(16, -1)
    apart = np.abs(of_copies[:, None] - of_copies).max(-1) + np.eye(16)
    assert (apart > 1e-3).all()
    quiet = run(CONFIG.for_evaluation())[1]
    np.testing.assert_array_equal(quiet[:, 0], quiet[:, 1])


def test_the_loss_is_a_cross_entropy_over_the_batch():
    _, vectors, losses, stats, _ = run()
    first, second = (vectors[:, v] / np.linalg.norm(vectors[:, v], axis=-1, keepdims=True) for v in range(2))
    want = optax.softmax_cross_entropy_with_integer_labels(20 * first @ second.T, np.arange(8))
    np.testing.assert_allclose(losses, want, rtol=1e-3, atol=1e-4)
    assert stats["texts_apart"] == pytest.approx(np.square(first - second).sum(), rel=1e-3)
    metrics = vector_metrics(stats)
    others = (first @ first.T)[~np.eye(8, dtype=bool)]
    assert metrics["cosine_of_others"] == pytest.approx(others.mean(), rel=1e-3)
    assert metrics["uniformity"] == pytest.approx(np.log(np.exp(4 * others - 4).mean()), rel=1e-3)
    spectrum = np.linalg.eigvalsh(np.cov(first.T, bias=True))
    assert metrics["effective_rank"] == pytest.approx(spectrum.sum() ** 2 / np.square(spectrum).sum(), rel=1e-3)
    assert metrics["spread"] == pytest.approx(spectrum.sum(), rel=1e-3)


def test_equal_texts_and_empty_rows_are_nobodys_negatives():
    """Rows 0 and 3 are copies and row 5 is empty: row 1 has five negatives left, row 0 four."""
    tokens, segment_ids = BATCH.tokens.copy(), BATCH.segment_ids.copy()
    tokens[3], segment_ids[3] = tokens[0], segment_ids[0]
    segment_ids[5] = 0
    example, vectors, losses, stats, _ = run(batch=BATCH._replace(tokens=tokens, segment_ids=segment_ids))
    first, second = (np.asarray(normalize(vectors[:, v])) for v in range(2))
    logits = 20 * first @ second.T
    for row, negatives in ((1, (0, 2, 3, 4, 6, 7)), (0, (1, 2, 4, 6, 7)), (3, (1, 2, 4, 6, 7))):
        want = np.log(np.exp(logits[row, [row, *negatives]]).sum()) - logits[row, row]
        assert losses[row] == pytest.approx(want, rel=1e-3, abs=1e-5)
    assert example.weights["contrastive"].tolist() == [1, 1, 1, 1, 1, 0, 1, 1]
    assert stats["vectors"] == 7


@pytest.mark.parametrize("pooling", ["first", "mean", "last"])
def test_vectors_are_pooled_states(pooling):
    """In evaluation those of the Transformer itself; in training behind dense and tanh, which learn."""
    config = dataclasses.replace(CONFIG, pooling=pooling)
    judge = config.for_evaluation()
    assert judge.mlp == "none" and dataclasses.replace(config, mlp="always").for_evaluation().mlp == "always"
    example, vectors, *_ = run(judge)
    inputs = example.inputs
    told = inputs["segment_ids"], Texts(inputs["tokens"], inputs["segment_ids"]).positions
    quiet = dataclasses.replace(ENCODER, dropout=0.0)
    apply = jax.jit(transformer(quiet, VOCAB.size).apply)
    hidden = apply(params()["trunk"], inputs["tokens"], bidirectional(*told), told[1])
    size = told[0].sum(1)
    for row in range(8):
        text = np.asarray(hidden)[row, : size[row]]
        want = {"first": text[0], "mean": text.mean(0), "last": text[-1]}[pooling]
        np.testing.assert_allclose(vectors[row, 0], want, rtol=1e-4, atol=1e-5)
    if pooling == "first":
        grads = run()[4]
        assert all((np.abs(leaf) > 0).any() for leaf in jax.tree.leaves(grads["mlp"]))
        assert "mlp" not in judge.build(VOCAB).specs


def test_the_mean_of_no_text_is_nothing():
    assert (pool("mean", jnp.ones((1, 3, 2)), jnp.zeros((1, 3), jnp.int32)) == 0).all()


def test_untrained_vectors_cost_the_log_of_the_batch():
    """Of a network whose vectors are all the same: ln 8, and others as near as oneself."""
    same = jax.tree.map(jnp.zeros_like, params())
    same["mlp"]["transform"]["bias"] += 1.0
    losses, stats = jax.device_get(passes(CONFIG)(same, BATCH, jax.random.key(0)))[2:4]
    np.testing.assert_allclose(losses, np.log(8), rtol=1e-5)
    metrics = vector_metrics(stats)
    assert metrics["cosine_of_others"] == pytest.approx(1, rel=1e-5)
    assert metrics["uniformity"] == pytest.approx(0, abs=1e-4) and metrics["spread"] < 1e-5


def test_evaluation_reads_the_parameters_of_training():
    step = jax.jit(make_eval_step(CONFIG.for_evaluation().build(VOCAB), seed=0))
    sums = step(params(), {}, jnp.int32(0), BATCH)
    assert sums.stats["texts_apart"] == pytest.approx(0, abs=1e-4) and sums.stats["texts_found"] == 8


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="temperature must be above 0"):
        dataclasses.replace(CONFIG, temperature=0.0).build(VOCAB)
    with pytest.raises(ValueError, match="raise batch_size"):
        run(batch=jax.tree.map(lambda leaf: leaf[:1], BATCH))
    with pytest.raises(ValueError, match=r"needs a \[CLS\] token"):
        CONFIG.build(dataclasses.replace(VOCAB, cls=None))
