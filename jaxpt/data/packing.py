"""Packing: how the documents of a block become rows of fixed length, from their lengths alone.

A plan cuts documents into pieces and gives each piece a row. It is a pure function of the lengths and of the order
of the documents, loses no token, and makes a number of rows that depends on the lengths only, never on the order:
so the rows of a data set can be counted without being built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_args

import numpy as np

from jaxpt.types import Packing


class Plan(NamedTuple):
    """The pieces of all rows of a block, row by row, each row filled from its first column.

    P is the number of pieces. A plan takes about ten bytes per piece, since some of them wait in memory.
    """

    row_starts: np.ndarray  # [rows + 1] i32: the pieces of row r are row_starts[r] : row_starts[r + 1]
    documents: np.ndarray  # [P] u16 or i32: index in the block
    starts: np.ndarray  # [P] u32: where the piece starts in its document
    lengths: np.ndarray  # [P] i32: tokens of the piece

    @property
    def rows(self) -> int:
        """How many rows the plan makes."""
        return len(self.row_starts) - 1


def make_plan(packing: Packing, lengths_N: np.ndarray, length: int, order_N: np.ndarray | None = None) -> Plan:
    """Pack documents into rows.

    - "concatenate": one stream of documents, cut every `length` tokens; only the last row of a block has padding.
    - "stream": the same; its rows are read in their order.
    - "best_fit": documents are cut into pieces of at most `length`, and the pieces packed by best-fit decreasing
      (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"); a document that fits is never cut.
    - "one_document": every row holds one document, or one piece of a document longer than a row.

    Args:
      packing: the kind of plan.
      lengths_N: [N] tokens per document; a document of 0 tokens makes no piece.
      length: tokens per row.
      order_N: [N] a permutation of the documents; None for their own order.

    Raises:
      ValueError: `length` is not positive, or the packing is unknown.

    >>> plan = make_plan("concatenate", np.array([5, 3]), 4)
    >>> plan.row_starts.tolist(), plan.documents.tolist(), plan.starts.tolist(), plan.lengths.tolist()
    ([0, 1, 3], [0, 0, 1], [0, 4, 0], [4, 1, 3])
    """
    _check(packing, length)
    lengths_N = np.asarray(lengths_N, np.int64)
    documents = np.arange(len(lengths_N)) if order_N is None else order_N
    documents = documents[lengths_N[documents] > 0]
    lengths = lengths_N[documents]
    if packing in ("concatenate", "stream"):
        ends = np.cumsum(lengths)
        first_row = (ends - lengths) // length
        index, part = _ragged((ends - 1) // length - first_row + 1)
        rows = first_row[index] + part
        begins = np.maximum(ends[index] - lengths[index], rows * length)
        sizes = np.minimum(ends[index], (rows + 1) * length) - begins
        starts = begins - (ends - lengths)[index]
    else:
        index, part = _ragged(-(-lengths // length))
        starts = part * length
        sizes = np.minimum(lengths[index] - starts, length)
        rows = np.arange(len(index))
        if packing == "best_fit":
            rows = _best_fit_decreasing(sizes, length)
            by_row = np.argsort(rows, kind="stable")
            rows, index, starts, sizes = rows[by_row], index[by_row], starts[by_row], sizes[by_row]
    count = int(rows[-1]) + 1 if len(rows) else 0
    row_starts = np.searchsorted(rows, np.arange(count + 1)).astype(np.int32)
    small = np.uint16 if len(lengths_N) <= 1 << 16 else np.int32
    return Plan(row_starts, documents[index].astype(small), starts.astype(np.uint32), sizes.astype(np.int32))


def count_rows(packing: Packing, lengths_N: np.ndarray, length: int) -> int:
    """How many rows `make_plan` makes of these documents, in whatever order they come.

    >>> [count_rows(packing, np.array([5, 3, 2]), 4) for packing in ("concatenate", "best_fit", "one_document")]
    [3, 3, 4]
    """
    _check(packing, length)
    lengths_N = np.asarray(lengths_N, np.int64)
    if packing in ("concatenate", "stream"):
        return -(-int(lengths_N.sum()) // length)
    if packing == "one_document":
        return int((-(-lengths_N // length)).sum())
    whole = int((lengths_N // length).sum())  # pieces that fill a row
    rest = lengths_N % length
    return whole + int(_best_fit_decreasing(rest[rest > 0], length).max(initial=-1)) + 1


def fill_rows(
    rows: int,
    length: int,
    pad: int,
    row_P: np.ndarray,
    pieces: Sequence[tuple[np.ndarray, ...]],
    extras: Sequence[str] = (),
) -> tuple[np.ndarray, ...]:
    """Write pieces into rows of padding.

    Args:
      rows: number of rows R.
      length: tokens per row L.
      pad: token id of the padding.
      row_P: [P] row of each piece; the pieces of a row follow each other, in the order of their columns.
      pieces: P times (tokens, sentence ids, extras...), each [tokens of the piece].
      extras: the dtypes of the extras that a piece has.

    Returns:
      tokens, segment ids (1, 2, ... per row, 0 = padding), positions and sentence ids (both restart at 0 in each
      piece), each [R, L] int32; and the extras, [R, L] of their dtype, 1 (True) at padding.

    >>> piece = lambda *tokens: (np.array(tokens), np.zeros(len(tokens), int))
    >>> tokens, segments, positions, *_ = fill_rows(2, 4, 0, np.array([0, 0]), [piece(7, 8), piece(9)])
    >>> tokens.tolist(), segments[0].tolist(), positions[0].tolist()
    ([[7, 8, 9, 0], [0, 0, 0, 0]], [1, 1, 2, 0], [0, 1, 0, 0])
    """
    arrays = np.zeros((4, rows * length), np.int32)
    arrays[0] = pad
    values = [np.ones(rows * length, dtype) for dtype in extras]
    if pieces:
        tokens, sentences, *given = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        sizes = np.array([len(piece[0]) for piece in pieces])
        ends = np.cumsum(sizes)
        begins = ends - sizes
        first_of_row = np.searchsorted(row_P, row_P)  # the first piece of the same row
        piece, position = _ragged(sizes)
        columns = begins - begins[first_of_row]
        assert np.all(columns + sizes <= length), "the pieces of a row fit into it"
        slots = (row_P * length + columns)[piece] + position
        arrays[0, slots] = tokens
        arrays[1, slots] = (np.arange(len(pieces)) - first_of_row + 1)[piece]
        arrays[2, slots] = position
        arrays[3, slots] = sentences - sentences[begins][piece]
        for value, found in zip(values, given, strict=True):
            value[slots] = found
    return *arrays.reshape(4, rows, length), *(value.reshape(rows, length) for value in values)


def cut_piece(
    document: tuple[np.ndarray, ...], start: int, size: int, prefix: np.ndarray, suffix: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Tokens, sentence ids and extras of `size` tokens from `start` of prefix + document + suffix.

    The prefix belongs to the first sentence and the suffix to the last; the extras of both are 1 (True).

    >>> document = np.array([5, 6, 7]), np.array([0, 0, 1])
    >>> [a.tolist() for a in cut_piece(document, 2, 3, np.array([1]), np.array([2]))]
    [[6, 7, 2], [0, 1, 1]]
    """
    tokens, sentence_ids, *extras = document
    begin, end = start - len(prefix), start - len(prefix) + size
    if begin >= 0 and end <= len(tokens):
        return tuple(array[begin:end] for array in document)
    before, after = prefix[start : start + size], suffix[max(begin - len(tokens), 0) : max(end - len(tokens), 0)]
    inside = slice(max(begin, 0), max(end, 0))
    return (
        np.concatenate([before, tokens[inside], after]),
        np.concatenate([np.zeros(len(before), int), sentence_ids[inside], np.full(len(after), sentence_ids[-1])]),
        *(np.concatenate([np.ones(len(before), x.dtype), x[inside], np.ones(len(after), x.dtype)]) for x in extras),
    )


def _best_fit_decreasing(sizes_P: np.ndarray, length: int) -> np.ndarray:
    """The row of each piece; rows are numbered by their first piece.

    Longest pieces first, each into the fullest row that has room. Pieces of one size, and rows with the same room,
    are handled together, so that the Python loop runs a few times per distinct size, not once per piece.
    """
    rows_P = np.zeros(len(sizes_P), np.int64)
    if not len(sizes_P):
        return rows_P
    by_size = np.argsort(-sizes_P, kind="stable")
    edges = np.flatnonzero(np.diff(sizes_P[by_size])) + 1
    room_of: dict[int, list[np.ndarray]] = {}  # room -> the rows that have it
    has_room = np.zeros(length + 1, bool)
    made = 0

    def put(room: int, rows: np.ndarray) -> None:
        if room and len(rows):
            room_of.setdefault(room, []).append(rows)
            has_room[room] = True

    for items in np.split(by_size, edges):
        size = int(sizes_P[items[0]])
        while len(items):
            room = size + int(has_room[size:].argmax())
            if has_room[room]:
                rows = np.concatenate(room_of.pop(room))
                has_room[room] = False
            else:
                room = length
                rows = made + np.arange(-(-len(items) // (room // size)))
                made += len(rows)
            fit = room // size
            used = min(len(rows), -(-len(items) // fit))
            taken, items = items[: used * fit], items[used * fit :]
            rows_P[taken] = np.repeat(rows[:used], fit)[: len(taken)]
            in_last = len(taken) - (used - 1) * fit
            put(room - fit * size, rows[: used - 1])
            put(room - in_last * size, rows[used - 1 : used])
            put(room, rows[used:])
    _, first, row = np.unique(rows_P, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[row]


def _ragged(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts [2, 3]: owners [0, 0, 1, 1, 1] and places [0, 1, 0, 1, 2]."""
    owners = np.repeat(np.arange(len(counts)), counts)
    return owners, np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]


def _check(packing: Packing, length: int) -> None:
    if packing not in get_args(Packing):
        raise ValueError(f"unknown packing {packing!r}: choose one of {', '.join(get_args(Packing))}")
    if length <= 0:
        raise ValueError(f"a row of {length} tokens holds nothing: raise the sequence length")
