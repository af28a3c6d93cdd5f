"""Views of a text: exact counts, every choice equally likely, nothing scaled up, the padding let alone."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxpt.corruption.views import Perturbation, draw_cutoff, draw_positions, draw_span_cutoff, draw_view

SIZE, LENGTH, WIDTH = 7, 10, 20
TEXT = (np.arange(LENGTH) < SIZE).astype(np.int32)
PAINT = Perturbation(shuffle=True, tokens=0.3, span=0.45, features=0.29, elements=0.1)


@functools.partial(jax.jit, static_argnums=2)
def many(key, size, view):
    ids = (jnp.arange(LENGTH) < size).astype(jnp.int32)
    return jax.vmap(lambda key: draw_view(key, ids, WIDTH, view))(jax.random.split(key, 2000))


def test_truth_table():
    assert draw_positions(jnp.array([7, 9, 8, 4], jnp.uint32), jnp.array([1, 1, 1, 0], bool)).tolist() == [0, 2, 1, 3]
    kept = draw_cutoff(jnp.array([7, 9, 8, 4], jnp.uint32), jnp.array([1, 1, 1, 0], bool), 0.4)
    assert kept.tolist() == [False, True, True, True]
    kept = draw_span_cutoff(jnp.uint32(6), jnp.array([1, 1, 1, 1, 1, 0], bool), 0.5)
    assert kept.tolist() == [True, True, False, False, True, True]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100), st.integers(0, 99))
@example(100, 29)
def test_exactly_the_rounded_down_share(size, percent):
    """In whole numbers, where the float product of 0.29 and 100 is below 29."""
    kept = draw_cutoff(jnp.arange(100, dtype=jnp.uint32), jnp.arange(100) < size, percent / 100)
    assert np.sum(~np.asarray(kept)) == percent * size // 100
    assert np.asarray(kept)[size:].all()
    kept = np.asarray(draw_span_cutoff(jnp.uint32(12345), jnp.arange(100) < size, percent / 100))
    gone = np.flatnonzero(~kept)
    assert len(gone) == percent * size // 100 and kept[size:].all()
    assert not len(gone) or gone[-1] - gone[0] == len(gone) - 1


def test_statistics():
    """2,000 views; the share of views that take a place has a standard error of at most 0.011."""
    _, rows = many(jax.random.key(0), SIZE, Perturbation(tokens=0.3))
    assert rows.shape == (2000, LENGTH, 1)
    np.testing.assert_allclose(1 - rows[:, :SIZE, 0].mean(0), 2 / 7, atol=0.045)
    assert rows[:, SIZE:].all()
    _, columns = many(jax.random.key(0), SIZE, Perturbation(features=0.25))
    assert columns.shape == (2000, 1, WIDTH)
    np.testing.assert_allclose(1 - columns[:, 0].mean(0), 0.25, atol=0.045)
    _, span = many(jax.random.key(0), SIZE, Perturbation(span=0.45))  # 3 of 7: five places to begin
    np.testing.assert_allclose(1 - span[:, :SIZE, 0].mean(0), np.array([1, 2, 3, 3, 3, 2, 1]) / 5, atol=0.045)
    positions, elements = many(jax.random.key(0), SIZE, Perturbation(elements=0.2, shuffle=True))
    assert elements.shape == (2000, LENGTH, WIDTH)
    assert elements.mean() == pytest.approx(0.8, abs=4 * np.sqrt(0.16 / elements.size))
    where = np.asarray(positions)[..., None] == np.arange(LENGTH)
    np.testing.assert_allclose(where[:, :SIZE, :SIZE].mean(0), 1 / 7, atol=0.035)
    assert (np.sort(positions[:, :SIZE], axis=1) == np.arange(SIZE)).all()
    assert (positions[:, SIZE:] == np.arange(SIZE, LENGTH)).all()


def test_several_at_once_and_none():
    _, keep = many(jax.random.key(1), SIZE, PAINT)
    assert (np.asarray(keep).any(-1).sum(1) >= LENGTH - 2 - 3).all()  # at most 2 tokens and a span of 3 are gone
    assert (np.asarray(keep).any(1).sum(-1) <= WIDTH - 5).all()
    positions, keep = many(jax.random.key(1), SIZE, Perturbation())
    assert keep.shape == (2000, 1, 1) and keep.all() and (positions == np.arange(LENGTH)).all()
    positions, keep = many(jax.random.key(1), 0, PAINT)
    assert (positions == np.arange(LENGTH)).all()  # no text: only columns and single numbers are left to take
    assert PAINT.masks and not Perturbation(shuffle=True).masks


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="a view's tokens is a share"):
        Perturbation(tokens=1.0)
