"""BART's noise: recorded rows of fairseq, golden spans, the laws of what is drawn, and what must never happen."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxpt.corruption.denoise import (
    EACH,
    NOTHING,
    ONE,
    Infilling,
    Insertions,
    Layout,
    draw_infilling,
    draw_insertions,
    draw_turns,
    infill,
    insert,
    lay_documents,
    poisson_law,
    turn,
)

CASES = {name: array.astype(np.int32) for name, array in np.load(Path(__file__).parent / "bart_denoising.npz").items()}
BOS, PAD, EOS, STOP, MASK = 0, 1, 2, 4, 999
IDS = np.arange(10, 900)

# --------------------------------------------------------------------------------------- the reference


def ours(cases: dict[str, np.ndarray], how: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and their lengths, from the recorded decisions."""
    tokens, length = cases["sentences_permuted"], tokens_of(cases)
    width = cases["output"].shape[1]

    def one(tokens_L, starts_L, segment_ids_L, units_L, random_L, ids_L, slots_J, inserted_J, inserts):
        candidates_L = (segment_ids_L > 0) & (tokens_L != BOS) & (tokens_L != EOS)
        inserts_S = jnp.zeros(tokens_L.shape[0] + 1, jnp.int32).at[1].set(inserts)
        spans = Infilling(units_L, random_L, ids_L, inserts_S)
        tokens_L, kept_L = infill(tokens_L, starts_L, candidates_L, segment_ids_L, spans, how, MASK)
        layout, inserts_S = lay_documents(candidates_L, segment_ids_L, kept_L, inserts_S, width)
        return insert(tokens_L, kept_L, layout, Insertions(slots_J, inserted_J), PAD), jnp.sum(layout.segment_ids > 0)

    slots = np.zeros((len(tokens), width), bool)
    inserted = np.full((len(tokens), width), MASK)
    for row, places in enumerate(cases["insert_positions"]):
        slots[row, places[places >= 0]] = True
        random = places[: cases["num_random_inserts"][row]]
        inserted[row, random] = cases["insert_tokens"][row, : len(random)]
    made = jax.vmap(one)(
        tokens, cases["unit_start"] > 0, (np.arange(96) < length[:, None]).astype(np.int32),
        cases["span_units"] * cases["span_start"], cases["replace_randomly"] > 0, cases["random_token"], slots,
        inserted, slots.sum(1),
    )  # fmt: skip
    return np.asarray(made[0]), np.asarray(made[1])


def tokens_of(cases: dict[str, np.ndarray]) -> np.ndarray:
    return cases["length"]


def chosen(rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: array[rows] for name, array in CASES.items()}


@pytest.mark.parametrize("how", [EACH, NOTHING, ONE])
def test_recorded_rows_of_fairseq(how: int):
    cases = chosen((CASES["replace_length"] == how) & (CASES["output"][:, 0] != -7))
    assert len(cases["length"]) >= 14
    rows, lengths = ours(cases, how)
    np.testing.assert_array_equal(rows, np.where(cases["output"] < 0, PAD, cases["output"]))
    np.testing.assert_array_equal(lengths, cases["output_length"])


def test_recorded_edges_are_there():
    cases = chosen(CASES["output"][:, 0] != -7)
    assert len(cases["length"]) >= 64
    units = np.cumsum(cases["unit_start"], 1)
    spans = [list(zip(np.flatnonzero(s), u[s > 0], w[s > 0], strict=True)) for s, u, w in
             zip(cases["span_start"], cases["span_units"], units, strict=True)]  # fmt: skip
    ends = [[(first, first + size - 1) for _, size, first in row] for row in spans]
    edges = {
        "insertions": cases["num_inserts"] > 0,
        "random insertions": cases["num_random_inserts"] > 0,
        "longer than before": cases["output_length"] > cases["length"],
        "random tokens": (cases["replace_randomly"] * cases["span_start"]).any(1),
        "units of several tokens": (cases["unit_start"].sum(1) < cases["length"] - 2),
        "covered starts": [any(b[0] <= a[1] for a, b in pairwise(row)) for row in ends],
        "touching spans": [any(b[0] == a[1] + 1 for a, b in pairwise(row)) for row in ends],
        "spans past the end": [any(last > w.max() for _, last in row) for row, w in zip(ends, units, strict=True)],
    }
    few = {name: int(np.sum(rows)) for name, rows in edges.items() if np.sum(rows) < 8}
    assert not few


# --------------------------------------------------------------------------------------- golden values


@pytest.mark.parametrize(
    "spans, how, want",
    [
        ({2: 2}, ONE, [0, 11, 999, 15, 16, 17, 18, 2]),
        ({1: 1, 5: 1}, ONE, [0, 999, 12, 13, 14, 999, 18, 2]),
        ({1: 2, 2: 1}, ONE, [0, 999, 14, 15, 16, 17, 18, 2]),  # a start that another span covers
        ({2: 1, 4: 1}, ONE, [0, 11, 999, 999, 15, 16, 17, 18, 2]),  # spans that touch
        ({8: 5}, ONE, [0, 11, 12, 13, 14, 15, 16, 17, 999, 2]),  # stopped by the end
        ({2: 2}, NOTHING, [0, 11, 15, 16, 17, 18, 2]),
        ({2: 2}, EACH, [0, 11, 999, 999, 999, 15, 16, 17, 18, 2]),
    ],
)
def test_golden_spans(spans: dict[int, int], how: int, want: list[int]):
    tokens = jnp.array([0, *range(11, 19), 2])
    starts = jnp.isin(jnp.arange(10), jnp.array([1, 2, 4, 5, 8]))
    units = jnp.zeros(10, jnp.int32).at[jnp.array(list(spans))].set(jnp.array(list(spans.values())))
    decisions = Infilling(units, units < 0, units, units)
    inside = (jnp.arange(10) > 0) & (jnp.arange(10) < 9)
    written, kept = infill(tokens, starts, inside, jnp.ones(10, jnp.int32), decisions, how, MASK)
    assert np.asarray(written)[np.asarray(kept)].tolist() == want


def test_a_covered_start_is_no_span_of_its_own():
    """With a mask for each token: one coin, that of the span which began first, for all that both of them hide."""
    ones, units = jnp.ones(8, jnp.int32), jnp.zeros(8, jnp.int32).at[1].set(3).at[3].set(3)
    for first, want in ((False, [0, 99, 99, 99, 99, 99, 6, 7]), (True, [0, 11, 12, 13, 14, 15, 6, 7])):
        random = jnp.zeros(8, bool).at[1].set(first).at[3].set(not first)
        spans = Infilling(units, random, jnp.arange(10, 18), units * 0)
        written, _ = infill(jnp.arange(8), ones > 0, ones > 0, ones, spans, EACH, 99)
        assert written.tolist() == want


def test_spans_stop_at_other_documents_and_special_tokens():
    tokens = jnp.array([10, 11, 12, 20, 21, 5, 22, 0])  # no end between the documents, [SEP] inside the second
    segments = jnp.array([1, 1, 1, 2, 2, 2, 2, 0])
    units = jnp.array([0, 9, 0, 0, 9, 0, 0, 0])
    decisions = Infilling(units, units < 0, units, units)
    candidates = (segments > 0) & (tokens != 5)
    written, kept = infill(tokens, candidates, candidates, segments, decisions, ONE, MASK)
    assert np.asarray(written)[np.asarray(kept)].tolist() == [10, MASK, 20, MASK, 5, 22]


# --------------------------------------------------------------------------------------- laws


def many(rows: int, tokens: int, rate: float, mean: float) -> tuple[np.ndarray, ...]:
    """Of documents of so many tokens between BOS and EOS: spans, insertions, the new length, and its masks."""
    law = poisson_law(mean) if mean else None
    segments = jnp.ones(tokens + 2, jnp.int32)
    inside = jnp.zeros(tokens + 2, bool).at[1:-1].set(True)

    def one(key):
        spans = draw_infilling(key, inside, segments, rate, law, 0.1, IDS)
        _, kept = infill(segments, inside, inside, segments, spans, ONE, MASK)
        inserts = spans.inserts[1]
        return spans.units, inserts, jnp.sum(kept) + inserts, jnp.sum(kept & (spans.units > 0)) + inserts

    made = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), rows))
    return tuple(np.asarray(x) for x in made)


def test_the_poisson_law():
    for mean, nothing, values in ((3.5, 0.0302, 19), (3.0, 0.0498, 18)):
        law = poisson_law(mean)
        assert len(law) == values and law[-1] < 1e-7 <= law[-2]
        assert round(float(law[0]), 4) == nothing
        assert law @ np.arange(len(law)) == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("mean, left, masks", [(3.5, 412.2, 36.2), (3.0, 418.0, 42.3)])
def test_what_is_left_of_512_tokens(mean: float, left: float, masks: float):
    """The figures of fairseq's own code at 512 tokens, of which BOS and EOS are no units."""
    rows = 400
    units, inserts, lengths, written = many(rows, 510, 0.3, mean)
    assert np.all(units.sum(1) == 153)  # ceil(0.3 * 510), before overlaps
    error = lengths.std() / np.sqrt(rows)
    assert lengths.mean() == pytest.approx(left, abs=4 * error + 0.2)
    drawn = np.bincount(units[units > 0], minlength=25)[1:19] / (units > 0).sum()
    law = np.pad(poisson_law(mean), (0, 9))[1:19] / (1 - poisson_law(mean)[0])
    cut = rows / (units > 0).sum()  # the last span of each row is cut to the budget
    assert np.all(np.abs(drawn - law) < 4 * np.sqrt(law / (units > 0).sum()) + 0.3 * cut)
    # the drawn lengths of 0, beside all spans that were drawn
    share = inserts.sum() / (inserts.sum() + (units > 0).sum())
    assert share == pytest.approx(poisson_law(mean)[0], abs=4 * np.sqrt(0.05 / (units > 0).sum()) + 0.002)
    assert written.mean() == pytest.approx(masks, abs=4 * written.std() / np.sqrt(rows) + 0.2)


def test_every_start_is_as_likely():
    units, *_ = many(4000, 20, 0.25, 0.0)
    starts = (units > 0)[:, 1:-1].mean(0)
    np.testing.assert_allclose(starts, 0.25, atol=4 * np.sqrt(0.25 * 0.75 / 4000))
    assert np.all((units > 0).sum(1) == 5)
    assert not units[:, [0, -1]].any()


def test_small_documents_fill_their_budget():
    for tokens in (1, 2, 3):
        units, inserts, *_ = many(300, tokens, 0.9, 3.5)
        budget = int(np.ceil(0.9 * tokens))
        assert np.all(units.sum(1) == budget)
        assert np.all((units > 0).sum(1) + inserts <= tokens)


def test_rate_0_hides_nothing_and_rate_1_of_tokens_everything():
    units, inserts, lengths, _ = many(8, 12, 0.0, 3.5)
    assert not units.any() and not inserts.any() and np.all(lengths == 14)
    units, inserts, lengths, _ = many(8, 12, 1.0, 0.0)
    assert np.all(units[:, 1:-1] == 1) and not inserts.any() and np.all(lengths == 14)


# --------------------------------------------------------------------------------------- insertions and turns


def test_insertions_stand_anywhere_between_the_ends():
    layout = Layout(jnp.ones(8, jnp.int32), jnp.arange(8), jnp.array([0, 1]), jnp.array([0, 6]))
    inserts = jnp.array([0, 2])
    draw = jax.jit(jax.vmap(lambda key: draw_insertions(key, layout, inserts, 0.25, IDS, MASK)))
    made = draw(jax.random.split(jax.random.key(1), 4000))
    slots = np.asarray(made.slots)
    assert np.all(slots.sum(1) == 2) and not slots[:, [0, 7]].any()
    np.testing.assert_allclose(slots[:, 1:7].mean(0), 2 / 6, atol=4 * np.sqrt(2 / 9 / 4000))
    random = np.mean(np.asarray(made.tokens)[slots] != MASK)
    assert random == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 8000))


def test_insertions_that_have_no_room_are_left_out_and_ends_are_not():
    segments = jnp.array([1, 1, 1, 2, 2, 2])
    tokens = jnp.array([7, 8, EOS, 7, 8, EOS])
    candidates = tokens != EOS
    layout, inserts = lay_documents(candidates, segments, segments > 0, jnp.array([0, 2, 2, 0, 0, 0, 0]), 9)
    assert inserts.tolist()[:3] == [0, 2, 1]
    made = draw_insertions(jax.random.key(0), layout, inserts, 0.0, IDS, MASK)
    row = insert(tokens, segments > 0, layout, made, PAD)
    assert int(jnp.sum(row == EOS)) == 2 and int(jnp.sum(row == MASK)) == 3 and row[-1] == EOS


def test_turns_are_uniform_and_keep_the_ends():
    layout = Layout(jnp.ones(6, jnp.int32), jnp.arange(6), jnp.array([0, 1]), jnp.array([0, 4]))
    keys = jax.random.split(jax.random.key(2), 4000)
    turns = np.asarray(jax.vmap(lambda key: draw_turns(key, layout, 1.0))(keys))[:, 1]
    np.testing.assert_allclose(np.bincount(turns, minlength=4) / 4000, 0.25, atol=4 * np.sqrt(3 / 16 / 4000))
    tokens = jnp.array([BOS, 11, 12, 13, 14, EOS])
    rows = [turn(tokens, layout, jnp.array([0, n])).tolist() for n in range(4)]
    assert (
        rows[0] == tokens.tolist() and rows[1] == [BOS, 12, 13, 14, 11, EOS] and rows[3] == [BOS, 14, 11, 12, 13, EOS]
    )
    some = np.asarray(jax.vmap(lambda key: draw_turns(key, layout, 0.4))(keys))[:, 1]
    assert np.mean(some > 0) == pytest.approx(0.4 * 0.75, abs=4 * np.sqrt(0.21 / 4000))


# --------------------------------------------------------------------------------------- invariants

LENGTH = 40


@jax.jit
def noisy(key, sizes_S, special_first, how, rate, extra):
    """A row of documents, each with EOS and perhaps BOS: tokens, what is left of them, and the new row of each form."""
    ids = jnp.repeat(jnp.arange(1, 5), sizes_S, total_repeat_length=LENGTH)
    segments = jnp.where(jnp.arange(LENGTH) < jnp.sum(sizes_S), ids, 0)
    first = jnp.concatenate([jnp.ones(1, bool), segments[1:] != segments[:-1]])
    last = jnp.roll(first, -1).at[-1].set(True)
    tokens = jnp.where(last, EOS, jnp.where(first & special_first, BOS, 100 + jnp.arange(LENGTH)))
    tokens = jnp.where(segments > 0, tokens, PAD)
    candidates = (segments > 0) & (tokens > 99)
    first_key, second_key, third_key = jax.random.split(key, 3)
    spans = draw_infilling(first_key, candidates, segments, rate, poisson_law(2.0), 0.3, IDS)
    spans = spans._replace(inserts=spans.inserts + extra * (jnp.arange(LENGTH + 1) < 5) * (jnp.arange(LENGTH + 1) > 0))
    rows = []
    for each in (EACH, NOTHING, ONE):
        written, kept = infill(tokens, candidates, candidates, segments, spans, each, MASK)
        layout, inserts = lay_documents(candidates, segments, kept, spans.inserts, LENGTH + 2)
        made = draw_insertions(second_key, layout, inserts, 0.3, IDS, MASK)
        row = insert(written, kept, layout, made, PAD)
        rows.append((turn(row, layout, draw_turns(third_key, layout, 0.5)), layout.segment_ids))
    return tokens, segments, rows


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31 - 1),
    st.lists(st.integers(0, 10), min_size=4, max_size=4),
    st.booleans(),
    st.floats(0, 1),
    st.integers(0, 3),
)
def test_ends_are_never_lost(seed: int, sizes: list[int], special_first: bool, rate: float, extra: int):
    arguments = jnp.array(sizes), special_first, 0, jnp.float32(0.3), extra
    tokens, segments, rows = jax.device_get(noisy(jax.random.key(seed), *arguments))
    for row, ids in rows:
        for document in range(1, 5):
            before, after = tokens[segments == document], row[ids == document]
            if not len(before):
                continue
            assert after[-1] == EOS and np.sum(after == EOS) == 1
            assert np.sum(before == BOS) == np.sum(after == BOS)
            kept = set(after[(after >= 100) & (after < 100 + LENGTH)]) - set(IDS)
            assert kept <= set(before)
            if np.sum(before == BOS):
                assert after[0] == BOS
        assert np.all(row[ids == 0] == PAD)
