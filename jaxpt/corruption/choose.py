"""Choosing k of n: by ranks of random 32-bit integers, never by a threshold on floats, which tie.

(2**23 float values tie in 63 % of the rows of 4,096 tokens; then "the k smallest" are more or fewer than k.)

These functions take random bits, not keys: a corruption draws all the bits of a row in one call, because every
further call of the generator costs a third of a second of compilation.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from jaxpt.types import Array

Rounding: TypeAlias = Literal["unbiased", "nearest", "ceil"]


def uniform(bits: Array) -> Array:
    """Turn random bits (u32, any shape) into float32 numbers in [0, 1), multiples of 2**-24."""
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def draw_ranks(bits_N: Array, candidates_N: Array) -> Array:
    """Put the candidates into a random order, uniform over all orders, and the others behind them.

    Args:
      bits_N: [N] u32, random.
      candidates_N: [N] bool.

    Returns:
      [N] i32: each element's place in the order, a permutation of 0 .. N-1.

    >>> import jax.numpy as jnp
    >>> draw_ranks(jnp.array([7, 9, 8, 4], jnp.uint32), jnp.array([False, True, True, True])).tolist()
    [3, 2, 1, 0]
    """
    size = candidates_N.shape[0]
    index_N = jnp.arange(size, dtype=jnp.int32)
    # The order of the index breaks a tie of bits: 1 pair in 2**32, no count can change.
    *_, order_N = jax.lax.sort((~candidates_N, bits_N, index_N), num_keys=3)
    return jnp.zeros(size, jnp.int32).at[order_N].set(index_N, unique_indices=True)


def draw_subset(bits_N: Array, candidates_N: Array, count: Array | int) -> Array:
    """Choose exactly ``min(count, number of candidates)`` candidates, every subset equally likely.

    Args:
      bits_N: [N] u32, random.
      candidates_N: [N] bool.
      count: [] i32, may be traced.

    Returns:
      [N] bool.
    """
    return candidates_N & (draw_ranks(bits_N, candidates_N) < count)


def draw_count(bits: Array, expected: Array, rounding: Rounding) -> Array:
    """Round an expected count to a whole number; the rounding is part of a recipe, so it has a name.

    Args:
      bits: [] u32, random; used by "unbiased" only.
      expected: [] f32, ``rate * n``. The product is float32, as in T5X: for a few n (at 0.15: 190, 350, 390,
        ...) the float64 product of other implementations lies on the other side of one half.
      rounding: "unbiased" is floor(expected + U), U uniform on [0, 1) (RoBERTa); "nearest" is half to even
        (BERT, ELECTRA); "ceil" is SpanBERT's and BART's.

    Returns:
      [] i32.

    >>> import jax.numpy as jnp
    >>> [int(draw_count(jnp.uint32(0), jnp.float32(0.15) * n, "nearest")) for n in (10, 30, 50, 128)]
    [2, 4, 8, 19]
    """
    if rounding == "unbiased":
        count = jnp.floor(expected + uniform(bits))
    elif rounding == "nearest":
        count = jnp.round(expected)
    else:
        count = jnp.ceil(expected * (1 - 1e-6))  # 3.0000001 is 3 and a rounding error, not 4
    return count.astype(jnp.int32)


def draw_units(
    bits_L: Array,
    last_bits: Array,
    unit_ids_L: Array,
    candidates_L: Array,
    budget: Array | int,
    limit: Array | int,
) -> Array:
    """Choose whole units (words) in random order until they hold ``budget`` tokens.

    The unit that would pass the budget is taken with probability (what is left) / (its size), so that the
    expected number of tokens is the budget itself; leaving it out, as BERT's whole-word masking does, selects
    too few. No more than ``limit`` tokens are ever taken.

    Args:
      bits_L: [L] u32, random.
      last_bits: [] u32, random; decides on the unit that passes the budget.
      unit_ids_L: [L] i32 in 0 .. L-1.
      candidates_L: [L] bool; only these are counted and chosen.
      budget: [] i32, tokens.
      limit: [] i32, the most tokens.

    Returns:
      [L] bool, all or nothing within a unit.
    """
    length = unit_ids_L.shape[0]
    sizes_U = jnp.zeros(length, jnp.int32).at[unit_ids_L].add(candidates_L.astype(jnp.int32))
    ranks_U = draw_ranks(bits_L, sizes_U > 0)
    sizes_by_rank_U = jnp.zeros(length, jnp.int32).at[ranks_U].set(sizes_U, unique_indices=True)
    after_U = jnp.cumsum(sizes_by_rank_U)[ranks_U]
    left_U = budget - (after_U - sizes_U)
    lucky_U = uniform(last_bits) * sizes_U < left_U
    taken_U = (left_U > 0) & ((sizes_U <= left_U) | lucky_U) & (after_U <= limit)
    return candidates_L & taken_U[unit_ids_L]


def draw_within(bits_L: Array, unit_ids_L: Array, selected_L: Array, limit: int) -> Array:
    """Drop random whole units of a selection until at most ``limit`` tokens are left.

    A selection of at most ``limit`` tokens comes back unchanged.

    Args:
      bits_L: [L] u32, random.
      unit_ids_L: [L] i32 in 0 .. L-1.
      selected_L: [L] bool.
      limit: tokens, the room for predictions.
    """
    return draw_units(bits_L, jnp.uint32(0), unit_ids_L, selected_L, limit, limit)


def ranks_within(keys_N: Array, candidates_N: Array, groups_N: Array) -> Array:
    """Order the candidates of every group by their keys, and put the others of the group behind them.

    Args:
      keys_N: [N], smallest first; random bits (u32) make the order random.
      candidates_N: [N] bool.
      groups_N: [N] i32, for example segment ids.

    Returns:
      [N] i32: each element's place in the order of its group, 0, 1, ...

    >>> import jax.numpy as jnp
    >>> keys, groups = jnp.array([7, 9, 8, 4, 6]), jnp.array([1, 1, 1, 2, 2])
    >>> ranks_within(keys, jnp.array([False, True, True, True, True]), groups).tolist()
    [2, 1, 0, 0, 1]
    """
    size = candidates_N.shape[0]
    index_N = jnp.arange(size, dtype=jnp.int32)
    sorted_N, *_, order_N = jax.lax.sort((groups_N, ~candidates_N, keys_N, index_N), num_keys=4)
    first_N = jnp.concatenate([jnp.ones(1, bool), sorted_N[1:] != sorted_N[:-1]])
    ranks_N = index_N - jax.lax.cummax(jnp.where(first_N, index_N, 0))
    return jnp.zeros(size, jnp.int32).at[order_N].set(ranks_N, unique_indices=True)


def draw_kept(bits_L: Array, unit_ids_L: Array, candidates_L: Array, rate: Array | float) -> Array:
    """Leave out each unit (a word) with probability ``rate``, and never all of them.

    Where every unit would go, one of them stays, each equally likely.

    Args:
      bits_L: [L] u32, random.
      unit_ids_L: [L] i32 in 0 .. L-1; special tokens are units of their own.
      candidates_L: [L] bool; the others stay.
      rate: in [0, 1], may be traced.

    Returns:
      [L] bool, all or nothing within a unit.

    >>> import jax.numpy as jnp
    >>> bits, words = jnp.array([7, 3, 9, 1, 0], jnp.uint32) << 28, jnp.array([0, 1, 1, 2, 3])  # 3 / 16 is unit 1's
    >>> candidates = jnp.array([False, True, True, True, True])
    >>> [draw_kept(bits, words, candidates, rate).astype(int).tolist() for rate in (0.0, 0.2, 1.0)]
    [[1, 1, 1, 1, 1], [1, 0, 0, 1, 0], [1, 0, 0, 1, 0]]
    """
    bits_L = bits_L[unit_ids_L]
    # where all are below the rate, which of them is the highest is uniform; otherwise the highest stays anyway
    highest = jnp.max(jnp.where(candidates_L, bits_L, 0))
    return ~candidates_L | (uniform(bits_L) >= rate) | (bits_L == highest)
