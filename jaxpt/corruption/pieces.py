"""Pieces: the documents of a packed row, or their parts where a row cuts them, for objectives that work on each.

Arrays over pieces (suffix ``_S``) are indexed by segment id: entry 0 is the padding, and S = L + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpt.corruption.compact import compact
from jaxpt.types import Array


class Pieces(NamedTuple):
    """The sizes of a row's pieces; in a batch, ``positions`` are the places inside them."""

    sizes: Array  # [S] i32: tokens of the text, without its end
    ends: Array  # [S] i32: 1 where the end token follows the text, 0 where the row cut the document before it

    @property
    def starts(self) -> Array:
        """[S] i32: the first place of each piece in the row."""
        return before(self.sizes + self.ends)


def describe_pieces(tokens_L: Array, segment_ids_L: Array, end: int) -> Pieces:
    """Measure the pieces of a row.

    Args:
      tokens_L: [L] i32.
      segment_ids_L: [L] i32: 1, 2, ... per piece, 0 = padding, which stands behind all pieces.
      end: the token that ends a document; it counts as the end at the last place of a piece only.

    >>> import jax.numpy as jnp
    >>> pieces = describe_pieces(jnp.array([7, 8, 3, 9, 0]), jnp.array([1, 1, 1, 2, 0]), end=3)
    >>> pieces.sizes.tolist(), pieces.ends.tolist(), pieces.starts.tolist()
    ([0, 2, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 3, 4, 4, 4])
    """
    last_L = jnp.concatenate([segment_ids_L[1:] != segment_ids_L[:-1], jnp.ones(1, bool)])
    present_L = segment_ids_L > 0
    end_L = present_L & last_L & (tokens_L == end)
    nothing_S = jnp.zeros(tokens_L.shape[0] + 1, jnp.int32)
    sizes_S = nothing_S.at[segment_ids_L].add((present_L & ~end_L).astype(jnp.int32))
    return Pieces(sizes_S, nothing_S.at[segment_ids_L].add(end_L.astype(jnp.int32)))


def before(counts: Array) -> Array:
    """Sum of all earlier entries: [0, a, a + b, ...] of [a, b, c, ...].

    >>> import jax.numpy as jnp
    >>> before(jnp.array([2, 3, 4])).tolist()
    [0, 2, 5]
    """
    return jnp.cumsum(counts, dtype=jnp.int32) - counts


def lay(lengths_S: Array, length: int) -> tuple[Array, Array]:
    """Lay pieces of new lengths one after the other into a row.

    Args:
      lengths_S: [S] i32; entry 0, the padding, is 0.
      length: slots of the row, J; what does not fit is cut.

    Returns:
      segment_ids_J ([J] i32, 0 = padding) and positions_J ([J] i32, restart in each piece).

    >>> import jax.numpy as jnp
    >>> [x.tolist() for x in lay(jnp.array([0, 2, 3]), 6)]
    [[1, 1, 2, 2, 2, 0], [0, 1, 0, 1, 2, 0]]
    """
    stops_S = jnp.cumsum(lengths_S, dtype=jnp.int32)
    slots_J = jnp.arange(length, dtype=jnp.int32)
    segment_ids_J = jnp.searchsorted(stops_S, slots_J, side="right", method="scan_unrolled").astype(jnp.int32)
    segment_ids_J = jnp.where(slots_J < stops_S[-1], segment_ids_J, 0)
    positions_J = slots_J - (stops_S - lengths_S)[segment_ids_J]
    return segment_ids_J, jnp.where(segment_ids_J > 0, positions_J, 0)


def before_within(counts_L: Array, segment_ids_L: Array) -> Array:
    """Sum of all earlier entries of the same piece, for rows whose pieces follow one another.

    >>> import jax.numpy as jnp
    >>> before_within(jnp.array([1, 0, 3, 1, 1]), jnp.array([1, 1, 1, 2, 2])).tolist()
    [0, 1, 1, 0, 1]
    """
    before_L = before(counts_L)
    first_L = jnp.concatenate([jnp.ones(1, bool), segment_ids_L[1:] != segment_ids_L[:-1]])
    return before_L - jax.lax.cummax(jnp.where(first_L, before_L, 0))


def gather(marked_L: Array, segment_ids_L: Array, length: int) -> tuple[Array, Array, Array]:
    """Lay the marked tokens of each piece, in order, into a row of another length.

    Args:
      marked_L: [L] bool, no padding.
      segment_ids_L: [L] i32, 0 = padding.
      length: slots of the new row, J; what does not fit is cut.

    Returns:
      places_J ([J] i32, where each token stands in the old row), segment_ids_J ([J] i32, 0 = padding) and positions_J
      ([J] i32, restart in each piece).

    >>> import jax.numpy as jnp
    >>> [x.tolist() for x in gather(jnp.array([True, False, True, True, False]), jnp.array([1, 1, 1, 2, 0]), 4)]
    [[0, 2, 3, 0], [1, 1, 2, 0], [0, 1, 0, 0]]
    """
    places_J, used_J = compact(marked_L, length)
    segment_ids_J = jnp.where(used_J, segment_ids_L[places_J], 0)
    return places_J, segment_ids_J, jnp.where(used_J, before_within(used_J.astype(jnp.int32), segment_ids_J), 0)
