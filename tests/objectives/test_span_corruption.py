"""Span corruption: recorded rows, T5's lengths and laws, texts that are never cut, UL2's rows, one decoder."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from influence import DECODER
from support import packed_batch, tiny, tiny_vocab

from jaxpt.corruption.collapse import collapse, text_sizes
from jaxpt.corruption.span_plan import UL2, Denoiser, Layout, counts, plan, plan_of_rows
from jaxpt.models.config import TransformerConfig
from jaxpt.models.patterns import visible
from jaxpt.models.presets import t5
from jaxpt.objectives.combine import Mixture, Portion
from jaxpt.objectives.span_corruption import SpanCorruption, draw_hidden, mode_tokens
from jaxpt.types import Batch, Example, Snapshot

VOCAB = tiny_vocab(97, sentinels=32)
CONFIG = SpanCorruption(network=tiny(t5("small")))
END, PAD = 1, -1


def runs_of(hidden: np.ndarray) -> int:
    return int((hidden & ~np.pad(hidden, (1, 0))[:-1]).sum())


# --------------------------------------------------------------------------------------- the reference


class Recorded:
    """Rows that T5's noise_span_to_unique_sentinel made of recorded masks: of the mask and of its complement."""

    def __init__(self):
        cases = np.load(Path(__file__).parent / "span_corruption.npz")
        self.kind, self.rate, self.mean = cases["mask_kind"], cases["noise_density"], cases["mean_span"]
        self.length, tokens = cases["length"].astype(int), cases["tokens"].astype(np.int32)
        self.hidden = np.unpackbits(cases["noise_mask"], axis=1).astype(bool)
        self.wanted = []
        for name in ("inputs", "targets"):
            row, size = cases[name].astype(np.int32), cases[f"{name}_length"].astype(int)
            row[np.arange(len(row)), size] = END  # which a later step of T5's appends
            self.wanted.append(row)
        texts = (np.arange(tokens.shape[1]) < self.length[:, None]).astype(np.int32)
        sentinels = np.arange(4999, 4699, -1)

        @jax.jit
        @jax.vmap
        def both(tokens, texts, hidden):
            write = functools.partial(collapse, tokens, texts, sentinels=sentinels, end=END, pad=PAD)
            return write(hidden, count=1, size=300), write(~hidden, count=1, size=300)

        self.sides = jax.device_get(both(tokens, texts, self.hidden))

    def kinds(self) -> dict[str, Any]:
        """Which rows hold which edge."""
        last = self.hidden[np.arange(len(self.length)), self.length - 1]
        runs = np.array([runs_of(row) for row in self.hidden])
        return {
            "one token": self.length == 1,
            "two tokens": self.length == 2,
            "full row": self.length == 256,
            "nothing hidden": ~self.hidden.any(1),
            "all hidden": np.equal(self.hidden.sum(1), self.length),
            "hidden first": self.hidden[:, 0],
            "shown last": ~last,
            "hidden at both ends": self.hidden[:, 0] & last,
            "one span": runs == 1,
            "sixty spans": runs >= 60,
            "random spans": self.kind < 2,
            "rolled": self.kind == 2,
            "a coin per token": self.kind == 3,
        }


recorded = functools.cache(Recorded)
EDGES = [
    "one token", "two tokens", "full row", "nothing hidden", "all hidden", "hidden first", "shown last",
    "hidden at both ends", "one span", "sixty spans", "random spans", "rolled", "a coin per token",
]  # fmt: skip


@pytest.mark.parametrize("edge", EDGES)
def test_sides_equal_published_ones(edge: str):
    cases = recorded()
    assert len(cases.length) >= 64
    assert set(cases.kinds()) == set(EDGES)
    held = cases.kinds()[edge]
    assert held.any(), "no case holds this edge"
    for side, wanted in zip(cases.sides, cases.wanted, strict=True):
        np.testing.assert_array_equal(side.tokens[held], wanted[held])
        np.testing.assert_array_equal(side.segment_ids[held], wanted[held] != PAD)
        np.testing.assert_array_equal(side.sizes[held, 1], (wanted[held] != PAD).sum(1))


def test_counts_equal_those_of_published_masks():
    cases, seen = recorded(), 0
    for kind, rate, mean, n, hidden in zip(cases.kind, cases.rate, cases.mean, cases.length, cases.hidden, strict=True):
        if kind < 2:
            noise, spans = counts(Denoiser(float(rate), float(mean)), n)
            assert (noise[n], spans[n] if noise[n] else 0) == (hidden.sum(), runs_of(hidden))
            seen += 1
    assert seen >= 15


# ------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("length", "rate", "mean", "tokens", "targets", "spans"),
    [
        (512, 0.15, 3.0, 568, 114, 28),
        (512, 0.15, 8.0, 588, 100, 11),
        (512, 0.5, 3.0, 766, 512, 128),
        (512, 0.5, 8.0, 908, 512, 57),
        (512, 0.15, 64.0, 600, 92, 1),
        (512, 0.5, 64.0, 1006, 512, 8),
        (1024, 0.15, 3.0, 1137, 229, 57),
        (128, 0.15, 3.0, 141, 29, 7),
        (256, 0.15, 3.0, 284, 58, 14),
        (2048, 0.15, 3.0, 2274, 456, 114),
    ],
)
def test_lengths_are_those_of_t5s_helper(length, rate, mean, tokens, targets, spans):
    made = plan(Layout((Denoiser(rate, mean),)), length)
    assert (made.inputs, made.tokens, made.targets, made.spans[0, tokens]) == (length, (tokens,), targets, spans)


def test_rounding_is_half_to_even_in_float32():
    noise, spans = counts(Denoiser(), 400)
    assert noise[[10, 30, 50, 70, 90, 110]].tolist() == [2, 4, 8, 10, 14, 16]
    assert noise[[190, 350, 390]].tolist() == [29, 53, 59]  # float64 has 28, 52, 58
    assert counts(Denoiser(), 400, np.float64)[0][[190, 350, 390]].tolist() == [28, 52, 58]
    assert noise[:3].tolist() == [0, 0, 1] and spans[:3].tolist() == [0, 1, 1]
    assert set(spans[2:31].tolist()) == {1} and spans[31] == 2
    noise, spans = counts(Denoiser(0.75, 1.0), 9)  # where T5's code fails: more spans than tokens between them
    assert noise[8] == 6 and spans[8] == 2


LAYOUTS = [
    Layout((Denoiser(),)),
    Layout((Denoiser(),), documents=4),
    Layout(UL2, documents=3),
    Layout((Denoiser(0.5, 3.0), Denoiser(0.15, None)), documents=2, roll=True),
    Layout(UL2, documents=2, roll=True, one_row=True),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_width_of_a_batch_tells_its_lengths(layout: Layout):
    for length in range(16, 90):
        made = plan(layout, length)
        assert length - 6 <= made.inputs <= length  # no room is left, but what no denoiser could use
        again = plan_of_rows(layout, max(made.tokens))
        assert again[:3] == made[:3]


# ------------------------------------------------------------------------------------------- the law


@functools.partial(jax.jit, static_argnames=("rolled", "rows"))
def many(segment_ids_L: jax.Array, noise_S: jax.Array, spans_S: jax.Array, *, rolled: bool = False, rows: int = 8192):
    """Many draws for one row of texts: [rows, L] bool."""
    sizes_S = text_sizes(segment_ids_L, noise_S.shape[0] - 1)
    keys = jax.random.split(jax.random.key(3), rows)
    return jax.vmap(lambda key: draw_hidden(key, segment_ids_L, sizes_S, noise_S, spans_S, roll=rolled))(keys)


def one_text(n: int, noise: int, spans: int, **how) -> np.ndarray:
    return np.asarray(many(jnp.ones(n, int), jnp.array([0, noise]), jnp.array([0, spans]), **how))


def test_all_layouts_are_equally_likely():
    drawn = one_text(8, 3, 2)
    layouts, times = np.unique(drawn, axis=0, return_counts=True)
    assert len(layouts) == 8  # 2 ways to cut three tokens, 4 to cut five
    np.testing.assert_allclose(times / len(drawn), 1 / 8, atol=4 * np.sqrt(1 / 8 * 7 / 8 / len(drawn)))


def share_hidden(place: int, n: int, noise: int, spans: int) -> float:
    """P(a place is hidden), counted: the token that has b hidden ones before it stands in span k, of a others.

    There are C(b, k - 1) C(noise - 1 - b, spans - k) ways to cut the hidden tokens so, and C(a - 1, k - 1)
    C(n - noise - a - 1, spans - k - 1) ways to cut the others with exactly k runs before it.
    """
    shown, ways = n - noise, 0
    for k in range(1, spans + 1):
        for a in range(k, min(place, shown) + 1):
            b = place - a
            rest = (
                math.comb(shown - a - 1, spans - k - 1) if k < spans and a < shown else int(k == spans and a == shown)
            )
            if b < noise:
                ways += math.comb(a - 1, k - 1) * rest * math.comb(b, k - 1) * math.comb(noise - 1 - b, spans - k)
    return ways / (math.comb(shown - 1, spans - 1) * math.comb(noise - 1, spans - 1))


def test_the_published_row():
    """568 tokens, 85 of them in 28 spans: who is hidden how often, and how long spans are."""
    drawn = one_text(568, 85, 28, rows=4096)
    assert (drawn.sum(1) == 85).all() and all(runs_of(row) == 28 for row in drawn[:500])
    rates = drawn.mean(0)
    noise = 4 * np.sqrt(0.25 / len(drawn))
    assert rates[0] == 0 and rates[-1] == 1
    assert rates[[1, 2, 5, -2, -3, -10]] == pytest.approx([27 / 482, 0.090, 0.137, 0.68, 0.48, 0.157], abs=noise)
    for place in (1, 3, 284, 560):
        exact = share_hidden(place, 568, 85, 28)
        assert rates[place] == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / len(drawn)))
    edges = np.diff(np.pad(drawn, ((0, 0), (1, 1))).astype(int), axis=1)
    lengths = np.concatenate([np.flatnonzero(row < 0) - np.flatnonzero(row > 0) for row in edges])
    shares = np.bincount(lengths)[1:5] / len(lengths)
    assert shares == pytest.approx([0.3214, 0.2207, 0.1507, 0.1024], abs=4 * np.sqrt(0.25 / len(lengths)))
    assert lengths.mean() == pytest.approx(85 / 28)


def test_short_texts_lose_their_end_unless_rolled():
    sizes = [1, 2, 20, 30]
    noise, spans = (table[sizes] for table in counts(Denoiser(), 30))
    assert (noise.tolist(), spans.tolist()) == ([0, 1, 3, 4], [1, 1, 1, 1])
    texts = jnp.array(np.repeat([1, 2, 3, 4], sizes), jnp.int32)
    drawn = np.asarray(many(texts, jnp.array([0, *noise]), jnp.array([0, *spans]), rows=64))
    end = np.concatenate([np.arange(n) >= n - hidden for n, hidden in zip(sizes, noise, strict=True)])
    assert (drawn == end).all()
    drawn = one_text(20, 3, 1, rolled=True)
    assert (drawn.sum(1) == 3).all()
    np.testing.assert_allclose(drawn.mean(0), 3 / 20, atol=4 * np.sqrt(0.15 * 0.85 / len(drawn)))
    both = np.concatenate([drawn, drawn], 1)
    assert all("111" in "".join(map(str, row.astype(int))) for row in both[:200])  # one span, perhaps round the end


@pytest.mark.parametrize("rolled", [False, True])
def test_every_text_of_a_row_follows_its_own_law(rolled: bool):
    sizes, noise, spans = [1, 40, 0, 8, 2, 13], [0, 12, 0, 3, 1, 2], [1, 4, 0, 2, 1, 2]
    texts = np.repeat(np.arange(1, 7), sizes)
    row = jnp.array(np.pad(texts, (0, 9)), jnp.int32)
    drawn = np.asarray(many(row, jnp.array([0, *noise]), jnp.array([0, *spans]), rolled=rolled))
    assert not drawn[:, len(texts) :].any()
    for number, (n, hidden, runs) in enumerate(zip(sizes, noise, spans, strict=True), 1):
        mine = drawn[:, : len(texts)][:, texts == number]
        assert (mine.sum(1) == hidden).all()
        if n > 1 and not rolled:
            assert not mine[:, 0].any() and mine[:, -1].all()
            assert all(runs_of(each) == runs for each in mine[:300])
        if number == 4 and not rolled:
            _, times = np.unique(mine, axis=0, return_counts=True)
            np.testing.assert_allclose(times / len(mine), 1 / 8, atol=4 * np.sqrt(1 / 8 * 7 / 8 / len(mine)))
        if rolled and n > 1:
            np.testing.assert_allclose(mine.mean(0), hidden / n, atol=4 * np.sqrt(0.25 / len(mine)))


# ------------------------------------------------------------------------------------------- the text


def rebuild(inputs: list[int], targets: list[int], sentinels: set[int]) -> list[int]:
    """The text of both sides of it, without their ends: runs of either are interleaved."""

    def cut(side: list[int]) -> list[list[int]]:
        runs: list[list[int]] = [[]]
        for token in side:
            if token in sentinels:
                runs.append([])
            else:
                runs[-1].append(token)
        return runs

    shown, hidden = cut(inputs), cut(targets)
    # what begins the text begins its own side; the other side begins with a sentinel for it
    first, second = (shown, hidden[1:]) if shown[0] else (hidden, shown[1:])
    assert not (hidden if shown[0] else shown)[0]
    return [token for pair in itertools.zip_longest(first, second, fillvalue=()) for run in pair for token in run]


@settings(max_examples=60, deadline=None)
@given(hidden=st.lists(st.booleans(), min_size=24, max_size=24), cuts=st.sets(st.integers(1, 23), max_size=3))
def test_both_sides_rebuild_every_text_whatever_is_hidden(hidden, cuts):
    texts = np.searchsorted(sorted(cuts), np.arange(24), side="right").astype(np.int32) + 1
    tokens = np.arange(100, 124, dtype=np.int32)
    sides = _collapsed(tokens, texts, np.array(hidden))
    for number in range(1, len(cuts) + 2):
        inputs, targets = (side.tokens[side.segment_ids == number].tolist() for side in sides)
        assert inputs.pop() == END and targets.pop() == END
        assert rebuild(inputs, targets, set(range(900, 1000))) == tokens[texts == number].tolist()
        assert [x for x in inputs if x >= 900] == sorted([x for x in inputs if x >= 900], reverse=True)


@jax.jit
def _collapsed(tokens, texts, hidden):
    write = functools.partial(collapse, tokens, texts, sentinels=np.arange(999, 899, -1), end=END, pad=PAD)
    return write(hidden, count=4, size=80), write(~hidden, count=4, size=80)


def rows_of(config: SpanCorruption, length: int, rows: int = 64, seed: int = 0) -> tuple[Batch, Example]:
    """Full rows of documents of all sizes, and what becomes of them."""
    objective, rng = config.build(VOCAB), np.random.default_rng(seed)
    width = objective.rows.tokens(length)
    rooms = [kind.tokens(length) for kind in objective.rows.each_kind()]
    segments = np.zeros((rows, width), np.int32)
    for kind, own in enumerate(objective.rows.kind_ranges(rows)):
        for row in range(own.start, own.stop):
            room = rooms[kind]
            cuts = np.sort(rng.choice(np.arange(1, room), rng.integers(0, min(7, room)), replace=False))
            segments[row, :room] = np.searchsorted(cuts, np.arange(room), side="right") + 1
    ordinary = np.flatnonzero(~VOCAB.is_special)
    tokens = np.where(segments > 0, rng.choice(ordinary, segments.shape), VOCAB.pad).astype(np.int32)
    batch = batch_of(tokens, segments)
    return batch, corrupted(config, batch)


def batch_of(tokens: np.ndarray, segments: np.ndarray) -> Batch:
    ids = np.arange(len(tokens), dtype=np.uint32)
    arrays = [
        tokens,
        segments,
        segments * 0,
        segments * 0,
        ids,
        ids.astype(np.int32) * 0,
        np.ones(len(ids), np.float32),
    ]
    return Batch(*arrays)


@functools.cache
def corruption(config: SpanCorruption):
    corrupt = config.build(VOCAB).corrupt
    return jax.jit(lambda batch: corrupt(Snapshot({}, {}, jnp.int32(0)), batch, jax.random.key(0)))


def corrupted(config: SpanCorruption, batch: Batch) -> Example:
    return jax.device_get(corruption(config)(batch))


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (CONFIG, 60),
        (dataclasses.replace(CONFIG, documents=1), 60),
        (dataclasses.replace(CONFIG, documents=2, denoisers=(Denoiser(0.5, 3.0),), roll=True), 40),
        (dataclasses.replace(CONFIG, denoisers=(Denoiser(0.3, 1.0),)), 33),
        (dataclasses.replace(CONFIG, denoisers=(*UL2, UL2[2]), documents=3), 50),
        (dataclasses.replace(CONFIG, denoisers=(*UL2, UL2[2]), documents=3, network=DECODER, roll=True), 64),
    ],
)
def test_no_text_is_ever_cut(config: SpanCorruption, length: int):
    """Whatever the documents' sizes, both sides of a full row hold all of it, and T5's inputs fill the length."""
    batch, example = rows_of(config, length)
    sentinels, modes = set(VOCAB.sentinels), set(mode_tokens(config, VOCAB))
    inputs, weights, filled = example.inputs, example.weights["lm"], []
    for row in range(len(batch.tokens)):
        texts = np.minimum(batch.segment_ids[row], config.documents)
        for number in range(1, texts.max() + 1):
            read = inputs["tokens"][row][inputs["segment_ids"][row] == number].tolist()
            if config.network is DECODER:
                loss = weights[row][inputs["segment_ids"][row] == number]
                start = int(np.flatnonzero(loss)[0]) + 1
                read, said = read[:start], read[start:]
                assert loss.tolist() == [0] * (start - 1) + [1] * len(said) + [0]
            else:
                said = inputs["targets"][row][inputs["decoder_segment_ids"][row] == number].tolist()
                heard = inputs["decoder_tokens"][row][inputs["decoder_segment_ids"][row] == number].tolist()
                assert heard == [VOCAB.pad, *said[:-1]]
            assert read.pop() == VOCAB.eos and said.pop() == VOCAB.eos
            if read[0] in modes:
                read = read[1:]
            assert rebuild(read, said, sentinels) == batch.tokens[row][texts == number].tolist()
        filled.append((inputs["segment_ids"][row] > 0).sum())
    if config.documents == 1:
        assert set(filled) == {length}
        assert (inputs["decoder_segment_ids"] > 0).all()
    if config.network is not DECODER:
        np.testing.assert_array_equal(weights, inputs["decoder_segment_ids"] > 0)
        assert not inputs["targets"][weights == 0].any()


def test_ul2_rows_have_their_modes_and_shares():
    config = dataclasses.replace(CONFIG, denoisers=UL2, documents=1)
    nlu, s2s, nlg = VOCAB.sentinels[::-1][:3]
    assert mode_tokens(config, VOCAB) == (nlu, nlu, s2s, nlg, nlg, nlg, nlg)
    for each, token in zip(UL2, mode_tokens(config, VOCAB), strict=True):  # alone, as a part of a mixture
        assert mode_tokens(dataclasses.replace(config, denoisers=(each,)), VOCAB) == (token,)
    batch, example = rows_of(config, 50, rows=14)
    inputs = example.inputs
    assert inputs["tokens"][:, 0].tolist() == [nlu] * 4 + [s2s] * 2 + [nlg] * 8
    room = [kind.tokens(50) for kind in config.build(VOCAB).rows.each_kind()]
    assert (batch.segment_ids > 0).sum(1).tolist() == np.repeat(room, 2).tolist()
    ordinary = ~VOCAB.is_special[inputs["targets"]] & (example.weights["lm"] > 0)
    noise = [counts(each, n)[0][n] for each, n in zip(UL2, room, strict=True)]
    assert ordinary.sum(1).tolist() == np.repeat(noise, 2).tolist()
    # one span at the end, after a quarter less of the text
    text, n = batch.tokens[4], room[2]
    said = [VOCAB.sentinels[0], *text[n - noise[2] : n].tolist(), VOCAB.eos]
    assert inputs["targets"][4][: len(said)].tolist() == said
    # the rows of the last kind, wherever they stand in a batch
    order = np.array([13, 2, 0, 5, 1, 3, 4, 7, 6, 8, 12, 9, 11, 10])
    shuffled = corrupted(config, jax.tree.map(lambda leaf: leaf[order], batch))
    np.testing.assert_array_equal(shuffled.inputs["tokens"], inputs["tokens"][order])


def test_evaluation_is_the_first_denoiser_with_its_mode():
    config = dataclasses.replace(CONFIG, denoisers=UL2, z_loss=1e-4)
    judge = config.for_evaluation()
    assert judge.denoisers == UL2[:1] and judge.z_loss == 0
    assert judge.build(VOCAB).rows.kinds == () and set(judge.build(VOCAB).scale) == {"lm"}
    assert mode_tokens(judge, VOCAB)[0] == mode_tokens(config, VOCAB)[0]
    alone = dataclasses.replace(config, network=dataclasses.replace(DECODER, dropout=0.1)).for_evaluation()
    assert isinstance(alone.network, TransformerConfig) and alone.network.dropout == 0


def test_the_end_of_a_prefix_language_model_is_not_rolled():
    """Beside rolled spans: of one row of each kind, the second one's targets are the last quarter."""
    config = dataclasses.replace(CONFIG, denoisers=(Denoiser(), Denoiser(0.25, None)), documents=1, roll=True)
    batch, example = rows_of(config, 40, rows=8)
    room = config.build(VOCAB).rows.each_kind()[1].tokens(40)
    hidden = round(room / 4)
    for row in range(4, 8):
        said = [VOCAB.sentinels[0], *batch.tokens[row, room - hidden : room].tolist(), VOCAB.eos]
        assert example.inputs["targets"][row][: len(said)].tolist() == said
        assert (example.inputs["segment_ids"][row] > 0).sum() == room - hidden + 2  # nothing is kept for a second span


def test_one_decoder_reads_the_published_row():
    """Of seqio's prefix_lm example, inputs [9 4 6 1] and targets [3 9 1]: attention and weights of what it feeds."""
    config = dataclasses.replace(CONFIG, network=DECODER, denoisers=(Denoiser(0.25, None),), documents=1)
    objective = config.build(VOCAB)
    tokens = np.array([[9, 14, 16, 19]], np.int32)
    assert objective.rows.tokens(8) == 4
    example = corrupted(config, batch_of(tokens, np.ones_like(tokens)))
    first, end = VOCAB.sentinels[0], VOCAB.eos
    assert example.inputs["tokens"].tolist() == [[9, 14, 16, first, end, first, 19, end]]
    assert example.weights["lm"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 0]]
    assert example.inputs["targets"][0, 4:7].tolist() == [first, 19, end]
    places = np.arange(8)
    allowed = (places <= places[:, None]) | ((places < 5) & (places[:, None] < 5))
    np.testing.assert_array_equal(np.asarray(visible(example.inputs["pattern"]))[0], allowed)


@pytest.mark.parametrize("network", [CONFIG.network, DECODER])
def test_no_target_is_seen_before_it_is_said(network):
    """The loss of a target does not change with those behind it; both sides are shown."""
    config = dataclasses.replace(CONFIG, network=network, z_loss=1e-4)
    objective = config.build(VOCAB)
    example = corrupted(config, packed_batch(objective.rows, VOCAB, 40, 2))
    assert set(example.weights) == {"lm", "z_loss"}
    name = "tokens" if network is DECODER else "decoder_tokens"
    place = int(np.flatnonzero(example.weights["lm"][0])[2])

    @jax.jit
    def losses(example: Example):
        snapshot = Snapshot(objective.init(jax.random.key(0)), {}, jnp.int32(0))
        return objective.loss(snapshot, example, jax.random.split(jax.random.key(0), 2)).losses["lm"]

    other = example.inputs[name].copy()
    other[0, place] += 1
    changed = np.asarray(losses(example) != losses(example._replace(inputs=example.inputs | {name: other})))
    assert changed[0, place]
    assert not changed[0, :place].any() and not changed[1].any()

    assert objective.views is not None
    views = objective.views(Snapshot({}, {}, jnp.int32(0)), example)
    assert set(views) == ({"decoder"} if network is DECODER else {"encoder", "decoder"})
    np.testing.assert_array_equal(views["decoder"].targets, example.inputs["targets"])
    np.testing.assert_array_equal(views["decoder"].weights, example.weights["lm"])


# ------------------------------------------------------------------------------------------- refused


def test_settings_that_cannot_be_are_refused():
    cases = [
        ({"denoisers": ()}, "denoisers is empty"),
        ({"denoisers": (Denoiser(rate=0.0),)}, r"rate of a denoiser is a share in \(0, 1\), not 0.0"),
        ({"denoisers": (Denoiser(rate=1.0),)}, "rate of a denoiser"),
        ({"denoisers": (Denoiser(mean=0.5),)}, "mean of a denoiser is 0.5"),
        ({"denoisers": (Denoiser(share=0),)}, "share of a denoiser is 0"),
        ({"denoisers": (Denoiser(mode="R"),)}, r"mode of a denoiser is 'R', which is none of modes=\('NLU', "),
        ({"modes": ("R", "R")}, "names one twice"),
        ({"documents": 0}, "documents is 0"),
        ({"z_loss": -1.0}, "z_loss is a scale and cannot be negative"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **change).build(VOCAB)
    short = dataclasses.replace(CONFIG, network=dataclasses.replace(DECODER, positions="learned", max_length=16))
    with pytest.raises(ValueError, match="rows of 40 tokens, but the learned position table has max_length=16"):
        corrupted(short, packed_batch(short.build(VOCAB).rows, VOCAB, 40, 2))
    with pytest.raises(ValueError, match=r"needs a \[EOS\] token"):
        CONFIG.build(dataclasses.replace(VOCAB, eos=None))


def test_too_few_sentinels_are_refused_with_the_number_that_is_needed():
    """UL2 at 512 tokens: 127 spans (half of the text in spans of three), and three modes."""
    config = dataclasses.replace(CONFIG, denoisers=UL2, documents=1)
    rows = config.build(tiny_vocab(1000, sentinels=100)).rows
    message = r"rows of 512 tokens need 130 sentinel tokens, 127 of them for spans, .* has 100: .*--sentinels 130"
    with pytest.raises(ValueError, match=message):
        rows.tokens(512)
    assert config.build(tiny_vocab(1000, sentinels=130)).rows.tokens(512) == 1004
    assert CONFIG.build(tiny_vocab(1000, sentinels=28)).rows.tokens(512) == 561
    assert dataclasses.replace(CONFIG, documents=1).build(tiny_vocab(1000, sentinels=28)).rows.tokens(512) == 568
    with pytest.raises(ValueError, match="need 29 sentinel tokens"):
        dataclasses.replace(CONFIG, documents=1, roll=True).build(tiny_vocab(1000, sentinels=28)).rows.tokens(512)
    with pytest.raises(ValueError, match="3 modes and at least one span need sentinel tokens"):
        config.build(tiny_vocab(sentinels=3))
    alone = dataclasses.replace(config, denoisers=UL2[1:2])  # 11 spans; all modes are reserved, as beside the others
    assert alone.build(tiny_vocab(1000, sentinels=14)).rows.tokens(512) == 587
    with pytest.raises(ValueError, match="need 14 sentinel tokens"):
        alone.build(tiny_vocab(1000, sentinels=13)).rows.tokens(512)


def test_a_mixture_asks_for_one_denoiser_per_part():
    ul2 = dataclasses.replace(CONFIG, denoisers=UL2)
    with pytest.raises(ValueError, match=r"the rows of 'ul2' are of several lengths.*one denoiser per part"):
        Mixture((Portion("ul2", ul2),), rows="ul2").build(VOCAB)
