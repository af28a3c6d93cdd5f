"""Blank infilling: rearranged rows against published ones, the laws of the gaps, and no token that sees its label."""

from __future__ import annotations

import dataclasses
import functools
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from influence import influence
from support import packed_batch, tiny, tiny_vocab

from jaxpt.corruption.rows import describe
from jaxpt.models.presets import glm
from jaxpt.objectives import BlankInfilling
from jaxpt.objectives.blank_infilling import Gaps, Infilled, draw_gaps, rearrange
from jaxpt.types import Array, Example, Snapshot

VOCAB = tiny_vocab()
CONFIG = tiny(BlankInfilling())
START, END, SENTENCES, ENDS = VOCAB.sentinels
MIX = dataclasses.replace(CONFIG, sentences=0.3, generation=0.2)
MASKS = [VOCAB.require("mask", "a test"), SENTENCES, ENDS]
PAD, MASK, SOP, EOP = 0, 901, 902, 903


# --------------------------------------------------------------------------------------- the reference


class Recorded:
    """Rows that GLM's code made of recorded spans and orders."""

    def __init__(self):
        kept = np.load(Path(__file__).parent / "blank_infilling.npz")
        self.kept = {name: kept[name].astype(np.int32) for name in kept.files}
        tokens, length, spans, count = (self.kept[n] for n in ("tokens", "length", "spans", "num_spans"))
        rows, slots = tokens.shape[0], spans.shape[1]
        begins, ends = spans[..., 0], spans[..., 1]
        used = np.arange(slots) < count[:, None]
        taken, first = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
        order = np.zeros((rows, slots), np.int32)
        for row in range(rows):
            for begin, end in spans[row, : count[row]]:
                taken[row, begin:end], first[row, begin] = True, True
            appended = [*self.kept["span_order"][row, : count[row]], *range(count[row], slots)]
            order[row, appended] = np.arange(slots)
        segments = (np.arange(tokens.shape[1]) < length[:, None]).astype(np.int32)

        def one(tokens_L: Array, segment_ids_L: Array, *gaps: Array) -> Infilled:
            return rearrange(tokens_L, segment_ids_L, Gaps(*gaps), (MASK, SOP, EOP, PAD), 96)

        self.ours = jax.device_get(jax.jit(jax.vmap(one))(tokens, segments, taken, first, order))
        last = np.take_along_axis(ends, count[:, None] - 1, axis=1)[:, 0]
        ordered = np.where(used, self.kept["span_order"], np.arange(slots))
        gap = np.where(used[:, 1:], begins[:, 1:] - ends[:, :-1], 9)
        self.kinds = {
            "a span at the start": begins[:, 0] == 1,
            "a span at the end": last == length,
            "one span": count == 1,
            "as many spans as can be": count == slots,
            "spans of one token": ((ends - begins == 1) & used).any(1),
            "spans of four tokens": ((ends - begins == 4) & used).any(1),
            "one token between spans": (gap == 1).any(1),
            "in the order of the text": (ordered == np.arange(slots)).all(1),
            "in another order": (ordered != np.arange(slots)).any(1),
            "the shortest text": length == length.min(),
            "a full row": length == tokens.shape[1],
        }


recorded = functools.cache(Recorded)
EDGES = [
    "a span at the start", "a span at the end", "one span", "as many spans as can be", "spans of one token",
    "spans of four tokens", "one token between spans", "in the order of the text", "in another order",
    "the shortest text", "a full row",
]  # fmt: skip


@pytest.mark.parametrize("edge", EDGES)
def test_rows_equal_published_ones(edge: str):
    cases = recorded()
    kept, ours = cases.kept, cases.ours
    assert len(kept["tokens"]) >= 64
    assert set(cases.kinds) == set(EDGES)
    rows = np.flatnonzero(cases.kinds[edge])
    assert len(rows), "no case holds this edge"
    for row in rows:
        used = slice(0, kept["inputs_length"][row])
        assert (ours.segment_ids[row] > 0).sum() == used.stop
        np.testing.assert_array_equal(ours.tokens[row, used], kept["inputs"][row, used])
        np.testing.assert_array_equal(ours.asked[row, used], kept["loss_mask"][row, used] > 0)
        asked = ours.asked[row]
        np.testing.assert_array_equal(ours.targets[row][asked], kept["targets"][row, : len(asked)][asked])
        np.testing.assert_array_equal(ours.positions[row, used], kept["position_rows"][row, 0, used])
        np.testing.assert_array_equal(ours.inner_positions[row, used], kept["position_rows"][row, 1, used])
        assert used.stop - asked.sum() == kept["part_a_length"][row]


# --------------------------------------------------------------------------------------- any row


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_both_parts_rebuild_the_text(data: st.DataObject):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    length, spans = 24, 6
    segments = np.repeat(np.arange(len(sizes)) + 1, sizes)[:length]
    segments = np.pad(segments, (0, length - len(segments)))
    tokens = np.where(segments > 0, np.arange(length) + 10, PAD)
    taken = np.array(data.draw(st.lists(st.booleans(), min_size=length, max_size=length))) & (segments > 0)
    apart = np.array(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    goes_on = np.append(False, taken[:-1] & (segments[1:] == segments[:-1])) & ~apart
    first = taken & ~goes_on
    fits = np.cumsum(first) <= spans
    taken, first = taken & fits, first & fits
    order = np.array(data.draw(st.permutations(range(spans))))
    used = int(first.sum())
    order = np.argsort(np.argsort(np.where(np.arange(spans) < used, order, 99 + order)))
    row = jax.device_get(_rearranged(tokens, segments, Gaps(*map(jnp.asarray, (taken, first, order)))))
    part_a, part_b = ~row.asked & (row.segment_ids > 0), row.asked
    assert (row.tokens[part_a] == np.where(first, MASK, tokens)[(segments > 0) & (~taken | first)]).all()
    starts = np.flatnonzero(part_b & (row.tokens == SOP))
    written = []
    for begin, stop in pairwise([*starts, part_a.sum() + part_b.sum()]):
        assert (row.tokens[begin + 1 : stop] == row.targets[begin : stop - 1]).all()
        assert row.targets[stop - 1] == EOP
        assert row.inner_positions[begin:stop].tolist() == list(range(1, stop - begin + 1))
        assert len(set(row.positions[begin:stop])) == len(set(row.segment_ids[begin:stop])) == 1
        asks = (row.positions == row.positions[begin]) & (row.segment_ids == row.segment_ids[begin]) & part_a
        assert row.tokens[asks].tolist() == [MASK]
        written.append((int(np.flatnonzero(asks)[0]), row.targets[begin : stop - 1].tolist()))
    assert len(written) == used
    rebuilt = dict(written)
    whole = [rebuilt.get(i, [t]) for i, t in enumerate(row.tokens[part_a].tolist())]
    assert [t for part in whole for t in part] == tokens[segments > 0].tolist()


@jax.jit
def _rearranged(tokens: Array, segments: Array, gaps: Gaps) -> Infilled:
    return rearrange(tokens, segments, gaps, (MASK, SOP, EOP, PAD), 36)


# ------------------------------------------------------------------------------------------- the laws


@functools.cache
def drawn(config: BlankInfilling, rows: int) -> tuple[np.ndarray, Gaps, np.ndarray, np.ndarray]:
    """Kinds and gaps of rows of two documents: [CLS] and 60 tokens in sentences of 12, [CLS] and 30."""
    segments = np.repeat([1, 2, 0], [61, 31, 4])
    sentences = np.concatenate([[0], np.arange(60) // 12, [0], np.arange(30) // 12, [0] * 4])
    tokens = np.where(segments > 0, 10 + np.arange(96) % 40, 0)
    tokens[[0, 61]] = VOCAB.cls
    row = describe(jnp.asarray(tokens), jnp.asarray(segments), jnp.asarray(sentences), VOCAB)
    draw = jax.vmap(lambda key: draw_gaps(config, key, row, jnp.asarray(segments), jnp.asarray(sentences), 30))
    kinds, gaps = jax.device_get(jax.jit(draw)(jax.random.split(jax.random.key(1), rows)))
    return kinds, gaps, segments, sentences


def test_the_law_of_blanks():
    """4,000 rows of 90 tokens: 4 standard errors of the share are 0.0006, of a token's 0.0226, of a length's 0.016."""
    kinds, gaps, segments, _ = drawn(CONFIG, 4000)
    assert (kinds == 0).all()
    assert not gaps.taken[:, [0, 61]].any()
    assert gaps.taken.sum() / (4000 * 90) == pytest.approx(0.15, abs=0.0006)
    middle = (segments > 0) & (np.arange(96) % 61 > 0) & (np.arange(96) > 8) & (np.arange(96) < 80)
    np.testing.assert_allclose(gaps.taken.mean(0)[middle], 0.15, atol=0.0226)  # fewer at the ends of the row
    goes_on = gaps.taken[:, 1:] & gaps.taken[:, :-1] & (segments[1:] == segments[:-1])
    assert not (goes_on & gaps.first[:, 1:]).any(), "blanks never touch"
    inside = np.pad(gaps.taken & ~gaps.first, ((0, 0), (0, 1)))
    runs = [1 + int(inside[row, place + 1 :].argmin()) for row, place in np.argwhere(gaps.first[:, :48])]
    law = np.exp(-3) * np.cumprod([1.0, *(3 / np.arange(1, 9))])[1:] / (1 - np.exp(-3))
    np.testing.assert_allclose(CONFIG._blanks.law[:8], law, atol=1e-6)
    assert CONFIG._blanks.law @ (1 + np.arange(len(CONFIG._blanks.law))) == pytest.approx(3.157, abs=5e-4)
    # as drawn; a budget of 13.5 tokens ends with a shorter one
    np.testing.assert_allclose(np.bincount(runs, minlength=9)[1:9] / len(runs), law, atol=0.03)
    orders = np.stack([order[:3] for order, first in zip(gaps.order, gaps.first, strict=True) if first.sum() == 3])
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    np.testing.assert_allclose(counts / len(orders), 1 / 6, atol=4 * np.sqrt(5 / 36 / len(orders)))


def test_the_mixture_of_the_largest_model():
    """4,000 rows; 4 standard errors of a share are below 0.032."""
    kinds, gaps, segments, sentences = drawn(MIX, 4000)
    np.testing.assert_allclose(np.bincount(kinds) / 4000, [0.5, 0.3, 0.2], atol=0.032)
    whole, ends = gaps.taken[kinds == 1], gaps.taken[kinds == 2]
    # sentences: all or nothing, each a span, 15 % of the tokens
    for segment, sentence in ((1, 0), (1, 4), (2, 1)):
        unit = (segments == segment) & (sentences == sentence) & (np.arange(96) % 61 > 0)
        assert (whole[:, unit].all(1) | ~whole[:, unit].any(1)).all()
        assert (gaps.first[kinds == 1][:, unit].sum(1) == whole[:, unit].any(1)).all()
    assert whole.sum() / (len(whole) * 90) == pytest.approx(0.15, abs=0.013)
    # ends: one span for each document, of a quarter of it to all of it, each length as likely
    for segment, size in ((1, 60), (2, 30)):
        counts = ends[:, segments == segment].sum(1)
        assert (ends[:, segments == segment][:, ::-1].cumsum(1).max(1) == counts).all()
        assert (gaps.first[kinds == 2][:, segments == segment].sum(1) == 1).all()
        assert (counts.min(), counts.max()) == (np.ceil(size / 4), size)
        assert counts.mean() == pytest.approx((np.ceil(size / 4) + size) / 2, abs=4 * 0.23 * size / np.sqrt(len(ends)))
    last = ends[:, (segments == 1)][:, -1]
    assert last.all()


# --------------------------------------------------------------------------------------- the objective


def corrupted(config: BlankInfilling, length: int = 48, size: int = 16, seed: int = 0) -> tuple[Example, np.ndarray]:
    objective = config.build(VOCAB)
    batch = packed_batch(objective.rows, VOCAB, length, size)
    example = jax.jit(objective.corrupt)(Snapshot({}, {}, jnp.int32(0)), batch, jax.random.key(seed))
    return jax.device_get(example), np.asarray(batch.tokens)


@pytest.mark.parametrize("config", [CONFIG, MIX], ids=["blanks", "mixture"])
def test_targets_are_the_text_and_padding_weighs_nothing(config: BlankInfilling):
    example, tokens = corrupted(config)
    inputs, used = example.inputs, example.weights["lm"] > 0
    assert inputs["tokens"].shape[1] == 48
    assert used.any(1).sum() >= 12  # 4 of 25 tokens may become none
    places = inputs["target_positions"]
    for row in range(len(tokens)):
        read = inputs["tokens"][row, places[row][used[row]]]
        said = inputs["targets"][row][used[row]]
        assert (read == START).sum() == (said == END).sum() == np.isin(
            inputs["tokens"][row], MASKS
        ).sum()  # fmt: skip
        left = inputs["tokens"][row][inputs["pattern"].query_ranks[row] == 0]
        left = left[~np.isin(left, [*MASKS, VOCAB.pad])]
        text = tokens[row][tokens[row] != VOCAB.pad]
        assert sorted([*left, *said[said != END]]) == sorted(text)
        assert (read[read != START] == said[:-1][said[:-1] != END]).all()
    assert (inputs["segment_ids"] > 0).sum(1).max() < 49
    assert (np.take_along_axis(inputs["segment_ids"], places, axis=1)[used] > 0).all()


def test_no_token_reaches_the_place_that_predicts_it():
    """Nor does anything behind it in part B, or another document: a token reaches part A only from part A."""
    example, _ = corrupted(dataclasses.replace(CONFIG, rate=0.4), length=40, size=3)
    inputs = example.inputs
    for row in range(3):
        pattern = jax.tree.map(lambda leaf: jnp.asarray(leaf[row : row + 1]), inputs["pattern"])  # noqa: B023
        reached = influence(inputs["tokens"][row], pattern, inputs["positions"][row])
        segments, ranks = inputs["segment_ids"][row], np.asarray(pattern.query_ranks[0])
        present = segments > 0
        want = (segments[:, None] == segments) & (ranks[:, None] <= ranks)
        np.testing.assert_array_equal(reached[present][:, present], want[present][:, present])
        asked = inputs["target_positions"][row][example.weights["lm"][row] > 0]
        assert len(asked) > 6
        assert not reached[asked[1:], asked[:-1]].any(), "what is written next"
        assert not reached[np.ix_(asked, present & (ranks == 0))].any()


def test_a_part_a_that_sees_part_b_would_leak():
    """The fault that the test above must find."""
    example, _ = corrupted(dataclasses.replace(CONFIG, rate=0.4), length=40, size=3)
    pattern = jax.tree.map(lambda leaf: leaf[:1].copy(), example.inputs["pattern"])
    pattern.query_ranks[pattern.query_ranks == 0] = 99
    reached = influence(example.inputs["tokens"][0], jax.tree.map(jnp.asarray, pattern), example.inputs["positions"][0])
    asked = example.inputs["target_positions"][0][example.weights["lm"][0] > 0]
    assert reached[asked[1:], asked[:-1]].any()


def test_both_rows_of_positions_are_read():
    """A change of either position changes the losses; without the second table only the first counts."""
    example, _ = corrupted(CONFIG)
    for config in (CONFIG, dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, token_types=0))):
        objective = config.for_evaluation().build(VOCAB)
        params = jax.jit(objective.init)(jax.random.key(0))
        keys = jax.random.split(jax.random.key(0), 16)

        @jax.jit
        def losses(inputs, objective=objective, params=params, keys=keys):
            out = objective.loss(Snapshot(params, {}, jnp.int32(0)), example._replace(inputs=inputs), keys)
            return out.losses["lm"]

        whole = losses(example.inputs)
        for name, counts in (("positions", True), ("inner_positions", bool(config.decoder.token_types))):
            moved = example.inputs | {name: np.where(example.inputs[name] > 0, example.inputs[name] + 1, 0)}
            assert np.array_equal(losses(moved), whole) != counts


@pytest.mark.parametrize("length", [24, 48, 128, 512, 2048])
def test_a_row_is_as_long_as_asked(length: int):
    rows = CONFIG.build(VOCAB).rows
    width = rows.tokens(length)
    assert CONFIG._length(width) == length
    assert width >= 0.8 * length - 8


def test_what_cannot_be_is_refused():
    def build(**changes):
        return dataclasses.replace(CONFIG, **changes).build(VOCAB)

    with pytest.raises(ValueError, match=r"rate is a share in \[0, 1\], not 1.5"):
        build(rate=1.5)
    with pytest.raises(ValueError, match=r"sentences \+ generation = 1.2 is more than 1"):
        build(sentences=0.7, generation=0.5)
    with pytest.raises(ValueError, match="needs 4 sentinel tokens"):
        dataclasses.replace(MIX).build(dataclasses.replace(VOCAB, sentinels=VOCAB.sentinels[:2]))
    with pytest.raises(ValueError, match="hold no text"):
        build().rows.tokens(4)
    with pytest.raises(ValueError, match="raise token_types"):
        corrupted(dataclasses.replace(CONFIG, decoder=tiny(glm("base", token_types=9))))
    with pytest.raises(ValueError, match="mean is a length"):
        build(mean=0.0)
