"""What every selection promises, and what each is known for."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpt.corruption.rows import Row
from jaxpt.corruption.selection import FixedCount, Independent, Spans, WholeWord

SELECTIONS = [
    Independent(),
    FixedCount(),
    FixedCount(rounding="nearest", minimum=1, count_special=True),
    WholeWord(),
    WholeWord(fixed=False),
    Spans(),
    Spans(unit="word"),
]
LENGTH = 64
KEYS = jax.random.split(jax.random.key(0), 4000)


def a_row(length: int = LENGTH, pieces: int = 2) -> Row:
    """[CLS] words [SEP] [CLS] words [SEP] padding; words of 1, 2, ..., ``pieces`` tokens in turn."""
    half = (length - 4) // 2
    candidates = np.zeros(length, bool)
    candidates[1 : half - 1] = candidates[half + 1 : 2 * half - 1] = True
    present = np.arange(length) < 2 * half
    starts, size = np.ones(length, bool), 1
    at = 1
    while at < length:
        starts[at + 1 : at + size] = False
        at, size = at + size, size % pieces + 1
    starts |= ~candidates | np.r_[True, ~candidates[:-1]]
    return Row(jnp.array(present), jnp.array(candidates), jnp.array(starts))


@functools.cache
def drawer(selection, room: int):
    """Compiled once per selection, room and row length: the rate and the row are traced."""
    return jax.jit(jax.vmap(lambda key, rate, row: selection.draw(key, rate, row, room), (0, None, None)))


def draw(selection, rate: float, row: Row, count: int = 4000, room: int | None = None) -> np.ndarray:
    room = selection.room(rate, row.candidates.shape[0]) if room is None else room
    return np.asarray(drawer(selection, room)(KEYS, jnp.float32(rate), row))[:count]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_corners_and_limits(selection):
    row = a_row()
    candidates = np.asarray(row.candidates)
    assert not draw(selection, 0.0, row, room=12).any()
    everything = draw(selection, 1.0, row, room=LENGTH)
    assert (everything == candidates).all()
    some = draw(selection, 0.4, row)
    assert not (some & ~candidates).any()
    assert some.sum(axis=1).max() <= selection.room(0.4, LENGTH)
    assert len({tuple(one) for one in some[:200]}) > 150  # a new one every time
    tight = draw(selection, 0.4, row, room=12)
    assert tight.sum(axis=1).max() == 12 or selection == WholeWord(fixed=False)
    assert tight.sum(axis=1).max() <= 12
    nobody = Row(row.present, jnp.zeros(LENGTH, bool), row.word_starts)
    assert not draw(selection, 0.4, nobody).any()


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_the_share_of_selected_tokens_is_the_rate(selection, rate):
    row = a_row(pieces=1) if selection == Spans(unit="word") else a_row(pieces=3)
    n = int(row.candidates.sum())
    counts = draw(selection, rate, row, room=selection.room(0.4, LENGTH)).sum(axis=1)
    bias = {"ceil": np.ceil(rate * n - 1e-6) / n - rate}.get(getattr(selection, "rounding", ""), 0)
    if isinstance(selection, FixedCount) and selection.count_special:
        bias = round(rate * int(row.present.sum())) / n - rate
    error = 4 * counts.std() / n / np.sqrt(4000) + 1e-3 * (not isinstance(selection, FixedCount))
    assert counts.mean() / n - rate - bias == pytest.approx(0, abs=max(error, 1e-6))


@pytest.mark.parametrize("selection", [Independent(), FixedCount(), WholeWord(fixed=False)], ids=str)
def test_every_candidate_is_as_likely_as_the_others(selection):
    row = a_row()
    rates = draw(selection, 0.15, row, room=selection.room(0.4, LENGTH))[:, np.asarray(row.candidates)].mean(axis=0)
    np.testing.assert_allclose(rates, 0.15, atol=4.5 * np.sqrt(0.15 * 0.85 / 4000))


def plain(n: int, special: int = 0) -> Row:
    """A row of ``n`` tokens without padding, of which ``special`` are special tokens."""
    return Row(jnp.ones(n, bool), jnp.arange(n) >= special, jnp.ones(n, bool))


@pytest.mark.parametrize(("n", "count"), [(128, 19), (512, 77), (10, 2), (4, 1)])
def test_berts_counts(n, count):
    """Observed with BERT's own create_pretraining_data: always 19 of 128, 77 of 512, 2 of 10, and at least 1."""
    selection = FixedCount(rounding="nearest", minimum=1, count_special=True)
    assert (draw(selection, 0.15, plain(n, special=3), 20).sum(axis=1) == min(count, n - 3)).all()


def test_bert_selects_nothing_where_there_is_no_candidate():
    selection = FixedCount(rounding="nearest", minimum=1, count_special=True)
    assert not draw(selection, 0.15, plain(3, special=3), 5).any()


def test_robertas_counts():
    counts = draw(FixedCount(), 0.15, plain(64), room=26).sum(axis=1)
    assert set(counts) == {9, 10}
    assert counts.mean() == pytest.approx(9.6, abs=0.04)


@pytest.mark.parametrize(
    ("selection", "length", "room"),
    [
        (FixedCount(), 128, 20),
        (FixedCount(), 512, 77),
        (Independent(), 128, 33),
        (Spans(), 128, 29),
        (WholeWord(), 128, 28),
    ],
)
def test_room(selection, length, room):
    assert selection.room(0.15, length) == room
    assert selection.room(1.0, length) == length


@pytest.mark.parametrize("selection", [WholeWord(), WholeWord(fixed=False), Spans(unit="word")], ids=str)
def test_words_are_all_or_nothing_also_when_the_room_is_short(selection):
    row = a_row(pieces=4)
    word = np.cumsum(np.asarray(row.word_starts)) - 1
    for room in (64, 12):
        drawn = draw(selection, 0.3, row, 300, room)
        sizes = np.bincount(word[np.asarray(row.candidates)], minlength=LENGTH)
        taken = np.stack([np.bincount(word, weights=one, minlength=LENGTH) for one in drawn])
        assert ((taken == 0) | (taken == sizes)).all()


def test_whole_words_do_not_fall_short_as_berts_do():
    """BERT's scan leaves 18 of 19 with words of 2 and 4 pieces; the last word by chance keeps the mean exact."""
    starts = np.ones(128, bool)
    starts[1::6] = starts[3::6] = starts[4::6] = starts[5::6] = False  # sizes 2, 4, 2, 4, ...
    row = Row(jnp.ones(128, bool), jnp.ones(128, bool), jnp.array(starts))
    counts = draw(WholeWord(), 0.15, row).sum(axis=1)
    assert counts.mean() == pytest.approx(19.2, abs=4 * counts.std() / np.sqrt(4000))


def test_spans_never_touch_inside_a_document():
    drawn = draw(Spans(stop=0.5, longest=2), 0.3, plain(100), 300)
    runs = np.concatenate([np.diff(np.flatnonzero(np.diff(np.r_[0, one.astype(int), 0])))[::2] for one in drawn])
    assert runs.max() == 2


def test_a_law_that_is_none_is_refused():
    with pytest.raises(ValueError, match="stop"):
        Spans(stop=0.0)
