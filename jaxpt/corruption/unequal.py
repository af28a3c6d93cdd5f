"""Choosing with unequal probabilities that are exact: what is twice as likely is chosen twice as often.

Taking the k largest of weighted random numbers (Gumbel top-k, weighted draws without replacement) does not give
inclusion probabilities proportional to the weights; systematic sampling over a random order does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpt.corruption.choose import draw_ranks
from jaxpt.types import Array

UNITS = 1 << 16  # probabilities are multiples of 1 / UNITS, so that sums are exact and the count is too


def chances(weights_N: Array, count: Array | int) -> Array:
    """Return the inclusion probabilities min(1, c w), with c such that they add up to ``count``.

    Args:
      weights_N: [N] f32, not negative; 0 = never.
      count: [] i32 or f32, at most the number of positive weights.

    Returns:
      [N] f32 in [0, 1].

    >>> chances(jnp.array([1.0, 3.0, 0.0, 7.0]), 2)
    Array([0.25, 0.75, 0.  , 1.  ], dtype=float32)
    """
    descending_N = -jnp.sort(-weights_N)
    rest_N = jnp.cumsum(descending_N[::-1])[::-1]  # of the weights from here on
    left_N = count - jnp.arange(weights_N.shape[0])  # where all before here have probability 1
    factor_N = left_N / jnp.where(rest_N > 0, rest_N, 1)
    fits_N = factor_N * descending_N <= 1 + 1e-5
    factor = jnp.where(fits_N.any(), factor_N[jnp.argmax(fits_N)], 0)
    return jnp.clip(factor * weights_N, 0, 1)


def draw_unequal(bits_N: Array, start_bits: Array, chances_N: Array, count: Array) -> Array:
    """Choose exactly ``count`` elements, each with its own probability: systematic sampling over a random order.

    The probabilities are laid end to end in the random order; with u uniform on [0, 1), an element is chosen where
    the sum passes u, u + 1, u + 2, ...

    Args:
      bits_N: [N] u32, random.
      start_bits: [] u32, random: u.
      chances_N: [N] f32 in [0, 1] of sum ``count``.
      count: [] i32, below 2**15.

    Returns:
      [N] bool.
    """
    size = chances_N.shape[0]
    ranks_N = draw_ranks(bits_N, chances_N > 0)
    in_order_N = jnp.zeros(size, chances_N.dtype).at[ranks_N].set(chances_N, unique_indices=True)
    units_N = jnp.floor(in_order_N * UNITS).astype(jnp.int32)
    some_N = (in_order_N > 0) & (units_N < UNITS)  # rounding down has left a few units: one more to the first of these
    units_N += some_N & (jnp.cumsum(some_N) <= count * UNITS - jnp.sum(units_N))
    after_N = jnp.cumsum(units_N) + (start_bits % UNITS).astype(jnp.int32)
    return (after_N // UNITS > (after_N - units_N) // UNITS)[ranks_N]


def capped_shares(shares_V: Array, rate: Array | float, cap: float) -> Array:
    """Return the probability m_v = min(cap, c / p_v) of each type, with c such that sum_v p_v m_v = rate.

    So every type that is not capped gets the same share c of all selected tokens, however frequent it is. The rate
    is monotone in c, which is found by bisection.

    Args:
      shares_V: [V] f32, the shares p_v of the types, of sum 1; types of share 0 get ``cap``.
      rate: [] f32, at most ``cap``; may be traced.
      cap: the highest probability.

    >>> capped_shares(jnp.array([0.5, 0.25, 0.25]), 0.3, 0.9).round(3)
    Array([0.2, 0.4, 0.4], dtype=float32)
    """

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        enough = jnp.sum(jnp.minimum(cap * shares_V, middle)) >= rate
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    # c lies between rate / V, where no cap binds, and cap times the largest share, where all do
    bounds = jnp.zeros(()), cap * jnp.max(shares_V)
    _, high = jax.lax.fori_loop(0, 40, halve, bounds)
    return jnp.minimum(cap, jnp.where(jnp.asarray(rate) > 0, high, 0) / jnp.where(shares_V > 0, shares_V, 1e-30))
