"""Fill in the middle: rearranged rows against published ones, the law of the cuts, and the forms that move no text."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from influence import DECODER, NETWORK, influence, network_params
from support import packed_batch, tiny_vocab

from jaxpt.corruption.pieces import Pieces, describe_pieces
from jaxpt.models.patterns import causal
from jaxpt.objectives.fill_in_the_middle import Cuts, FillInTheMiddle, draw_cuts, order_of, rank, rearrange
from jaxpt.types import AttentionPattern, Snapshot

VOCAB = tiny_vocab()
CONFIG = FillInTheMiddle(decoder=DECODER, pieces=3)
PRE, MID, SUF, PAD, END = 9001, 9002, 9003, 9004, 0


# --------------------------------------------------------------------------------------- the reference


class Recorded:
    """Rows that BigCode's permutation and packing loop made of recorded decisions (fim_rate and cuts)."""

    def __init__(self):
        cases = np.load(Path(__file__).parent / "fill_in_the_middle.npz")
        self.tokens, self.rearranged = cases["tokens"].astype(np.int32), cases["rearranged"].astype(np.int32)
        self.decisions, self.documents = cases["decisions"].astype(np.int32), cases["documents"]
        length = self.tokens.shape[1]
        # BigCode drops the end of a document without text; we have no such documents.
        kept = np.zeros_like(self.tokens)
        segments, self.sizes = np.zeros_like(kept), np.zeros(self.decisions.shape[:2], int)
        for row, tokens in enumerate(self.tokens):
            texts = np.split(tokens, np.flatnonzero(tokens == END) + 1)
            texts = [text for text in texts if (text != END).any()]
            line = np.concatenate(texts)
            kept[row, : len(line)] = line
            segments[row, : len(line)] = np.repeat(np.arange(len(texts)) + 1, [len(text) for text in texts])
            self.sizes[row, : len(texts)] = [(text != END).sum() for text in texts]
        self.moved = (self.decisions[..., 0] > 0) & (np.arange(self.decisions.shape[1]) < self.documents[:, None])

        def one(tokens, segment_ids, decisions):
            pieces = describe_pieces(tokens, segment_ids, END)
            columns = jnp.zeros((4, length + 1), jnp.int32).at[:, 1 : decisions.shape[0] + 1].set(decisions.T)
            cuts = Cuts(columns[0] > 0, columns[1] > 0, columns[2], columns[3])
            return rearrange(tokens, pieces, cuts, (PRE, SUF, MID), PAD, length).tokens

        self.ours = np.asarray(jax.jit(jax.vmap(one))(kept, segments, self.decisions))

    def kinds(self) -> dict[str, np.ndarray]:
        """Which rows hold which edge."""
        suffix_first, first, second = np.moveaxis(self.decisions[..., 1:], -1, 0)
        ends = self.tokens == END
        documents = {
            "suffix first": suffix_first > 0,
            "suffix last": suffix_first == 0,
            "empty prefix": (first == 0) & (second > 0),
            "empty middle": first == second,
            "empty suffix": second == self.sizes,
            "all is middle": (first == 0) & (second == self.sizes),
            "one token": self.sizes == 1,
        }
        return {name: (self.moved & held).any(1) for name, held in documents.items()} | {
            "nothing rearranged": ~self.moved.any(1),
            "tail without an end rearranged": self.moved[np.arange(len(ends)), self.documents - 1] & ~ends[:, -1],
            "the row ends with an end": ends[:, -1],
            "two ends in a row": (ends[:, 1:] & ends[:, :-1]).any(1),
            "an end first": ends[:, 0],
            "thirteen documents": self.documents >= 13,
            "padded": (self.rearranged == PAD).any(1),
            "cut": self.sizes.sum(1) + ends.sum(1) + 3 * self.moved.sum(1) > ends.shape[1],
        }


recorded = functools.cache(Recorded)
EDGES = [
    "suffix first", "suffix last", "empty prefix", "empty middle", "empty suffix", "all is middle", "one token",
    "nothing rearranged", "tail without an end rearranged", "the row ends with an end", "two ends in a row",
    "an end first", "thirteen documents", "padded", "cut",
]  # fmt: skip


@pytest.mark.parametrize("edge", EDGES)
def test_rearranged_rows_equal_published_ones(edge: str):
    cases = recorded()
    assert len(cases.tokens) >= 64
    assert set(cases.kinds()) == set(EDGES)
    held = cases.kinds()[edge]
    assert held.any(), "no case holds this edge"
    np.testing.assert_array_equal(cases.ours[held], cases.rearranged[held])


@pytest.mark.parametrize(
    ("cuts", "psm", "spm"),
    [
        ((2, 5), [-1, 1, 2, -2, 6, 7, 8, -3, 3, 4, 5], [-1, -2, 6, 7, 8, -3, 1, 2, 3, 4, 5]),
        ((4, 8), [-1, 1, 2, 3, 4, -2, -3, 5, 6, 7, 8], [-1, -2, -3, 1, 2, 3, 4, 5, 6, 7, 8]),
        ((0, 3), [-1, -2, 4, 5, 6, 7, 8, -3, 1, 2, 3], [-1, -2, 4, 5, 6, 7, 8, -3, 1, 2, 3]),
        ((5, 5), [-1, 1, 2, 3, 4, 5, -2, 6, 7, 8, -3], [-1, -2, 6, 7, 8, -3, 1, 2, 3, 4, 5]),
    ],
)
def test_the_published_example(cuts, psm, spm):
    rows = [Cuts(*np.array([[0, 1], [0, suffix_first], [0, cuts[0]], [0, cuts[1]]])) for suffix_first in (0, 1)]
    assert [rearranged_eight()(row).tolist() for row in rows] == [psm, spm]


@functools.cache
def rearranged_eight():
    pieces = Pieces(jnp.array([0, 8]), jnp.array([0, 0]))
    return jax.jit(lambda cuts: rearrange(jnp.arange(1, 9), pieces, cuts, (-1, -2, -3), 0, 11).tokens)


def test_ranks_are_the_written_order_and_its_inverse():
    """Every way to cut texts of 1, 2 and 5 tokens, in both forms."""
    every = [(n, s, a, b) for n in (1, 2, 5) for s in (0, 1) for a in range(n + 1) for b in range(a, n + 1)]
    sizes, spm, first, second = np.array(every).T

    @jax.jit
    def there_and_back(sizes, spm, first, second):
        order = order_of(Pieces(sizes, sizes * 0 + 1), Cuts(sizes > 0, spm > 0, first, second))
        order = order._replace(**{name: values[:, None] for name, values in order._asdict().items()})
        places = order.place(jnp.arange(6))
        return places, order.rank(places)

    places, ranks = map(np.asarray, there_and_back(sizes, spm, first, second))
    assert (ranks == np.arange(6)).all()
    for row, (n, suffix_first, a, b) in enumerate(every):
        text = list(range(n))
        prefix, middle, suffix = text[:a], text[a:b], text[b:]
        parts = suffix + prefix + middle if suffix_first else prefix + suffix + middle
        assert places[row, : n + 1].tolist() == [*parts, n]


# ------------------------------------------------------------------------------------------------ draw


def test_the_law_of_the_cuts():
    """20,000 rows; a share p is off by at most 4 sqrt(p (1 - p) / 20000) < 0.0142."""
    sizes = jnp.array([0, 1, 2, 5, 10, 0])
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.jit(jax.vmap(lambda key: draw_cuts(key, Pieces(sizes, sizes * 0), 0.6, 0.3, None)))
    moved, spm, first, second = map(np.asarray, draw(keys))
    assert (moved[:, sizes == 0] == 0).all(), "a piece without text is never rearranged"
    np.testing.assert_allclose(moved[:, 1:5].mean(0), 0.6, atol=0.0142)
    np.testing.assert_allclose(spm[:, 1:5].mean(0), 0.3, atol=0.0142)
    assert ((first >= 0) & (first <= second) & (second <= np.asarray(sizes))).all()
    for piece in range(1, 5):
        n, a, b = int(sizes[piece]), first[:, piece], second[:, piece]
        assert (a == b).mean() == pytest.approx(1 / (n + 1), abs=0.0142)
        both = np.concatenate([a, b])  # the two cuts together are uniform
        np.testing.assert_allclose(np.bincount(both, minlength=n + 1) / len(both), 1 / (n + 1), atol=0.0142)


def test_no_more_pieces_than_there_is_room_for():
    sizes = jnp.array([0, 3, 3, 3, 3, 3, 0])
    keys = jax.random.split(jax.random.key(1), 8_000)
    moved = np.asarray(jax.jit(jax.vmap(lambda key: draw_cuts(key, Pieces(sizes, sizes * 0), 1.0, 0.0, 2)))(keys).moved)
    assert (moved.sum(1) == 2).all()
    np.testing.assert_allclose(moved[:, 1:6].mean(0), 0.4, atol=4 * np.sqrt(0.24 / 8_000))


# ----------------------------------------------------------------------------------------- the objective


@functools.cache
def example_of(config: FillInTheMiddle):
    objective = config.build(VOCAB)
    batch = packed_batch(objective.rows, VOCAB, length=40)
    corrupt = jax.jit(lambda batch: objective.corrupt(Snapshot({}, {}, jnp.int32(0)), batch, jax.random.key(2)))
    return objective, batch, jax.device_get(corrupt(batch))


@pytest.mark.parametrize(("rate", "spm"), [(1.0, 0.0), (1.0, 1.0), (0.0, 0.5), (0.5, 0.5)])
def test_nothing_is_lost_and_every_token_but_the_first_is_scored(rate: float, spm: float):
    _, batch, example = example_of(dataclasses.replace(CONFIG, rate=rate, spm=spm))
    tokens, segments = example.inputs["tokens"], example.inputs["segment_ids"]
    assert tokens.shape == (8, 40)
    added = np.isin(tokens, VOCAB.sentinels[:3]) & (segments > 0)
    for row in range(8):
        for piece in range(1, batch.segment_ids[row].max() + 1):
            before, after = batch.tokens[row, batch.segment_ids[row] == piece], tokens[row, segments[row] == piece]
            assert sorted(before) == sorted(after[~added[row, segments[row] == piece]])
            assert added[row, segments[row] == piece].sum() == (0 if (before == after[: len(before)]).all() else 3)
            if rate == 1 and spm == 0:
                assert after[0] == VOCAB.sentinels[0]
            if rate == 1 and spm == 1:
                assert after[:2].tolist() == list(VOCAB.sentinels[:2])
    pieces = sum(len(np.unique(row[row > 0])) for row in segments)
    assert example.weights["lm"].sum() == (segments > 0).sum() - pieces  # padding weighs nothing
    assert {0.0: added.sum() == 0, 0.5: added.any(), 1.0: added.sum() == 3 * pieces}[rate]


def test_a_loss_on_middles_only():
    both = [example_of(dataclasses.replace(CONFIG, middle_only=only)) for only in (False, True)]
    (_, _, whole), (_, _, middle) = both
    np.testing.assert_array_equal(whole.inputs["tokens"], middle.inputs["tokens"])
    context = whole.inputs["kinds"] == 1
    assert (whole.weights["lm"] * context).sum() > 0
    np.testing.assert_array_equal(middle.weights["lm"], whole.weights["lm"] * ~context)
    ends = (middle.inputs["targets"] == VOCAB.eos) & (whole.weights["lm"] > 0)
    assert (middle.weights["lm"][ends] == 1).all(), "where a middle stops must be learned"


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="needs 3 sentinel tokens and this tokenizer has 2"):
        CONFIG.build(dataclasses.replace(VOCAB, sentinels=VOCAB.sentinels[:2]))
    dataclasses.replace(CONFIG, form="in_place").build(dataclasses.replace(VOCAB, sentinels=()))
    with pytest.raises(ValueError, match="no room beside the 9 slots"):
        CONFIG.build(VOCAB).rows.tokens(9)
    with pytest.raises(ValueError, match=r"rate is a share in \[0, 1\], not 2"):
        dataclasses.replace(CONFIG, rate=2).build(VOCAB)
    with pytest.raises(ValueError, match="pieces is 0"):
        dataclasses.replace(CONFIG, pieces=0).build(VOCAB)


def test_what_a_person_is_shown():
    for form in ("moved", "in_place"):
        objective, _, example = example_of(dataclasses.replace(CONFIG, form=form))
        assert objective.views is not None
        view = objective.views(Snapshot({}, {}, jnp.int32(0)), example)["decoder"]
        assert view.targets is not None
        assert view.tokens.shape == view.targets.shape == example.weights["lm"].shape


# --------------------------------------------------------------------------------- without moving the text

TEXT = np.array([10, 11, 12, 13, 14, 15, 16, 17, 3, 20, 21, 22, 23, 3, 30, 31, 32, 33, 34, 35])
SEGMENTS = np.repeat([1, 2, 3], [9, 5, 6])
PLACES = np.concatenate([np.arange(9), np.arange(5), np.arange(6)])
SIZES = np.array([0, 8, 4, 6])


@functools.cache
def rank_rows():
    return jax.jit(
        lambda cuts, bidirectional: jax.tree.map(
            lambda yes, no: jnp.where(bidirectional, yes, no),
            rank(jnp.array(SEGMENTS), jnp.array(PLACES), _pieces(), cuts, True),
            rank(jnp.array(SEGMENTS), jnp.array(PLACES), _pieces(), cuts, False),
        )
    )


def _pieces() -> Pieces:
    return describe_pieces(jnp.array(TEXT), jnp.array(SEGMENTS), 3)


def decided(seed: int) -> Cuts:
    rng = np.random.default_rng(seed)
    pad = [0] * (len(TEXT) + 1 - 4)
    first, second = np.sort([rng.integers(0, SIZES + 1), rng.integers(0, SIZES + 1)], axis=0)
    columns = [[0, 1, 1, int(rng.random() < 0.5)], rng.integers(0, 2, 4), first, second]
    moved, spm, first, second = (jnp.array([*column, *pad]) for column in columns)
    return Cuts(moved > 0, spm > 0, first, second)


def pattern_of(ranks: np.ndarray) -> AttentionPattern:
    segments, ranks, places = (jnp.asarray(x)[None] for x in (SEGMENTS, ranks, PLACES))
    return AttentionPattern(segments, segments, ranks, ranks, places, places)


@functools.cache
def losses_and_gradient():
    """(tokens, pattern, positions, labels, weights) of one row -> per-token losses and the gradient of their sum."""

    def total(params, tokens, pattern, positions, labels, weights):
        hidden = NETWORK.apply(params, tokens[None], pattern, positions[None])[0]
        logits = jax.nn.log_softmax(hidden @ params["embed"]["tokens"].T)
        losses = -jnp.take_along_axis(logits, labels[:, None], 1)[:, 0] * weights
        return losses.sum(), losses

    return jax.jit(jax.grad(total, has_aux=True))


@pytest.mark.parametrize("seed", range(6))
def test_in_place_equals_the_rearranged_row_at_its_original_positions(seed: int):
    cuts, params = decided(seed), network_params()
    ranks, following, weights, _ = map(np.asarray, rank_rows()(cuts, False))
    grads, losses = losses_and_gradient()(
        params, jnp.array(TEXT), pattern_of(ranks), jnp.array(PLACES), jnp.array(TEXT[following]), jnp.array(weights)
    )
    # by hand: the parts of each text one after the other, causal attention, the positions they had
    order = []
    for piece in (1, 2, 3):
        places = np.flatnonzero(piece == SEGMENTS)
        text, end = places[: SIZES[piece]], places[SIZES[piece] :]
        a, b = int(cuts.first[piece]), int(cuts.second[piece])
        parts = (text[b:], text[:a], text[a:b]) if cuts.suffix_first[piece] else (text[:a], text[b:], text[a:b])
        order += [*(np.concatenate(parts) if cuts.moved[piece] else text), *end]
    order = np.array(order)
    moved, places = TEXT[order], PLACES[order]
    scored = np.append(SEGMENTS[1:] == SEGMENTS[:-1], False)
    pattern = causal(jnp.array(SEGMENTS)[None], jnp.array(places)[None])._replace(order=None)
    want_grads, want = losses_and_gradient()(
        params, jnp.array(moved), pattern, jnp.array(places), jnp.array(np.roll(moved, -1)), jnp.array(scored * 1.0)
    )
    assert (weights[order] == scored).all()
    np.testing.assert_allclose(np.asarray(losses)[order], want, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, want_grads)


def leaks(ranks: np.ndarray, following: np.ndarray, scored: np.ndarray) -> bool:
    """Whether a token reaches, through three layers, a place from which it is predicted, or an earlier one."""
    reached = influence(TEXT, pattern_of(ranks), PLACES)
    return bool(reached[following[scored], np.flatnonzero(scored)].any())


@pytest.mark.parametrize("bidirectional", [False, True])
def test_no_token_reaches_the_place_that_predicts_it(bidirectional: bool):
    for seed in range(4):
        cuts = decided(seed)
        ranks, following, weights, kinds = map(np.asarray, rank_rows()(cuts, bidirectional))
        scored = weights > 0
        if bidirectional:
            scored &= kinds != 1
        assert not leaks(ranks, following, scored)
        reached = influence(TEXT, pattern_of(ranks), PLACES)
        same = SEGMENTS[:, None] == SEGMENTS
        np.testing.assert_array_equal(reached, same & (ranks[:, None] <= ranks))  # all it may see, it uses


def test_a_context_that_sees_the_middle_would_leak():
    """The fault that the test above must find: prefix and suffix see the middle, and pass it on."""
    cuts = decided(0)
    ranks, following, weights, kinds = map(np.asarray, rank_rows()(cuts, True))
    context = (ranks == 0) & np.asarray(cuts.moved)[SEGMENTS]
    assert context.any()
    scored = (weights > 0) & (kinds != 1)
    pattern = pattern_of(ranks)
    pattern = pattern._replace(query_ranks=jnp.where(jnp.array(context), 99, pattern.query_ranks))
    reached = influence(TEXT, pattern, PLACES)
    assert reached[following[scored], np.flatnonzero(scored)].any()


def test_every_middle_token_depends_on_the_whole_suffix():
    cuts = Cuts(*(jnp.array([[0, 1, 0, 0], [0, 0, 0, 0], [0, 2, 0, 0], [0, 5, 0, 0]]).astype(int)))
    cuts = Cuts(*(jnp.pad(column, (0, len(TEXT) + 1 - 4)) for column in cuts))
    cuts = cuts._replace(moved=cuts.moved > 0, suffix_first=cuts.suffix_first > 0)
    ranks = np.asarray(rank_rows()(cuts, False)[0])
    assert ranks[:9].tolist() == [0, 1, 5, 6, 7, 2, 3, 4, 8]
    assert influence(TEXT, pattern_of(ranks), PLACES)[5:8, 2:5].all()
