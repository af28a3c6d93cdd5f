"""The ends of spans: from which two tokens SpanBERT predicts what is between them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpt.types import Array


class Ends(NamedTuple):
    """For every token of a span; elsewhere of no meaning."""

    left: Array  # [L] i32: the token before the span
    right: Array  # [L] i32: the token after it
    place: Array  # [L] i32: the token's place in the span, 0 = first
    known: Array  # [L] bool: both ends are ordinary tokens of the span's own document


def ends_of_spans(selected_L: Array, candidates_L: Array, segment_ids_L: Array) -> Ends:
    """Find the tokens just outside each run of selected tokens.

    As in SpanBERT, a span at the edge of a text (next to a special token, another document or the end of the row)
    has no ends. A run ends where a document does.

    Args:
      selected_L: [L] bool.
      candidates_L: [L] bool: ordinary tokens.
      segment_ids_L: [L] i32, 0 = padding.

    >>> ones = jnp.ones(6, int)
    >>> ends = ends_of_spans(jnp.array([False, True, True, False, False, True]), ones > 0, ones)
    >>> [array[1:3].tolist() for array in ends], ends.known[5].item()
    ([[0, 0], [3, 3], [0, 1], [True, True]], False)
    """
    length = selected_L.shape[0]
    index_L = jnp.arange(length, dtype=jnp.int32)
    joined_L = jnp.concatenate([jnp.zeros(1, bool), segment_ids_L[1:] == segment_ids_L[:-1]])  # to the token before
    inside_L = selected_L & joined_L & jnp.roll(selected_L, 1)  # in a span, and not its first token
    first_L = jax.lax.cummax(jnp.where(inside_L, 0, index_L))
    last_L = jax.lax.cummin(jnp.where(jnp.roll(inside_L, -1).at[-1].set(False), length, index_L), reverse=True)
    left_L, right_L = jnp.maximum(first_L - 1, 0), jnp.minimum(last_L + 1, length - 1)
    known_L = selected_L & (first_L > 0) & (last_L < length - 1)
    for end_L in (left_L, right_L):
        known_L &= candidates_L[end_L] & (segment_ids_L[end_L] == segment_ids_L)
    return Ends(left_L, right_L, index_L - first_L, known_L)
