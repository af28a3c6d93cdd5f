"""Sentences in another order: recorded rows of fairseq, golden values, and the law of the order."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from jaxpt.corruption.sentences import draw_places, number_sentences, reorder

CASES = {name: array.astype(np.int32) for name, array in np.load(Path(__file__).parent / "bart_denoising.npz").items()}
STOP, PAD = 4, 1


def places_of(tokens: list[int], order: list[int], width: int) -> np.ndarray:
    """fairseq's rule: a full stop behind another token ends a sentence, and the last place of the text always does."""
    stops = np.array(tokens) == STOP
    stops[-2] = True
    ends = np.flatnonzero(stops[1:] & ~stops[:-1]) + 1
    assert len(ends) == len(order)
    places = np.full(width, width)  # the last token, and what follows the last boundary, stay behind
    places[0] = -1
    for sentence, (begin, end) in enumerate(zip([1, *(ends[:-1] + 1)], ends + 1, strict=True)):
        places[begin:end] = order.index(sentence)
    return places


def test_recorded_rows_of_fairseq():
    width = CASES["tokens"].shape[1]
    counts, lengths = CASES["num_sentences"], CASES["length"]
    orders = [order[:count].tolist() for order, count in zip(CASES["sentence_order"], counts, strict=True)]
    texts = [row[:length].tolist() for row, length in zip(CASES["tokens"], lengths, strict=True)]
    places = np.stack([places_of(text, order, width) for text, order in zip(texts, orders, strict=True)])
    segments = (np.arange(width) < lengths[:, None]).astype(np.int32)
    taken = np.asarray(jax.vmap(reorder)(segments, places))
    ours = np.take_along_axis(np.where(segments > 0, CASES["tokens"], PAD), taken, axis=1)
    np.testing.assert_array_equal(ours, np.where(CASES["sentences_permuted"] < 0, PAD, CASES["sentences_permuted"]))
    kinds = {
        "all": len(texts),
        "two stops at the end": sum(text[-3:-1] == [STOP, STOP] for text in texts),
        "a last sentence of one token": sum(text[-3] == STOP and text[-2] != STOP for text in texts),
        "some stay": sum(any(place == old for place, old in enumerate(order)) for order in orders),
    }
    assert min(kinds.values()) >= 8 and kinds["all"] >= 64


def test_golden_order():
    tokens = [0, 11, 12, 4, 13, 4, 14, 15, 16, 4, 17, 18, 2]
    taken = reorder(jnp.ones(13, jnp.int32), jnp.array(places_of(tokens, [2, 0, 3, 1], 13)))
    assert np.array(tokens)[np.asarray(taken)].tolist() == [0, 14, 15, 16, 4, 11, 12, 4, 17, 18, 13, 4, 2]


def draw(rows: int, share: float) -> np.ndarray:
    """Places of the sentences of two documents of four and two sentences, [rows, 6]."""
    segments, sentences = jnp.array([1, 1, 1, 1, 1, 2, 2, 0]), jnp.array([0, 0, 1, 2, 3, 0, 1, 0])
    numbers = number_sentences(segments, sentences)
    keys = jax.random.split(jax.random.key(0), rows)
    places = np.asarray(jax.jit(jax.vmap(lambda key: draw_places(key, numbers, segments, share)))(keys))
    assert np.all(places[:, 0] == places[:, 1])
    return places[:, 1:7]


def test_every_order_is_as_likely():
    places = draw(6000, 1.0)
    orders, counts = np.unique(places[:, :4], axis=0, return_counts=True)
    assert len(orders) == 24
    np.testing.assert_allclose(counts / 6000, 1 / 24, atol=4 * np.sqrt(1 / 24 / 6000))
    assert abs(np.mean(places[:, 4] == 0) - 0.5) < 4 * np.sqrt(0.25 / 6000)


def test_a_share_of_the_sentences_is_permuted():
    places = draw(3000, 0.5)
    moved = (places[:, :4] != np.arange(4)).sum(1)
    assert set(moved) == {0, 2}  # two of four: an exchange or nothing
    assert abs(np.mean(moved == 0) - 0.5) < 4 * np.sqrt(0.25 / 3000)
    pairs = {tuple(np.flatnonzero(row != np.arange(4))) for row in places[:, :4]} - {()}
    assert len(pairs) == 6
    assert np.all(places[:, 4:] == [0, 1])  # one of two sentences has nothing to change places with
    assert np.all(draw(50, 0.0) == [0, 1, 2, 3, 0, 1])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31 - 1), st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=24, max_size=24))
def test_no_token_is_lost_or_moved_to_another_document(seed: int, marks: list[tuple[int, bool]]):
    steps = np.cumsum([step == 0 for step, _ in marks])
    segments = np.where(np.arange(24) < 20, 1 + steps, 0).astype(np.int32)
    starts = np.concatenate([[True], segments[1:] != segments[:-1]])
    sentences = np.cumsum([split or start for (_, split), start in zip(marks, starts, strict=True)])
    first = np.maximum.accumulate(np.where(starts, np.arange(24), 0))
    sentences = (sentences - sentences[first]).astype(np.int32)
    places = draw_places(jax.random.key(seed), number_sentences(segments, sentences), jnp.array(segments), 1.0)
    taken = np.asarray(reorder(jnp.array(segments), places))
    assert sorted(taken) == list(range(24))
    assert np.all(segments[taken] == segments)
    for number in range(24):  # sentences stay whole
        where = np.flatnonzero(
            (segments[taken] > 0) & (np.asarray(number_sentences(segments, sentences))[taken] == number)
        )
        assert np.all(np.diff(where) == 1) and np.all(np.diff(taken[where]) == 1)
