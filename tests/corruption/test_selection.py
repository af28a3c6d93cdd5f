"""What every selection promises, and what each is known for."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpt.corruption.rows import Row
from jaxpt.corruption.selection import (
    Alternative,
    FixedCount,
    Independent,
    Informative,
    InverseFrequency,
    Mixed,
    Spans,
    WholeWord,
)

SELECTIONS = [
    Independent(),
    FixedCount(),
    FixedCount(rounding="nearest", minimum=1, count_special=True),
    WholeWord(),
    WholeWord(fixed=False),
    Spans(),
    Spans(unit="word"),
    Spans(lengths=(6, 3, 2), unit="word", touching=True),
    WholeWord(unit="phrase"),
    Spans(unit="phrase", longest=3),
    InverseFrequency(cap=1.0),
    Informative(),
    Mixed((Alternative(FixedCount()), Alternative(Spans(), share=2), Alternative(WholeWord(), share=0.5))),
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
    phrases = starts & (np.cumsum(starts) % 3 > 0) | ~candidates | np.r_[True, ~candidates[:-1]]
    tokens = np.arange(length) % 7
    shares = np.bincount(tokens[candidates], minlength=7) / candidates.sum()
    scores = np.where(candidates, 1 + np.arange(length) % 3, -1)
    given = (present, candidates, starts, phrases, tokens, shares.astype(np.float32), scores.astype(np.float32))
    return Row(*map(jnp.array, given))


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
    assert tight.sum(axis=1).max() == 12 or isinstance(selection, WholeWord)
    assert tight.sum(axis=1).max() <= 12
    nobody = row._replace(candidates=jnp.zeros(LENGTH, bool))
    assert not draw(selection, 0.4, nobody).any()


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_the_share_of_selected_tokens_is_the_rate(selection, rate):
    words = isinstance(selection, Spans) and selection.unit != "token"
    row = a_row(pieces=1 if words else 3)
    if words:
        row = row._replace(phrase_starts=row.word_starts)
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


def test_phrases_are_all_or_nothing():
    row = a_row(pieces=2)
    phrase = np.cumsum(np.asarray(row.phrase_starts)) - 1
    sizes = np.bincount(phrase[np.asarray(row.candidates)], minlength=LENGTH)
    assert sizes.max() > 2
    for selection in (WholeWord(unit="phrase"), WholeWord(unit="phrase", fixed=False), Spans(unit="phrase")):
        taken = np.stack([np.bincount(phrase, weights=one, minlength=LENGTH) for one in draw(selection, 0.3, row, 300)])
        assert ((taken == 0) | (taken == sizes)).all()
    with pytest.raises(ValueError, match="--phrases"):
        draw(WholeWord(unit="phrase"), 0.3, row._replace(phrase_starts=None))


def test_alberts_ngrams():
    """p(n) ~ 1/n on 1..3 words; n-grams touch by chance, so runs of 1, 2, 3, 4+ are .504, .276, .179, .04 (observed
    with ALBERT's code); and all of a long row is masked, where DeBERTa's walk leaves its last tenth alone."""
    selection = Spans(lengths=(6, 3, 2), unit="word", touching=True)
    np.testing.assert_allclose(selection.law, [0.5455, 0.2727, 0.1818], atol=5e-5)
    drawn = draw(selection, 0.15, plain(128))
    runs = np.concatenate([np.diff(np.flatnonzero(np.diff(np.r_[0, one.astype(int), 0])))[::2] for one in drawn])
    shares = np.bincount(np.minimum(runs, 4), minlength=5)[1:] / len(runs)
    np.testing.assert_allclose(shares, [0.504, 0.276, 0.179, 0.04], atol=0.02)
    long = draw(selection, 0.15, plain(512), 600)
    deciles = long[:, :510].reshape(600, 10, 51).mean(axis=(0, 2))
    np.testing.assert_allclose(deciles, 0.15, atol=0.01)


def test_rare_types_are_selected_as_often_as_frequent_ones():
    """Over many rows of Zipf's law, every uncapped type makes up the same share of the selected tokens."""
    rng, shares = np.random.default_rng(0), 1 / np.arange(1, 41)
    shares /= shares.sum()
    tokens = rng.choice(40, (2000, LENGTH), p=shares)
    base = plain(LENGTH)._replace(shares=jnp.asarray(shares, jnp.float32))
    selection = InverseFrequency(cap=0.5)

    def one(key, tokens_L):
        return selection.draw(key, 0.15, base._replace(tokens=tokens_L), LENGTH)

    drawn = np.asarray(jax.jit(jax.vmap(one))(KEYS[:2000], tokens))
    count = tokens.size
    assert drawn.mean() == pytest.approx(0.15, abs=4 * np.sqrt(0.15 * 0.85 / count))
    mass = np.bincount(tokens[drawn], minlength=40) / count
    capped = np.bincount(tokens.ravel(), minlength=40) * 0.5 / count < 1.05 * mass  # half of them selected
    assert 3 < (~capped).sum() < 40
    free = mass[~capped]
    assert np.abs(free - free.mean()).max() < 4.5 * np.sqrt(free.mean() / count)
    mixed = InverseFrequency(cap=0.5, uniform=1.0).draw(KEYS[0], 1.0, base._replace(tokens=tokens[0]), LENGTH)
    assert mixed.all()
    with pytest.raises(ValueError, match="cap"):
        selection.room(0.6, LENGTH)


def test_the_gain_of_surprising_tokens_over_uniform_ones():
    """Scores of Gamma(2): 1 + (deviation / mean)^2 = 1.4987 within sampling error; top-k of noisy scores has 1.441."""
    size, rng = 1000, np.random.default_rng(0)
    scores = rng.gamma(2.0, size=size).astype(np.float32)
    row = plain(size)._replace(scores=jnp.array(scores))
    selection = Informative(floor=1e-6, clip=1e6)
    drawn = draw(selection, 0.15, row)
    assert (drawn.sum(axis=1) == 150).all()
    gain = (drawn * scores).sum(axis=1) / 150 / scores.mean()
    expected = (scores**2).mean() / scores.mean() ** 2
    assert expected == pytest.approx(1.4987, abs=0.06)
    assert gain.mean() == pytest.approx(expected, abs=4 * gain.std() / np.sqrt(4000) + 2e-3)
    flat = draw(Informative(power=0.0), 0.15, row, 500).mean(axis=0)
    np.testing.assert_allclose(flat, 0.15, atol=4.7 * np.sqrt(0.15 * 0.85 / 500))


def test_a_floor_a_clip_and_importance_weights():
    scores = np.r_[np.zeros(20), np.ones(20), np.full(20, 50.0), -np.ones(4)].astype(np.float32)
    row = plain(64)._replace(scores=jnp.array(scores))
    selection = Informative(clip=4.0, floor=0.2, unbiased=True)
    drawn = draw(selection, 0.2, row)
    assert (drawn.sum(axis=1).min(), drawn.sum(axis=1).max()) == (12, 13)  # .2 of 64, of the 60 that have a score
    assert not drawn[:, 60:].any()
    rate = drawn.mean(axis=0)
    weight = 0.8 * np.minimum(scores[:60], 4) / (5 / 3) + 0.2
    want = weight / weight.sum() * 12.8
    np.testing.assert_allclose(rate[:60], want, atol=4.5 * np.sqrt(0.25 / 4000))
    keys, room = KEYS, selection.room(0.2, 64)
    importance = jax.jit(jax.vmap(lambda key: selection.importance(key, 0.2, row, room)))(keys)
    losses = np.random.default_rng(1).normal(1.0, 1.0, 64)
    estimate = (np.asarray(importance) * drawn * losses).sum(axis=1) / drawn.sum(axis=1)
    plain_estimate = (drawn * losses).sum(axis=1) / drawn.sum(axis=1)
    error = estimate.std() / np.sqrt(4000)
    assert estimate.mean() == pytest.approx(losses[:60].mean(), abs=4 * error)
    assert abs(plain_estimate.mean() - losses[:60].mean()) > 8 * error


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Spans(stop=0.0), "stop"),
        (lambda: Spans(lengths=(0.0, 0.0)), "lengths"),
        (lambda: InverseFrequency(cap=0.0), "cap"),
        (lambda: Informative(floor=0.0), "floor"),
        (lambda: Informative(passes=1).room(0.6, 64), "one half"),
    ],
)
def test_a_law_that_is_none_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_each_row_draws_one_of_the_mixed_rules():
    """By their shares, each at its own rate: 6 tokens of 60 in a quarter of the rows, 12 in the others."""
    sparse, dense = (FixedCount(rounding="nearest"), FixedCount(rounding="ceil"))
    mixed = Mixed((Alternative(sparse), Alternative(dense, share=3, rate=2)))
    counts = draw(mixed, 0.1, a_row()).sum(1)
    values, seen = np.unique(counts, return_counts=True)
    np.testing.assert_array_equal(values, [6, 12])
    assert seen[0] / 4000 == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 4000))


def test_a_mixture_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="needs alternatives"):
        Mixed(())
    with pytest.raises(ValueError, match="more than all tokens"):
        Mixed((Alternative(FixedCount(), rate=3),)).room(0.4, 64)
