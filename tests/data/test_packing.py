"""Packing plans: literal tables, an independent best-fit, and properties over random documents."""

from __future__ import annotations

import bisect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpt.data.packing import Plan, count_rows, cut_piece, fill_rows, make_plan

PACKINGS = ("concatenate", "best_fit", "one_document")
lengths_of = st.lists(st.integers(0, 40), max_size=60)


def rows_of(plan: Plan) -> list[list[tuple[int, int, int]]]:
    pieces = list(zip(plan.documents.tolist(), plan.starts.tolist(), plan.lengths.tolist(), strict=True))
    return [pieces[a:b] for a, b in zip(plan.row_starts[:-1], plan.row_starts[1:], strict=True)]


@pytest.mark.parametrize(
    ("packing", "rows"),
    [
        # pieces are (document, start, tokens); documents have 5, 3, 9, 1 and 4 tokens, rows 4
        (
            "concatenate",
            [
                [(0, 0, 4)],
                [(0, 4, 1), (1, 0, 3)],
                [(2, 0, 4)],
                [(2, 4, 4)],
                [(2, 8, 1), (3, 0, 1), (4, 0, 2)],
                [(4, 2, 2)],
            ],
        ),
        (
            "best_fit",
            [[(0, 0, 4)], [(0, 4, 1), (1, 0, 3)], [(2, 0, 4)], [(2, 4, 4)], [(2, 8, 1), (3, 0, 1)], [(4, 0, 4)]],
        ),
        (
            "one_document",
            [[(0, 0, 4)], [(0, 4, 1)], [(1, 0, 3)], [(2, 0, 4)], [(2, 4, 4)], [(2, 8, 1)], [(3, 0, 1)], [(4, 0, 4)]],
        ),
    ],
)
def test_plans_by_hand(packing, rows):
    plan = make_plan(packing, np.array([5, 3, 9, 1, 4]), 4)
    assert rows_of(plan) == rows
    assert plan.rows == count_rows(packing, np.array([5, 3, 9, 1, 4]), 4) == len(rows)


def test_the_order_is_the_order_of_the_documents():
    plan = make_plan("concatenate", np.array([2, 1, 3]), 3, np.array([2, 0, 1]))
    assert rows_of(plan) == [[(2, 0, 3)], [(0, 0, 2), (1, 0, 1)]]
    plan = make_plan("best_fit", np.array([2, 1, 3]), 3, np.array([1, 2, 0]))
    assert rows_of(plan) == [[(1, 0, 1), (0, 0, 2)], [(2, 0, 3)]]


@pytest.mark.parametrize("packing", PACKINGS)
def test_corners(packing):
    assert make_plan(packing, np.array([], int), 4).rows == count_rows(packing, np.array([], int), 4) == 0
    assert make_plan(packing, np.array([0, 0]), 4).rows == count_rows(packing, np.array([0, 0]), 4) == 0
    assert rows_of(make_plan(packing, np.array([0, 4, 0]), 4)) == [[(1, 0, 4)]]  # exactly a row
    assert rows_of(make_plan(packing, np.array([2]), 1)) == [[(0, 0, 1)], [(0, 1, 1)]]  # rows of one token
    with pytest.raises(ValueError, match="a row of 0 tokens"):
        make_plan(packing, np.array([1]), 0)
    with pytest.raises(ValueError, match="choose one of concatenate, best_fit, one_document"):
        count_rows("dense", np.array([1]), 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", PACKINGS)
@settings(max_examples=60, deadline=None)
@given(lengths=lengths_of, length=st.integers(1, 16), seed=st.integers(0, 9))
def test_every_token_once_and_rows_fit(packing, lengths, length, seed):
    lengths = np.array(lengths, int)
    plan = make_plan(packing, lengths, length, np.random.default_rng(seed).permutation(len(lengths)))
    served = [(d, i) for row in rows_of(plan) for d, start, size in row for i in range(start, start + size)]
    assert sorted(served) == [(d, i) for d, n in enumerate(lengths) for i in range(n)]
    fills = [sum(size for _, _, size in row) for row in rows_of(plan)]
    assert all(0 < fill <= length for fill in fills) and np.all(plan.lengths > 0)
    assert plan.rows == count_rows(packing, lengths, length)  # whatever the order
    if packing == "concatenate":
        assert all(fill == length for fill in fills[:-1])
    if packing == "one_document":
        assert all(len(row) == 1 for row in rows_of(plan))
    if packing == "best_fit":
        assert all(size == lengths[d] for row in rows_of(plan) for d, _, size in row if lengths[d] <= length)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=80), length=st.integers(24, 30))
def test_best_fit_makes_as_many_rows_as_the_textbook(lengths, length):
    room: list[int] = []  # sorted; one piece at a time, each into the fullest row with room for it
    for size in sorted(lengths, reverse=True):
        at = bisect.bisect_left(room, size)
        bisect.insort(room, (room.pop(at) if at < len(room) else length) - size)
    plan = make_plan("best_fit", np.array(lengths), length)
    left = sorted(length - sum(size for _, _, size in row) for row in rows_of(plan))
    assert left == room


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_best_fit_rows_come_in_the_order_of_the_documents(lengths):
    firsts = [min(document for document, _, _ in row) for row in rows_of(make_plan("best_fit", np.array(lengths), 9))]
    assert firsts == sorted(firsts)


def test_rows_by_hand():
    long, short = (np.array([5, 6, 7]), np.array([3, 3, 4])), (np.array([8]), np.array([9]))
    tokens, segments, positions, sentences = fill_rows(3, 5, 1, np.array([0, 0, 2]), [long, short, short])
    assert tokens.tolist() == [[5, 6, 7, 8, 1], [1] * 5, [8, 1, 1, 1, 1]]
    assert segments.tolist() == [[1, 1, 1, 2, 0], [0] * 5, [1, 0, 0, 0, 0]]
    assert positions.tolist() == [[0, 1, 2, 0, 0], [0] * 5, [0] * 5]
    assert sentences.tolist() == [[0, 0, 1, 0, 0], [0] * 5, [0] * 5]
    assert {array.dtype for array in (tokens, segments, positions, sentences)} == {np.dtype(np.int32)}
    assert fill_rows(1, 2, 7, np.array([], int), [])[0].tolist() == [[7, 7]]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 6), before=st.integers(0, 3), after=st.integers(0, 3), data=st.data())
def test_a_piece_is_a_slice_of_the_whole(n, before, after, data):
    document = np.arange(10, 10 + n), np.arange(n) // 2
    prefix, suffix = np.arange(100, 100 + before), np.arange(200, 200 + after)
    tokens = [*prefix.tolist(), *document[0].tolist(), *suffix.tolist()]
    sentences = [0] * before + document[1].tolist() + [(n - 1) // 2] * after
    start = data.draw(st.integers(0, len(tokens) - 1))
    size = data.draw(st.integers(1, len(tokens) - start))
    piece = cut_piece(document, start, size, prefix, suffix)
    assert [part.tolist() for part in piece] == [tokens[start : start + size], sentences[start : start + size]]
