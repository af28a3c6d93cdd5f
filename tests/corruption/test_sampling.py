from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpt.corruption.sampling import draw_nearest, draw_token, hardest, put_tokens

LOGITS = jnp.array([2.0, -1.0, 0.5, -jnp.inf, 1.0])
KEYS = jax.random.split(jax.random.key(0), 20_000)


def shares(draw) -> np.ndarray:
    return np.bincount(jax.jit(jax.vmap(draw))(KEYS), minlength=5) / len(KEYS)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_follow_the_softmax(temperature):
    want = np.array(jax.nn.softmax(LOGITS / temperature))
    error = 4 * np.sqrt(want * (1 - want) / len(KEYS))  # four standard errors
    got = shares(lambda key: draw_token(key, LOGITS, temperature))
    assert (np.abs(got - want) <= error).all(), (got, want)


def test_top_k_is_the_softmax_of_the_likeliest():
    want = np.where(np.isin(np.arange(5), [0, 4]), np.exp(np.array(LOGITS)), 0)
    want /= want.sum()
    got = shares(lambda key: draw_token(key, LOGITS, 1.0, top_k=2))
    np.testing.assert_allclose(got, want, atol=4 * np.sqrt(0.25 / len(KEYS)))
    assert got[[1, 2, 3]].sum() == 0


@pytest.mark.parametrize("top_k", [0, 2, 99])
def test_temperature_zero_is_the_likeliest_token(top_k):
    assert shares(lambda key: draw_token(key, LOGITS, 0.0, top_k))[0] == 1
    # a small temperature comes to the same
    assert shares(lambda key: draw_token(key, LOGITS, 0.02, top_k))[0] == 1


def test_neighbours_are_equally_likely_and_barred_tokens_are_none():
    got = shares(lambda key: draw_nearest(key, LOGITS, 3))
    np.testing.assert_allclose(got, [1 / 3, 0, 1 / 3, 0, 1 / 3], atol=4 * np.sqrt(0.25 / len(KEYS)))
    got = shares(lambda key: draw_nearest(key, LOGITS, 9))  # more than there are
    np.testing.assert_allclose(got, [1 / 4, 1 / 4, 1 / 4, 0, 1 / 4], atol=4 * np.sqrt(0.25 / len(KEYS)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=6, max_size=6), st.integers(0, 2**32 - 1))
def test_only_used_slots_are_written(marked, seed):
    places = np.flatnonzero(marked)
    positions, used = np.zeros(6, np.int32), np.arange(6) < len(places)
    positions[: len(places)] = places
    tokens, ids = np.arange(10, 16), np.random.default_rng(seed).integers(20, 30, 6)
    want = tokens.copy()
    want[places] = ids[: len(places)]
    np.testing.assert_array_equal(put_tokens(jnp.array(tokens), jnp.array(positions), used, jnp.array(ids)), want)


def test_the_hardest_wrong_candidate_is_kept():
    rng = np.random.default_rng(0)
    samples, scores = rng.integers(0, 4, (5, 8, 16)), rng.normal(size=(5, 8, 16))
    targets = rng.integers(0, 4, (8, 16))
    got = np.asarray(hardest(jnp.array(samples), jnp.array(scores), jnp.array(targets)))
    for row, slot in np.ndindex(8, 16):
        target, column = targets[row, slot], samples[:, row, slot]
        if column[0] == target:
            assert got[row, slot] == target
        else:
            wrong = [c for c in range(5) if column[c] != target]
            assert got[row, slot] == column[min(wrong, key=lambda c: scores[c, row, slot])]
    assert ((got == targets) == (samples[0] == targets)).all()  # the rate of replacement is the first one's
