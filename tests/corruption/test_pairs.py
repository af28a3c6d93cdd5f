"""Pairs of texts: the closed form of truncation, the layout, and what the draws may and may not do."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpt.corruption.pairs import Text, assemble, draw_pairs, heads_of, shortened

M, P = 40, 2
CLS, SEP, PAD = 1, 2, 0
ROWS = 4000


def bert_loop(first: int, second: int, room: int) -> tuple[int, int]:
    """BERT's loop: one token off the longer text, or off B."""
    while first + second > room:
        if first > second:
            first -= 1
        else:
            second -= 1
    return first, second


def test_truncation_is_that_of_the_loop():
    cases = [(a, b, m) for a in range(14) for b in range(14) for m in range(1, 17)]
    got = np.stack(shortened(*(jnp.array(column) for column in zip(*cases, strict=True))), 1)
    assert got.tolist() == [list(bert_loop(*case)) for case in cases]


def test_coins_are_counted():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 3, np.uint64).astype(np.uint32)
    flat = np.unpackbits(bits.view(np.uint8), bitorder="little")
    want = [int(flat[:n].sum()) for n in range(97)]
    assert [int(heads_of(jnp.array(bits), jnp.int32(n))) for n in range(97)] == want


def text(sizes: list[list[int]], first: int) -> dict[str, np.ndarray]:
    """A row of documents given as sizes of their sentences; tokens count on from `first`."""
    arrays = {name: np.zeros(M, np.int32) for name in ("tokens", "segment_ids", "sentence_ids", "document_ids")}
    at = 0
    for document, sentences in enumerate(sizes):
        for sentence, size in enumerate(sentences):
            arrays["segment_ids"][at : at + size] = document + 1
            arrays["sentence_ids"][at : at + size] = sentence
            arrays["document_ids"][at : at + size] = first + document
            at += size
    arrays["tokens"][:at] = np.arange(first, first + at)
    return arrays


ROW = text([[5, 1, 7, 4], [3, 9]], first=100)
SINGLE = text([[6], [2]], first=200)
BESIDE = text([[2, 2, 2], [10, 8]], first=500)
EMPTY = text([], first=900)


@functools.cache
def drawn(name: str, beside: str | None, short: float = 0.0, negative: float = 0.5) -> tuple[Any, Any]:
    """Pairs and assembled rows of many keys."""
    texts = {"row": ROW, "single": SINGLE, "beside": BESIDE, "empty": EMPTY}
    row, other = Text(**texts[name]), None if beside is None else Text(**texts[beside])

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, None))
    def run(key: jax.Array, row: Text, other: Text | None):
        pairs = draw_pairs(key, row, other, P, negative, short)
        second = row.tokens if other is None else other.tokens
        return pairs, assemble(pairs, row.tokens, second, M + 3 * P, CLS, SEP, PAD)

    return jax.device_get(run(jax.random.split(jax.random.key(3), ROWS), row, other))


def sides(assembled: Any, row: int, pair: int) -> tuple[list[int], list[int]]:
    """The two texts of a pair, read from the assembled row, whose form is checked."""
    inside = assembled.segment_ids[row] == pair + 1
    tokens, types = assembled.tokens[row][inside].tolist(), assembled.sides[row][inside].tolist()
    assert assembled.positions[row][inside].tolist() == list(range(len(tokens)))
    assert tokens[0] == CLS and tokens[-1] == SEP and tokens.count(SEP) == 2 and types == sorted(types)
    assert tokens[types.index(1) - 1] == SEP and assembled.tokens[row][assembled.cls[row][pair]] == CLS
    return tokens[1 : types.index(1) - 1], tokens[types.index(1) : -1]


def test_order_pairs_are_the_document_or_the_document_swapped():
    pairs, assembled = drawn("row", None)
    splits = [set(), set()]
    for row in range(300):
        for pair, whole in enumerate((list(range(100, 117)), list(range(117, 129)))):
            first, second = sides(assembled, row, pair)
            if pairs.is_negative[row, pair]:
                first, second = second, first
            assert first + second == whole
            splits[pair].add(len(first))
        end = (assembled.segment_ids[row] > 0).sum()
        assert end == 17 + 12 + 6 and (assembled.tokens[row][end:] == PAD).all()
    assert splits == [{5, 6, 13}, {3}]
    assert pairs.is_known.all()
    assert pairs.is_negative.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(2 * ROWS))


def test_the_cut_is_uniform_over_the_ends_of_sentences():
    pairs, _ = drawn("row", None, negative=0.0)
    share = np.bincount(pairs.first_size[:, 0])[[5, 6, 13]] / ROWS
    np.testing.assert_allclose(share, 1 / 3, atol=4 * np.sqrt(2 / 9 / ROWS))


def test_one_sentence_has_no_order_and_is_followed_by_a_foreign_one():
    pairs, _ = drawn("single", None)
    assert not pairs.is_known.any()
    pairs, assembled = drawn("single", "beside")
    assert pairs.is_negative.all() and pairs.is_known.all()
    first, second = sides(assembled, 0, 0)
    assert first and set(first) <= set(range(200, 206)) and second and min(second) >= 500  # both keep to the room


def test_next_pairs_follow_or_are_foreign():
    pairs, assembled = drawn("row", "beside")
    starts = set()
    for row in range(300):
        (first, second), (other_first, other_second) = sides(assembled, row, 0), sides(assembled, row, 1)
        if pairs.is_negative[row, 0]:
            assert second == list(range(second[0], second[0] + len(second))) and second[0] >= 500
            assert len(first) + len(second) <= 17  # the last document alone has the row's padding
        else:
            assert first + second == list(range(100, 117))
        if pairs.is_negative[row, 1]:
            starts.add(other_second[0])
            assert len(other_first) + len(other_second) <= 12 + M - 29
    assert starts == {500, 502, 504, 506, 516}  # uniform over sentences of both documents, from their first token
    assert pairs.is_known.all()
    assert pairs.is_negative.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(2 * ROWS))


def test_the_same_document_or_none_at_all_is_no_negative():
    for beside in ("row", "empty"):
        pairs, _ = drawn("row", beside)
        foreign = pairs.is_negative[:, 0]
        assert pairs.is_known[~foreign, 0].all()
        if beside == "empty":
            assert not pairs.is_known[foreign, 0].any()
        else:  # documents 100 and 101 stand beside themselves
            same = pairs.second[:, 0] < M + 17
            np.testing.assert_array_equal(pairs.is_known[foreign, 0], ~same[foreign])
            assert same[foreign].any() and (~same[foreign]).any()


def test_tokens_are_taken_from_the_front_by_fair_coins():
    pairs, _ = drawn("single", "beside")
    # document 2 of the row: 2 tokens; its room is 2 + 32; a second text of 18 tokens fits. Document 1: 6 of room 6
    assert (pairs.first_size[:, 0] + pairs.second_size[:, 0] == 6).all()
    cut = (pairs.second[:, 0] >= M + 6) & (pairs.second_size[:, 0] == 3)  # from 10, 18 or 8 tokens to 3
    assert (pairs.first_size[cut, 0] == 3).all()
    removed_front = pairs.first[cut, 0]  # 0 .. 3 of the 3 tokens that A lost
    share = np.bincount(removed_front, minlength=4) / cut.sum()
    np.testing.assert_allclose(share, [1 / 8, 3 / 8, 3 / 8, 1 / 8], atol=4 * 0.5 / np.sqrt(cut.sum()))


def test_short_pairs():
    pairs, _ = drawn("row", None, short=1.0, negative=0.0)
    sizes = pairs.first_size[:, 0] + pairs.second_size[:, 0]
    # whole sentences up to a length uniform on 2 .. 17: ends at 5, 6, 13, 17
    share = np.bincount(sizes, minlength=18)[[5, 6, 13, 17]] / ROWS
    np.testing.assert_allclose(share, np.array([4, 1, 7, 4]) / 16, atol=4 * 0.5 / np.sqrt(ROWS))
    assert not pairs.is_known[sizes == 5, 0].any()  # one sentence


def test_no_document_no_pair():
    for beside in (None, "beside"):
        pairs, assembled = drawn("empty", beside)
        assert not pairs.present.any() and not pairs.is_known.any() and not pairs.is_negative.any()
        assert (assembled.tokens == PAD).all() and (assembled.segment_ids == 0).all() and (assembled.cls == 0).all()
