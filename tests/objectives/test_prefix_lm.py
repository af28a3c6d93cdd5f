"""Prefix language modelling: the published packing example, the law of the prefix, no leak over its edge."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from influence import DECODER, influence
from support import packed_batch, tiny_vocab

from jaxpt.corruption.pieces import Pieces
from jaxpt.models.patterns import visible
from jaxpt.objectives.prefix_lm import PrefixLM, draw_prefix
from jaxpt.types import AttentionPattern, Batch, Example, Snapshot

VOCAB = tiny_vocab()
CONFIG = PrefixLM(decoder=DECODER)


@functools.cache
def corrupted(config: PrefixLM, tokens: tuple[int, ...], segments: tuple[int, ...]) -> Example:
    """256 rows of the same packed documents, each with its own prefixes."""
    places = [i - segments.index(segment) if segment else 0 for i, segment in enumerate(segments)]
    rows = [np.tile(np.array(row, np.int32), (256, 1)) for row in (tokens, segments, places)]
    ids = np.arange(256, dtype=np.uint32)
    batch = Batch(*rows, rows[0] * 0, ids, np.zeros(256, np.int32), np.ones(256, np.float32))
    objective = config.build(VOCAB)
    run = jax.jit(lambda batch: objective.corrupt(Snapshot({}, {}, jnp.int32(0)), batch, jax.random.key(0)))
    return jax.device_get(run(batch))


def with_prefix(example: Example, lengths: dict[int, int]) -> int:
    """A row whose documents have these prefixes."""
    segments, ranks = example.inputs["segment_ids"], example.inputs["pattern"].query_ranks
    fits = [((ranks == 0) & (segments == s)).sum(1) == p for s, p in lengths.items()]
    return int(np.flatnonzero(np.all(fits, axis=0))[0])


def test_the_published_example():
    """Of seqio's prefix_lm row, inputs [9 4 6 1] and targets [3 9 1]: what it feeds shifted, we feed in place."""
    example = corrupted(CONFIG, (9, 4, 6, 1, 3, 9, 1), (1,) * 7)
    row = with_prefix(example, {1: 4})
    flags = np.array([1, 1, 1, 1, 1, 0, 0], bool)[1:]  # of the shifted row, whose first token we do not have
    places = np.arange(6)
    allowed = (places <= places[:, None]) | (flags & flags[:, None])
    pattern = jax.tree.map(lambda leaf: leaf[row : row + 1], example.inputs["pattern"])
    np.testing.assert_array_equal(np.asarray(visible(pattern))[0, :6, :6], allowed)
    assert example.weights["lm"][row].tolist() == [0, 0, 0, 1, 1, 1, 0]
    assert (example.inputs["targets"][row] * example.weights["lm"][row]).tolist() == [0, 0, 0, 3, 9, 1, 0]


TOKENS = (10, 11, 12, 13, 14, 3, 20, 21, 22, 23, 24, 25, 3, 0)
SEGMENTS = (1,) * 6 + (2,) * 7 + (0,)


@pytest.mark.parametrize("lengths", [{1: 1, 2: 5}, {1: 4, 2: 1}, {1: 3, 2: 3}])
def test_labels_never_reach_their_place_and_the_prefix_reaches_all(lengths: dict[int, int]):
    example = corrupted(CONFIG, TOKENS, SEGMENTS)
    row = with_prefix(example, lengths)
    pattern: AttentionPattern = jax.tree.map(lambda leaf: leaf[row : row + 1], example.inputs["pattern"])
    reached = influence(np.array(TOKENS), pattern, example.inputs["positions"][row])
    scored = np.flatnonzero(example.weights["lm"][row])
    assert (example.inputs["targets"][row][scored] == np.array(TOKENS)[scored + 1]).all()
    assert not reached[scored + 1, scored].any(), "a label is seen by the place that predicts it"
    for segment, begin, stop in ((1, 0, 6), (2, 6, 13)):
        edge = begin + lengths[segment]
        want = np.tri(14, dtype=bool).T  # earlier reaches later
        want[begin:edge, begin:edge] = True  # the last token of the prefix reaches the first
        np.testing.assert_array_equal(reached[begin:stop, begin:stop], want[begin:stop, begin:stop])
        assert scored[(scored >= begin) & (scored < stop)].tolist() == list(range(edge - 1, stop - 1))
    assert not reached[:6, 6:].any()
    assert not reached[6:, :6].any()


def test_a_prefix_one_too_long_would_leak():
    """The fault that the test above must find."""
    example = corrupted(CONFIG, TOKENS, SEGMENTS)
    row = with_prefix(example, {1: 3, 2: 3})
    pattern = jax.tree.map(lambda leaf: leaf[row : row + 1].copy(), example.inputs["pattern"])
    pattern.query_ranks[0, 3] = pattern.key_ranks[0, 3] = 0
    assert influence(np.array(TOKENS), pattern, example.inputs["positions"][row])[3, 2]


def test_the_law_of_the_prefix():
    """T5's: uniform on 1 .. n-1, or on its upper part; 20,000 draws, 4 standard errors of a share are at most .0142."""
    sizes = jnp.array([0, 1, 2, 3, 11, 0])

    def draws(suffix: float) -> np.ndarray:
        keys = jax.random.split(jax.random.key(0), 20_000)
        return np.asarray(jax.jit(jax.vmap(lambda key: draw_prefix(key, Pieces(sizes, sizes * 0), suffix)))(keys))

    half = draws(0.5)
    assert (half[:, [0, 1, 5]] == 0).all()
    assert (half[:, 2] == 1).all()
    assert set(half[:, 3]) == {1, 2}
    assert (half[:, 3] == 1).mean() == pytest.approx(0.5, abs=0.0142)
    np.testing.assert_allclose(np.bincount(half[:, 4], minlength=11)[1:] / 20_000, 0.1, atol=0.0142)
    quarter = draws(0.25)
    assert set(quarter[:, 4]) == {5, 6, 7, 8, 9, 10}  # round(0.5 * 10) .. 10
    np.testing.assert_allclose(np.bincount(quarter[:, 4], minlength=11)[5:] / 20_000, 1 / 6, atol=0.0142)


def test_tokens_hidden_in_the_prefix_are_predicted_in_place():
    config = dataclasses.replace(CONFIG, prefix_mask=0.4)
    example = corrupted(config, TOKENS, SEGMENTS)
    inputs, weights = example.inputs, example.weights["lm"]
    hidden = inputs["tokens"] == VOCAB.mask
    in_prefix = (inputs["pattern"].query_ranks == 0) & (inputs["segment_ids"] > 0)
    assert hidden.any()
    assert in_prefix[hidden].all()
    last = in_prefix & ~np.roll(in_prefix & (np.array(SEGMENTS) == np.roll(SEGMENTS, 1)), -1, axis=1)
    assert not (hidden & last).any(), "the last token of a prefix predicts the suffix"
    assert (weights[hidden] == 1).all()
    assert (inputs["targets"][hidden] == np.tile(TOKENS, (256, 1))[hidden]).all()
    places = ~in_prefix & (inputs["segment_ids"] > 0)
    assert (inputs["tokens"][places] == np.tile(TOKENS, (256, 1))[places]).all()
    candidates = (in_prefix & ~last).sum()
    assert hidden.sum() / candidates == pytest.approx(0.4, abs=4 * np.sqrt(0.24 / candidates))
    assert set(np.unique(weights)) == {0, 1}
    assert config.for_evaluation().prefix_mask == 0


def test_padding_and_other_documents_weigh_nothing():
    objective = CONFIG.build(VOCAB)
    batch = packed_batch(objective.rows, VOCAB)
    example = objective.corrupt(Snapshot({}, {}, jnp.int32(0)), batch, jax.random.key(1))
    weights = np.asarray(example.weights["lm"])
    assert (weights[batch.segment_ids == 0] == 0).all()
    ends = batch.tokens == VOCAB.eos
    assert (weights[ends] == 0).all()
    assert (weights[np.roll(ends, -1, axis=1)] == 1).all(), "the end belongs to every suffix"
    assert objective.views is not None
    assert objective.views(Snapshot({}, {}, jnp.int32(0)), example)["decoder"].tokens.shape == batch.tokens.shape


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"suffix is a share in \(0, 0.5\], not 0.7"):
        dataclasses.replace(CONFIG, suffix=0.7).build(VOCAB)
    with pytest.raises(ValueError, match=r"\[MASK\]"):
        dataclasses.replace(CONFIG, prefix_mask=0.15).build(dataclasses.replace(VOCAB, mask=None))
    with pytest.raises(ValueError, match=r"prefix_mask is a share in \[0, 1\), not 1"):
        dataclasses.replace(CONFIG, prefix_mask=1.0).build(VOCAB)
