"""Compacting: the marked elements of a row, in order, into a fixed number of slots."""

from __future__ import annotations

import jax.numpy as jnp

from jaxpt.types import Array


def compact(marked_L: Array, size: int) -> tuple[Array, Array]:
    """Return the positions of the marked elements, first ones first.

    Args:
      marked_L: [L] bool.
      size: slots, K; elements beyond them are left out.

    Returns:
      positions_K ([K] i32, 0 in unused slots: gather with them, never scatter) and used_K ([K] bool).

    >>> import jax.numpy as jnp
    >>> positions, used = compact(jnp.array([False, True, False, True]), 3)
    >>> positions.tolist(), used.tolist()
    ([1, 3, 0], [True, True, False])
    """
    before_L = jnp.cumsum(marked_L, dtype=jnp.int32)
    slots_K = jnp.arange(1, size + 1, dtype=jnp.int32)
    used_K = slots_K <= before_L[-1]
    positions_K = jnp.searchsorted(before_L, slots_K, method="scan_unrolled").astype(jnp.int32)
    return jnp.where(used_K, positions_K, 0), used_K
