"""Replacement: the shares, the units that share a choice, the ids."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpt.corruption.replace import KEEP, MASK, RANDOM, draw_replacement

IDS = np.array([3, 4, 5, 9], np.int32)


@pytest.mark.parametrize(
    ("mask", "random"), [(0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.9, 0.1), (0.7, 0.3), (0.2, 0.5)]
)
def test_shares(mask, random):
    n = 20_000
    drawn = draw_replacement(jax.random.key(1), jnp.arange(n), mask, random, IDS)
    shares = np.bincount(np.asarray(drawn.action), minlength=3) / n
    for action, share in ((MASK, mask), (RANDOM, random), (KEEP, 1 - mask - random)):
        share = round(share, 9)
        assert abs(shares[action] - share) <= 4 * np.sqrt(share * (1 - share) / n)
    ids = np.bincount(np.asarray(drawn.ids), minlength=10) / n
    assert ids[IDS] == pytest.approx(0.25, abs=4 * np.sqrt(0.1875 / n))
    assert ids[[0, 1, 2, 6, 7, 8]].sum() == 0


def test_a_unit_shares_its_action_but_not_its_random_ids():
    units = jnp.repeat(jnp.arange(500), 4)
    drawn = draw_replacement(jax.random.key(2), units, 0.0, 0.5, IDS)
    actions = np.asarray(drawn.action).reshape(500, 4)
    assert (actions == actions[:, :1]).all()
    assert set(actions[:, 0]) == {KEEP, RANDOM}
    ids = np.asarray(drawn.ids).reshape(500, 4)
    assert (ids != ids[:, :1]).any(axis=1).mean() > 0.9
