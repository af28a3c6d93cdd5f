"""Choosing k of n: exact counts, uniform subsets, whole units, and the rounding rules of the references."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpt.corruption.choose import draw_count, draw_ranks, draw_subset, draw_units, draw_within

RANKS = jax.jit(jax.vmap(draw_ranks, (0, None)))
SUBSETS = jax.jit(jax.vmap(draw_subset, (0, None, None)))
UNITS = jax.jit(jax.vmap(draw_units, (0, 0, None, None, None, None)))


WITHIN = jax.jit(draw_within)


def bits(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, shape, np.uint32)


def test_ranks_are_a_permutation_with_the_candidates_first():
    candidates = jnp.array([True, False, True, True, False])
    ranks = np.asarray(RANKS(bits(200, 5), candidates))
    assert (np.sort(ranks, axis=1) == np.arange(5)).all()
    assert (ranks[:, [0, 2, 3]] < 3).all()
    # Every order of the three candidates, each with probability 1/6.
    orders = Counter(map(tuple, ranks[:, [0, 2, 3]]))
    assert len(orders) == 6
    assert max(orders.values()) < 60


def test_every_subset_is_equally_likely():
    candidates = jnp.array([True, True, False, True, True])
    drawn = np.asarray(SUBSETS(bits(12_000, 5), candidates, 2))
    counts = Counter(tuple(np.flatnonzero(row)) for row in drawn)
    assert set(counts) == set(combinations([0, 1, 3, 4], 2))
    deviation = np.sqrt(12_000 * 1 / 6 * 5 / 6)
    assert all(abs(count - 2_000) < 4.5 * deviation for count in counts.values())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=9, max_size=9), st.integers(0, 12), st.integers(0, 2**31 - 1))
def test_subsets_have_exactly_the_count(candidates, count, seed):
    drawn = np.asarray(SUBSETS(bits(1, 9, seed=seed), jnp.array(candidates), count))[0]
    assert drawn.sum() == min(count, sum(candidates))
    assert not (drawn & ~np.array(candidates)).any()


def test_a_long_row_has_exactly_k_where_float_thresholds_tie():
    drawn = SUBSETS(bits(20, 8192), jnp.ones(8192, bool), 1229)
    assert (np.asarray(drawn).sum(axis=1) == 1229).all()


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        # BERT's Python round, half to even; 19 of 128 and 77 of 512 were observed with BERT's own code.
        ("nearest", {10: 2, 30: 4, 50: 8, 70: 10, 90: 14, 110: 16, 128: 19, 512: 77}),
        ("ceil", {10: 2, 20: 3, 40: 6, 60: 9, 100: 15, 128: 20, 510: 77, 512: 77}),
    ],
)
def test_counts_of_the_references_at_fifteen_percent(rounding, expected):
    assert {n: int(draw_count(jnp.uint32(0), jnp.float32(0.15) * n, rounding)) for n in expected} == expected


def test_unbiased_rounding_as_in_roberta():
    counts = np.asarray(draw_count(jnp.array(bits(4000)), jnp.float32(0.15) * 64, "unbiased"))
    assert set(counts) == {9, 10}
    assert abs(counts.mean() - 9.6) < 4 * np.sqrt(0.24 / 4000)


def test_units_are_whole_and_fill_the_budget_in_expectation():
    unit_ids = jnp.array([0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5])
    candidates = jnp.ones(12, bool)
    drawn = np.asarray(UNITS(bits(6000, 12), bits(6000, seed=1), unit_ids, candidates, 4, 12))
    for unit in range(6):
        inside = drawn[:, np.asarray(unit_ids) == unit]
        assert (inside.all(axis=1) == inside.any(axis=1)).all()
    totals = drawn.sum(axis=1)
    assert totals.max() <= 4 + 2  # the last unit passes the budget by less than its size
    assert abs(totals.mean() - 4) < 4 * totals.std() / np.sqrt(6000)


def test_units_count_candidates_only():
    unit_ids = jnp.array([0, 0, 0, 1])
    drawn = np.asarray(UNITS(bits(50, 4), bits(50), unit_ids, jnp.array([True, False, False, True]), 2, 4))
    assert (drawn == [True, False, False, True]).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=10, max_size=10), st.integers(0, 10), st.integers(0, 2**31 - 1))
def test_within_a_limit(selected, limit, seed):
    unit_ids, selected = jnp.array([0, 0, 0, 1, 2, 2, 3, 4, 4, 5]), jnp.array(selected)
    kept = np.asarray(WITHIN(bits(10, seed=seed), unit_ids, selected, limit))
    selected = np.asarray(selected)
    assert kept.sum() <= limit
    assert not (kept & ~selected).any()
    if selected.sum() <= limit:
        assert (kept == selected).all()
    for unit in range(6):  # of what was selected in a unit, all is kept or nothing
        inside = kept[(np.asarray(unit_ids) == unit) & selected]
        assert inside.all() or not inside.any()


def test_the_excess_that_is_dropped_is_random():
    limited = jax.jit(jax.vmap(lambda bits_L: draw_within(bits_L, jnp.arange(8), jnp.ones(8, bool), 4)))
    kept = np.asarray(limited(bits(4000, 8)))
    assert (kept.sum(axis=1) == 4).all()
    assert np.abs(kept.mean(axis=0) - 0.5).max() < 4.5 * 0.5 / np.sqrt(4000)
