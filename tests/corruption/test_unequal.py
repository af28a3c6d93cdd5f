"""Choosing with unequal probabilities: the probabilities are exact, and so is the count."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpt.corruption.unequal import capped_shares, chances, draw_unequal

CHANCES = jax.jit(chances)
DRAW = jax.jit(jax.vmap(draw_unequal, (0, 0, None, None)))


def bits(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, shape, np.uint32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 50, width=32), min_size=9, max_size=9), st.integers(0, 9), st.integers(0, 2**31 - 1))
def test_probabilities_add_up_to_the_count_and_the_draw_has_it(weights, count, seed):
    weights = np.where(np.array(weights) < 0.01, 0, weights).astype(np.float32)
    count = min(count, int((weights > 0).sum()))
    got = np.asarray(CHANCES(weights, count))
    assert got.sum() == pytest.approx(count, abs=1e-4)
    assert (got[weights == 0] == 0).all()
    free = (got > 0) & (got < 1)
    if free.any():  # one factor for all that are not capped, and a capped weight would need no smaller one
        factors = got[free] / weights[free]
        np.testing.assert_allclose(factors, factors[0], rtol=1e-4)
        assert (weights[got == 1] * factors[0] >= 1 - 1e-4).all()
    drawn = np.asarray(DRAW(bits(3, 9, seed=seed), bits(3, seed=seed + 1), got, count))
    assert (drawn.sum(axis=1) == count).all()
    assert drawn[:, got == 1].all()
    assert not drawn[:, got == 0].any()


def test_two_hundred_unequal_tokens_are_drawn_as_often_as_they_should():
    """30 of 200, three of them certain: no marginal is off by more than the sampling error."""
    weights = np.random.default_rng(0).gamma(1.0, size=200).astype(np.float32)
    weights[:3] = 40
    want = np.asarray(CHANCES(weights, 30))
    assert (want[:3] == 1).all()
    drawn = np.asarray(DRAW(bits(8000, 200), bits(8000, seed=1), want, 30))
    assert (drawn.sum(axis=1) == 30).all()
    deviation = np.sqrt(want * (1 - want) / 8000)
    assert (np.abs(drawn.mean(axis=0) - want) <= 4.5 * deviation + 1e-4).all()
    # the order is random, so neighbours are not spread regularly: pairs occur about as often as by chance
    together = (drawn[:, 10:-1] & drawn[:, 11:]).mean(axis=0).sum()
    assert together == pytest.approx((want[10:-1] * want[11:]).sum(), rel=0.15)


@pytest.mark.parametrize(("cap", "factor", "uncapped"), [(1.0, 7.670e-5, 1594), (0.5, 1.309e-4, 467)])
def test_inverse_frequencies_of_zipf(cap, factor, uncapped):
    """V = 2000, p ~ 1/rank, rate .15: every uncapped type makes up the same share c of the text; r / V is 7.5e-5."""
    shares = 1 / np.arange(1, 2001)
    shares /= shares.sum()
    chance = np.asarray(jax.jit(capped_shares)(jnp.asarray(shares, jnp.float32), 0.15, cap), float)
    free = chance < cap
    mass = (shares * chance)[free]
    assert free.sum() == uncapped
    np.testing.assert_allclose(mass, factor, rtol=5e-4)
    assert np.ptp(mass) < 1e-6 * factor * 10
    assert (shares * chance).sum() == pytest.approx(0.15, rel=1e-4)
    if cap == 1.0:
        everything = np.asarray(capped_shares(jnp.asarray(shares, jnp.float32), 1.0, 1.0))
        assert everything.min() == 1
        assert np.asarray(capped_shares(jnp.asarray(shares, jnp.float32), 0.0, 1.0)).max() == 0


def test_without_binding_caps_every_type_gets_an_equal_share_of_the_rate():
    shares = jnp.array([0.4, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(capped_shares(shares, 0.2, 0.9), 0.05 / shares, rtol=1e-5)
