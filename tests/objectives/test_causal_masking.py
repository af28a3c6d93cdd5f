"""Causal masking: moved spans against published ones, the laws of the gaps, weights."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from influence import DECODER
from support import packed_batch, tiny_vocab

from jaxpt.corruption.pieces import Pieces, describe_pieces
from jaxpt.objectives.causal_masking import CausalMasking, Gaps, draw_gaps, move_spans, truncated_poisson
from jaxpt.types import Snapshot

VOCAB = tiny_vocab()
CONFIG = CausalMasking(decoder=DECODER)


@functools.cache
def recorded() -> dict[str, np.ndarray]:
    """Rows that the functions of CM3's data set (fairseq) made of given spans; masks 901.., end of span 950, EOS 3."""
    with np.load(Path(__file__).parent / "causal_masking.npz") as file:
        cases = {name: array.astype(np.int32) for name, array in file.items()}

    def one(tokens, segment_ids, gaps):
        places = jnp.arange(len(tokens))
        first = jax.ops.segment_min(places, segment_ids, len(tokens) + 1)
        positions = jnp.where(segment_ids > 0, places - first[segment_ids], 0)
        row = (tokens, segment_ids, positions, describe_pieces(tokens, segment_ids, 3), Gaps(*gaps.T))
        return move_spans(*row, list(range(901, 907)), 950, 0, cases["moved"].shape[1]).tokens

    ours = jax.jit(jax.vmap(one))(cases["tokens"], cases["segment_ids"], cases["gaps"])
    return cases | {"ours": np.asarray(ours)}


@pytest.mark.parametrize(
    "edge",
    ["no gap", "full", "several gaps in a document", "gap at the start", "gap at the end", "all is gap",
     "touching gaps", "cut tail", "padding"],
)  # fmt: skip
def test_moved_spans_equal_published_ones(edge: str):
    cases = recorded()
    assert len(cases["tokens"]) >= 64
    segments, starts, stops = np.moveaxis(cases["gaps"], -1, 0)
    used = segments > 0
    sizes = np.array([np.bincount(s[t != 3], minlength=9) for s, t in zip(cases["segment_ids"], cases["tokens"])])  # noqa: B905
    size = np.take_along_axis(sizes, segments, 1)
    pair = used[:, 1:] & (segments[:, 1:] == segments[:, :-1])
    held = {
        "no gap": ~used.any(1),
        "full": used.all(1),
        "several gaps in a document": pair.any(1),
        "gap at the start": (used & (starts == 0)).any(1),
        "gap at the end": (used & (stops == size)).any(1),
        "all is gap": (used & (starts == 0) & (stops == size)).any(1),
        "touching gaps": (pair & (starts[:, 1:] == stops[:, :-1])).any(1),
        "cut tail": (cases["tokens"][:, -1] != 3) & (cases["segment_ids"][:, -1] > 0),
        "padding": cases["segment_ids"][:, -1] == 0,
    }[edge]
    assert held.any(), "no case holds this edge"
    np.testing.assert_array_equal(cases["ours"][held], cases["moved"][held])


def test_an_empty_span_keeps_every_token():
    """Where the published function would write its sentinel over a token."""
    row = jnp.array([11, 12, 13, 3]), jnp.ones(4, int), jnp.arange(4)
    gaps = Gaps(jnp.array([1, 1, 0]), jnp.array([1, 3, 0]), jnp.array([1, 3, 0]))
    moved = move_spans(*row, describe_pieces(*row[:2], end=3), gaps, [-1, -2], -9, 0, 12)
    assert moved.tokens.tolist() == [11, -1, 12, 13, -2, -1, -9, -2, -9, 3, 0, 0]
    assert moved.kinds.tolist() == [1, 1, 1, 1, 1, 1, 2, 1, 2, 1, 0, 0]
    assert np.flatnonzero(moved.is_gap).tolist() == [1, 4]
    assert moved.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0]


@functools.cache
def drawn(sizes: tuple[int, ...], rate: float, law: tuple[float, ...], room: int, rows: int = 20_000) -> Gaps:
    pieces = Pieces(jnp.array(sizes), jnp.zeros(len(sizes), int))
    keys = jax.random.split(jax.random.key(0), rows)
    return jax.device_get(jax.jit(jax.vmap(lambda key: draw_gaps(key, pieces, rate, np.array(law), room)))(keys))


def test_the_number_of_gaps():
    """20,000 rows: 4 standard errors of a share are at most .0142."""
    law = truncated_poisson(1.0, 16)
    assert law[0] == pytest.approx(1 / (np.e - 1), abs=1e-6)  # .582
    gaps = drawn((0, 50, 0), 0.5, tuple(law), 16)
    counts = np.bincount((gaps.segment_ids > 0).sum(1), minlength=6) / 20_000
    assert counts[0] == pytest.approx(0.5, abs=0.0142)
    np.testing.assert_allclose(counts[1:6], law[:5] / 2, atol=0.0142)


@pytest.mark.parametrize("spans", [1, 2])
def test_the_law_of_the_spans_is_that_of_pairs_redrawn_until_none_overlap(spans: int):
    rng = np.random.default_rng(0)
    pairs = np.sort(rng.random((200_000, spans, 2)), axis=-1)
    pairs = np.take_along_axis(pairs, np.argsort(pairs[:, :, :1], axis=1), axis=1)
    pairs = pairs[(pairs[:, 1:, 0] >= pairs[:, :-1, 1]).all(1)]
    gaps = drawn((0, 100_000, 0), 1.0, (0.0,) * (spans - 1) + (1.0,), 4)
    assert (gaps.segment_ids[:, :spans] == 1).all()
    assert (gaps.segment_ids[:, spans:] == 0).all()
    ours = np.stack([gaps.starts, gaps.stops], -1)[:, :spans] / 100_000
    hidden = [(x[..., 1] - x[..., 0]).sum(1) for x in (ours, pairs)]
    assert hidden[0].mean() == pytest.approx(spans / (2 * spans + 1), abs=4 * 0.24 / np.sqrt(20_000))
    quantiles = np.linspace(0.1, 0.9, 9)
    for k in range(spans):
        for side in range(2):  # 4 standard errors of a share of 20,000, over a density of at least 0.5
            want = np.quantile(pairs[:, k, side], quantiles)
            share = (ours[:, k, side, None] <= want).mean(0)
            np.testing.assert_allclose(share, quantiles, atol=4 * 0.5 / np.sqrt(20_000) + 4 * 0.5 / np.sqrt(len(pairs)))


def test_spans_of_packed_documents_are_apart_and_fit_the_row():
    sizes = (0, 1, 4, 0, 9, 2, 0)
    gaps = drawn(sizes, 0.9, tuple(truncated_poisson(1.0, 3)), 5, 4_000)
    used = gaps.segment_ids > 0
    assert (np.diff(used.astype(int), axis=1) <= 0).all(), "used ones come first"
    assert set(np.unique(gaps.segment_ids)) == {0, 1, 2, 4, 5}
    assert (gaps.starts <= gaps.stops)[used].all()
    assert (gaps.stops <= np.array(sizes)[gaps.segment_ids])[used].all()
    follows = used[:, 1:] & (gaps.segment_ids[:, 1:] == gaps.segment_ids[:, :-1])
    assert follows.any()
    assert (gaps.starts[:, 1:] >= gaps.stops[:, :-1])[follows].all()
    assert (used.sum(1) == 5).any()


def test_a_document_that_does_not_fit_stays_whole_and_each_has_the_same_chance():
    """Room for one document of three with 3 gaps each; 4 standard errors of a third of 4,000 are .03."""
    gaps = drawn((0, 8, 8, 8, 0), 1.0, (0.0, 0.0, 1.0), 5, 4_000)
    counts = np.stack([(gaps.segment_ids == segment).sum(1) for segment in (1, 2, 3)], 1)
    assert (np.sort(counts, axis=1) == [0, 0, 3]).all()
    np.testing.assert_allclose((counts == 3).mean(0), 1 / 3, atol=0.03)


def test_nothing_is_lost_and_gaps_are_not_scored():
    config = dataclasses.replace(CONFIG, rate=1.0)
    objective = config.build(VOCAB)
    batch = packed_batch(objective.rows, VOCAB, length=40)
    corrupt = jax.jit(lambda batch: objective.corrupt(Snapshot({}, {}, jnp.int32(0)), batch, jax.random.key(2)))
    example = jax.device_get(corrupt(batch))
    tokens, segments, weights = example.inputs["tokens"], example.inputs["segment_ids"], example.weights["lm"]
    masks, eom = VOCAB.sentinels[:3], VOCAB.sentinels[3]
    assert tokens.shape == (8, 40)
    assert (weights[segments == 0] == 0).all()
    several = 0
    for row in range(8):
        for piece in range(1, batch.segment_ids[row].max() + 1):
            before, after = batch.tokens[row, batch.segment_ids[row] == piece], tokens[row, segments[row] == piece]
            scored = weights[row, segments[row] == piece]
            ordinary = after[~np.isin(after, VOCAB.sentinels)]
            assert sorted(ordinary) == sorted(before)
            ends = (after == eom).sum()
            seen = [np.flatnonzero(after == mask) for mask in masks[:ends]]
            assert all(len(places) == 2 for places in seen), "one in the text, one behind it"
            unscored = [places[0] - 1 for places in seen if places[0] > 0] + [len(after) - 1]
            np.testing.assert_array_equal(np.flatnonzero(scored == 0), np.unique(unscored))
            several += ends > 1
    assert several
    assert objective.views is not None
    assert objective.views(Snapshot({}, {}, jnp.int32(0)), example)["decoder"].tokens.shape == (8, 40)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="spans=16 needs 17 sentinel tokens and this tokenizer has 4"):
        dataclasses.replace(CONFIG, spans=16, spans_per_row=16).build(VOCAB)
    with pytest.raises(ValueError, match="fit spans_per_row=4"):
        dataclasses.replace(CONFIG, spans=5).build(VOCAB)
    with pytest.raises(ValueError, match="no room beside the 12 slots"):
        CONFIG.build(VOCAB).rows.tokens(10)
    with pytest.raises(ValueError, match="rate is a share"):
        dataclasses.replace(CONFIG, rate=-1).build(VOCAB)
