"""MASS: the fragment, its place, and the row that the decoder reads."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import packed_batch, tiny_vocab

from jaxpt.objectives import MASS
from jaxpt.objectives.mass import draw_fragments
from jaxpt.types import Snapshot

VOCAB = tiny_vocab()
SEGMENTS = jnp.array([1] * 11 + [2] * 2 + [3] + [0] * 2)
POSITIONS = jnp.array([*range(11), 0, 1, 0, 0, 0])


def fragments(rows: int, *args) -> np.ndarray:
    draw = jax.vmap(lambda key: draw_fragments(key, SEGMENTS, POSITIONS, *args))
    return np.asarray(jax.jit(draw)(jax.random.split(jax.random.key(0), rows)))


def test_one_fragment_of_half_the_tokens_behind_the_first():
    hidden = fragments(500, 0.5, 0.2, 0.2, None)
    assert np.all(hidden.sum(1) == 5) and not hidden[:, 0].any()
    assert not hidden[:, 11:].any()  # half of one token is none
    edges = np.diff(np.pad(hidden, ((0, 0), (1, 1))).astype(int), axis=1)
    assert np.all((edges == 1).sum(1) == 1)


def test_the_law_of_the_place():
    """A fifth at the start, a fifth at the end, the rest anywhere: 6 places for 5 of 10 tokens."""
    starts = fragments(6000, 0.5, 0.2, 0.2, None).argmax(1) - 1
    want = np.full(6, 0.6 / 6)
    want[[0, 5]] += 0.2
    np.testing.assert_allclose(np.bincount(starts, minlength=6) / 6000, want, atol=4 * np.sqrt(0.3 * 0.7 / 6000))


def test_a_fragment_in_every_block():
    hidden = fragments(2000, 0.5, 0.0, 0.0, 4)[:, 1:11]
    sizes = [hidden[:, :4].sum(1), hidden[:, 4:8].sum(1), hidden[:, 8:].sum(1)]
    assert [set(size.tolist()) for size in sizes] == [{2}, {2}, {1}]  # the last block has two tokens
    starts = hidden[:, :4].argmax(1)
    np.testing.assert_allclose(np.bincount(starts, minlength=3) / 2000, 1 / 3, atol=4 * np.sqrt(2 / 9 / 2000))


def test_rates_are_floored_and_exact():
    for rate, count in ((0.0, 0), (0.3, 3), (0.99, 9), (1.0, 10)):
        assert np.all(fragments(5, rate, 0.2, 0.2, None)[:, :11].sum(1) == count)


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_the_decoder_reads_the_fragment_shifted_at_its_own_positions(packing: str):
    objective = MASS(packing=packing, mask=1.0, random=0.0).build(VOCAB)
    batch = packed_batch(objective.rows, VOCAB)
    corrupt = jax.jit(lambda batch: objective.corrupt(Snapshot({}, {}, jnp.int32(0)), batch, jax.random.key(1)))
    example = jax.device_get(corrupt(batch))
    inputs, weights = example.inputs, example.weights["lm"]
    assert inputs["targets"].shape == (8, 12)  # half of the row, not all of it
    hidden = inputs["tokens"] == VOCAB.mask
    assert np.all(hidden.sum(1) == weights.sum(1)) and weights.sum() > 60
    for row in range(8):
        places, used = np.flatnonzero(hidden[row]), weights[row] > 0
        assert np.all(batch.positions[row, places] > 0)
        np.testing.assert_array_equal(inputs["targets"][row][used], batch.tokens[row, places])
        np.testing.assert_array_equal(inputs["decoder_tokens"][row][used], batch.tokens[row, places - 1])
        np.testing.assert_array_equal(inputs["decoder_positions"][row][used], batch.positions[row, places - 1])
        np.testing.assert_array_equal(inputs["decoder_segment_ids"][row][used], batch.segment_ids[row, places])
        assert not inputs["decoder_segment_ids"][row][~used].any()
        np.testing.assert_array_equal(inputs["tokens"][row][~hidden[row]], batch.tokens[row][~hidden[row]])


def test_what_stands_in_the_encoder():
    objective = MASS().build(VOCAB)
    batch = packed_batch(objective.rows, VOCAB, length=120, size=64)
    corrupt = jax.jit(lambda batch: objective.corrupt(Snapshot({}, {}, jnp.int32(0)), batch, jax.random.key(1)))
    example = jax.device_get(corrupt(batch))
    count = int(example.weights["lm"].sum())
    assert np.sum(example.inputs["tokens"] == VOCAB.mask) / count == pytest.approx(0.8, abs=4 * (0.16 / count) ** 0.5)
    others = np.sum((example.inputs["tokens"] != batch.tokens) & (example.inputs["tokens"] != VOCAB.mask))
    assert others / count == pytest.approx(0.1, abs=4 * (0.09 / count) ** 0.5 + 0.01)  # a random token may be the same


def test_the_decoder_needs_positions_for_the_whole_text():
    """Its row is half as long as the text, and its positions are the text's."""
    short = dataclasses.replace(MASS().network.decoder, max_length=100)
    config = MASS(network=dataclasses.replace(MASS().network, decoder=short))
    objective = config.build(VOCAB)
    batch = packed_batch(objective.rows, VOCAB, length=120, size=2)
    with pytest.raises(ValueError, match=r"mass, its decoder.*: rows of 120 tokens, but .* max_length=100"):
        objective.corrupt(Snapshot({}, {}, jnp.int32(0)), batch, jax.random.key(1))


@pytest.mark.parametrize("change", [{"rate": 2.0}, {"at_start": 0.7, "at_end": 0.7}, {"block": 0}])
def test_impossible_settings(change: dict):
    with pytest.raises(ValueError, match=f"mass: {next(iter(change))}"):
        MASS(**change).build(VOCAB)
