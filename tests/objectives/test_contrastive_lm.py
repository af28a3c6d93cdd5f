"""Contrastive learning from damaged texts: who is a negative of whom, the textbook's values, what the networks read."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import packed_batch, tiny_vocab

from jaxpt.corruption.edits import Damage
from jaxpt.losses.contrastive import normalize
from jaxpt.models.config import TransformerConfig
from jaxpt.objectives.contrastive_lm import ContrastiveLM, draw_steps, walk
from jaxpt.step import make_example
from jaxpt.types import Batch, Example, Snapshot

VOCAB = tiny_vocab()
ENCODER = TransformerConfig(depth=1, width=16, heads=2, positions="rotary", layers="unroll")
CONFIG = ContrastiveLM(encoder=ENCODER, negatives=3, damage=Damage(deletion=0.5, replacement=0.0, insertion=0.0))
EVERY = dataclasses.replace(CONFIG, negatives=7)
BATCH = packed_batch(CONFIG.build(VOCAB).rows, VOCAB, length=16)
VECTORS = np.random.default_rng(0).standard_normal((8, 2, 5)).astype(np.float32)


@functools.cache
def compiled(config: ContrastiveLM):
    """(batch, key, vectors [R, 2, E]) -> (example, losses [R], and, of CONFIG, their Jacobian [R, R, 2, E])."""
    objective = config.build(VOCAB)

    @jax.jit
    def run(batch: Batch, key: jax.Array, vectors: jax.Array):
        snapshot = Snapshot({}, {}, jnp.int32(0))
        example = make_example(objective, snapshot, batch, key)

        def losses(vectors: jax.Array) -> jax.Array:
            return objective.couple(snapshot, {"vectors": vectors}, example)[0]["contrastive"]

        return example, losses(vectors), jax.jacrev(losses)(vectors) if config == CONFIG else None

    return run


def run(config: ContrastiveLM = CONFIG, batch: Batch = BATCH, vectors: np.ndarray = VECTORS, seed: int = 0):
    return jax.device_get(compiled(config)(batch, jax.random.key(seed), vectors))


def negatives_of(example: Example) -> list[list[int]]:
    rows, is_other = walk(example.row_ids, example.weights["contrastive"], example.inputs["steps"])
    return [[int(row) for row, other in zip(*pair, strict=True) if other] for pair in zip(rows, is_other, strict=True)]


def test_the_loss_is_a_cross_entropy_over_the_positive_and_the_negatives():
    """Of an anchor, its own positive and those of three others; no gradient reaches another anchor."""
    example, losses, jacobian = run()
    first, second = (np.asarray(normalize(VECTORS[:, side])) for side in range(2))
    for row, others in enumerate(negatives_of(example)):
        assert len(set(others)) == 3 and row not in others
        logits = 20 * second[[row, *others]] @ first[row]
        want = float(optax.softmax_cross_entropy_with_integer_labels(logits, 0))
        assert losses[row] == pytest.approx(want, rel=1e-3, abs=1e-5)
        reached = np.abs(jacobian[row]).max(-1) > 0
        assert np.flatnonzero(reached[:, 0]).tolist() == [row]
        assert set(np.flatnonzero(reached[:, 1])) <= {row, *others}
    assert (np.abs(jacobian[:, :, 1]).max(-1) > 0).sum() > 8  # negatives learn, too


def test_values_of_the_textbook():
    """One negative at an endless temperature: ln 2; K of the same vectors: ln (1 + K)."""
    warm = dataclasses.replace(CONFIG, negatives=1, temperature=1e6)
    np.testing.assert_allclose(run(warm)[1], math.log(2), rtol=1e-5)
    np.testing.assert_allclose(run(vectors=np.ones_like(VECTORS))[1], math.log(4), rtol=1e-5)


def test_all_others_are_the_whole_batch():
    """Seven of seven others are drawn without repetition, so that nothing is left to chance."""
    want = run(dataclasses.replace(CONFIG, negatives=None))[1]
    np.testing.assert_allclose(run(EVERY)[1], want, rtol=1e-4, atol=1e-5)


def test_any_order_of_the_rows_gives_the_same():
    order = np.array([3, 1, 0, 2, 7, 6, 5, 4])
    moved = run(batch=jax.tree.map(lambda leaf: leaf[order], BATCH), vectors=VECTORS[order])
    np.testing.assert_allclose(moved[1], run()[1][order], rtol=1e-5)
    np.testing.assert_allclose(moved[2], run()[2][order][:, order], rtol=1e-4, atol=1e-5)
    assert negatives_of(run(seed=1)[0]) != negatives_of(run()[0])


def test_copies_and_rows_without_a_text_are_nobodys_negatives():
    """Rows 0 and 3 are copies, row 5 is empty and row 7 a filler: with all six others, 0 has four negatives left."""
    tokens, segment_ids, valid = BATCH.tokens.copy(), BATCH.segment_ids.copy(), BATCH.valid.copy()
    tokens[3], segment_ids[3] = tokens[0], segment_ids[0]
    segment_ids[5] = valid[7] = 0
    batch = BATCH._replace(tokens=tokens, segment_ids=segment_ids, valid=valid)
    example, losses, _ = run(EVERY, batch, np.ones_like(VECTORS))
    assert example.weights["contrastive"].tolist() == [1, 1, 1, 1, 1, 0, 1, 0]
    picked = negatives_of(example)
    assert [sorted(picked[row]) for row in (0, 1)] == [[1, 2, 3, 4, 6], [0, 2, 3, 4, 6]]
    np.testing.assert_allclose(losses[[0, 1, 2, 3]], np.log([5, 6, 6, 5]), rtol=1e-5)
    assert np.isfinite(losses).all()


def test_candidates_are_read_once():
    """Beside the 9 candidates of 2,000 texts there is no second copy of them at length 1."""
    rows, width = 2000, 256
    objective = dataclasses.replace(CONFIG, negatives=8).build(VOCAB)
    numbers = {"text_numbers": jnp.arange(rows), "steps": jnp.ones((rows, 8), jnp.int32)}
    example = Example(numbers, jnp.arange(rows), {"contrastive": jnp.ones(rows)})

    def losses(vectors: jax.Array) -> jax.Array:
        return objective.couple(Snapshot({}, {}, jnp.int32(0)), {"vectors": vectors}, example)[0]["contrastive"]

    shape = jax.ShapeDtypeStruct((rows, 2, width), jnp.float32)
    memory = jax.jit(losses).lower(shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.7 * 4 * rows * 9 * width


def test_every_set_of_steps_is_equally_likely():
    """10 sets of 3 of 5; all of fewer than three; none of none."""
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.jit(jax.vmap(lambda key, others: draw_steps(key, others, 3), (0, None)))
    drawn = np.sort(np.asarray(draw(keys, 5)), axis=1)
    sets, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(sets) == 10 and (np.diff(sets, axis=1) > 0).all() and sets.min() == 1 and sets.max() == 5
    np.testing.assert_allclose(counts / 20_000, 0.1, atol=4 * np.sqrt(0.09 / 20_000))
    for others, want in ((2, [0, 1, 2]), (1, [0, 0, 1]), (0, [0, 0, 0]), (-1, [0, 0, 0])):
        assert (np.sort(np.asarray(draw(keys[:50], others)), axis=1) == want).all()


def test_the_network_reads_the_text_and_what_is_left_of_it():
    """Both between [CLS] and [SEP]; vectors of texts are those of whole ones."""
    objective = CONFIG.build(VOCAB)
    params = jax.jit(objective.init)(jax.random.key(1))
    snapshot = Snapshot(params, {}, jnp.int32(0))
    example = run()[0]
    for row in range(8):
        whole, left = (
            example.inputs["tokens"][row, side][example.inputs["segment_ids"][row, side] > 0].tolist()
            for side in range(2)
        )
        text = BATCH.tokens[row][BATCH.segment_ids[row] > 0].tolist()
        assert whole == [VOCAB.cls, *text, VOCAB.sep]
        assert left[0] == VOCAB.cls and left[-1] == VOCAB.sep and 2 < len(left) <= len(whole)
        rest = iter(whole)
        assert all(token in rest for token in left)
    out, vectors = jax.jit(
        lambda example, batch: (
            objective.loss(snapshot, example, jax.random.split(jax.random.key(0), 8)),
            objective.embed(snapshot, batch, 0),
        )
    )(example, BATCH)
    np.testing.assert_allclose(out.features["vectors"][:, 0], vectors, rtol=1e-5, atol=1e-6)
    assert (np.abs(out.features["vectors"][:, 1] - vectors).max(-1) > 1e-4).sum() == out.stats["changed"] > 5


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="temperature must be above 0"):
        dataclasses.replace(CONFIG, temperature=0.0).build(VOCAB)
    with pytest.raises(ValueError, match="0 negatives"):
        dataclasses.replace(CONFIG, negatives=0).build(VOCAB)
    with pytest.raises(ValueError, match="raise batch_size"):
        run(batch=jax.tree.map(lambda leaf: leaf[:1], BATCH), vectors=VECTORS[:1])
