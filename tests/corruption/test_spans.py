"""The span sampler against the numbers of SpanBERT's law and against enumeration."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpt.corruption.spans import cover, draw_fit, draw_lengths, draw_starts, smoothed_lengths, truncated_geometric

LAW = truncated_geometric(0.2, 10)


def bits(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, shape, np.uint32)


def lay(bits_G, lengths, size):
    return cover(draw_starts(bits_G, lengths, size), lengths, bits_G.shape[0] - 1)


def test_the_law_of_spanbert():
    published = [0.2241, 0.1792, 0.1434, 0.1147, 0.0918, 0.0734, 0.0587, 0.0470, 0.0376, 0.0301]
    np.testing.assert_allclose(LAW, published, atol=5e-5)
    assert truncated_geometric(0.3, 10) @ np.arange(1, 11) == pytest.approx(3.043, abs=5e-4)
    lengths = np.asarray(draw_lengths(jnp.array(bits(40_000)), LAW))
    observed = np.bincount(lengths, minlength=11)[1:] / 40_000
    assert lengths.min() == 1
    assert lengths.max() == 10
    np.testing.assert_allclose(observed, LAW, atol=4.5 * np.sqrt(0.2241 * 0.78 / 40_000))


@pytest.mark.parametrize(("budget", "mean"), [(77, 3.759), (19, 3.627)])
def test_realised_span_lengths_at_a_budget(budget, mean):
    """The numbers of the third budget rule: the last span is kept with probability left / length."""

    def one(random):
        return draw_fit(random[:2], draw_lengths(random[2:], LAW), jnp.int32(budget), jnp.int32(512))

    lengths = np.asarray(jax.jit(jax.vmap(one))(bits(80_000, 2 + budget)))
    total = lengths.sum(axis=1)
    assert abs(total.mean() - budget) < 4.5 * 2.5 / np.sqrt(80_000)
    assert total.std() == pytest.approx(2.5, abs=0.2)
    assert lengths.sum() / (lengths > 0).sum() == pytest.approx(mean, abs=0.02)


def test_both_ends_of_a_row_are_covered_alike():
    """Place i is covered as often as place n - 1 - i: the span that fills the budget is not always the last."""

    def one(random):
        lengths = draw_fit(random[:2], draw_lengths(random[2:17], LAW), jnp.int32(15), jnp.int32(100))
        return cover(draw_starts(random[17:], lengths, jnp.int32(100)), lengths, 100)

    rates = np.asarray(jax.jit(jax.vmap(one))(bits(40_000, 17 + 101))).mean(axis=0)
    np.testing.assert_allclose(rates, rates[::-1], atol=4.5 * np.sqrt(2 * 0.15 * 0.85 / 40_000))


def test_two_unit_spans_in_five_tokens_have_six_equally_likely_layouts():
    layouts = jax.jit(jax.vmap(lambda random: lay(random, jnp.array([1, 1, 0]), 5)))(bits(12_000, 6))
    counts = Counter(tuple(np.flatnonzero(row)) for row in np.asarray(layouts))
    assert set(counts) == {(0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (2, 4)}
    assert max(abs(count - 2_000) for count in counts.values()) < 4.5 * np.sqrt(12_000 * 5 / 36)


def test_spans_that_may_touch_have_ten_equally_likely_layouts():
    def one(random):
        lengths = jnp.array([1, 1, 0])
        return cover(draw_starts(random, lengths, 5, touching=True), lengths, 5)

    counts = Counter(tuple(np.flatnonzero(row)) for row in np.asarray(jax.jit(jax.vmap(one))(bits(12_000, 6))))
    assert len(counts) == 10
    assert max(abs(count - 1_200) for count in counts.values()) < 4.5 * np.sqrt(12_000 * 9 / 100)


def test_lengths_like_those_of_a_tasks_answers():
    """40 answers of one token, 20 of two, 6 of four and 14 longer than the five that a span may have."""
    lengths = smoothed_lengths([40, 20, 0, 6, 0, 5, 9], longest=5)
    np.testing.assert_allclose(lengths, np.array([41, 21, 1, 7, 15]) / 85)
    drawn = np.asarray(draw_lengths(jnp.array(bits(40_000)), np.array(lengths)))
    observed = np.bincount(drawn, minlength=6)[1:] / 40_000
    np.testing.assert_allclose(observed, lengths, atol=4.5 * np.sqrt(0.25 / 40_000))


def test_edges_are_masked_less_because_spans_do_not_touch():
    """A span stands at the very start iff its gap was chosen: P = E[spans / gaps]; the same at the end."""

    def one(random):
        lengths = draw_fit(random[:2], draw_lengths(random[1:16], LAW), jnp.int32(15), jnp.int32(100))
        return lay(random[16:], lengths, 100), (lengths > 0).sum() / (101 - lengths.sum())

    covered, edge = jax.jit(jax.vmap(one))(bits(20_000, 117))
    rates = np.asarray(covered).mean(axis=0)
    assert rates[[0, -1]] == pytest.approx(float(edge.mean()), abs=4.5 * np.sqrt(0.05 / 20_000))
    assert rates[20:80].mean() > 0.15 > 3 * rates[0]
    assert rates.sum() == pytest.approx(15, abs=0.1)


LAID = jax.jit(lay)
FITTED = jax.jit(lambda random, budget, size: draw_fit(random[:2], draw_lengths(random[1:], LAW), budget, size))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 24), st.integers(0, 24), st.integers(0, 2**31 - 1))
def test_spans_fit_stay_apart_and_cover_what_they_should(size, budget, seed):
    budget = min(budget, size)
    fitted = FITTED(bits(25, seed=seed), jnp.int32(budget), jnp.int32(size))
    lengths = np.asarray(fitted)
    covered = np.asarray(LAID(bits(25, seed=seed + 1), fitted, jnp.int32(size)))
    assert covered.sum() == lengths.sum() <= size
    assert not covered[size:].any()
    runs = np.diff(np.flatnonzero(np.diff(np.r_[0, covered.astype(int), 0])))[::2]
    used = lengths[lengths > 0]
    if len(used) <= size - lengths.sum() + 1:
        assert runs.tolist() == used.tolist()
    assert (lengths[len(used) :] == 0).all()


def test_where_spans_must_touch_they_are_spread_over_the_row():
    covered = np.asarray(lay(bits(11), jnp.ones(8, jnp.int32), 10))
    assert covered.sum() == 8
    runs = np.diff(np.flatnonzero(np.diff(np.r_[0, covered.astype(int), 0])))[::2]
    assert sorted(runs) == [2, 3, 3]
