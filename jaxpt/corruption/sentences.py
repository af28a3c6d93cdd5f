"""Sentences in another order, document by document."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpt.corruption.choose import draw_count, ranks_within
from jaxpt.corruption.rows import starts_of, unit_ids
from jaxpt.types import Array, Key


def number_sentences(segment_ids_L: Array, sentence_ids_L: Array) -> Array:
    """Number the sentences of a row through all its documents: 0, 1, 2, ... (the padding is one at the end).

    >>> number_sentences(jnp.array([1, 1, 1, 2, 2, 0]), jnp.array([0, 0, 1, 0, 1, 0])).tolist()
    [0, 0, 1, 2, 3, 4]
    """
    return unit_ids(starts_of(segment_ids_L) | starts_of(sentence_ids_L))


def draw_places(key: Key, sentences_L: Array, segment_ids_L: Array, share: float) -> Array:
    """Give the sentences of each document another order: ``ceil(share * S)`` random ones change places.

    Args:
      key: a key.
      sentences_L: [L] i32, of ``number_sentences``.
      segment_ids_L: [L] i32, 0 = padding.
      share: of the sentences that are permuted among themselves; 1 = all (BART).

    Returns:
      [L] i32: the place of each token's sentence in its document, 0, 1, ...
    """
    length = sentences_L.shape[0]
    bits_U = jax.random.bits(key, (length,), jnp.uint32)
    index_U = jnp.arange(length, dtype=jnp.int32)
    segments_U = jnp.zeros(length, jnp.int32).at[sentences_L].set(segment_ids_L)  # 0 where there is no sentence
    count_S = jnp.zeros(length + 1, jnp.int32).at[segments_U].add(1)
    moved_S = draw_count(jnp.uint32(0), jnp.float32(share) * count_S, "ceil")
    # The moved sentences have the ranks 0 .. k-1, in random order: the one of rank r goes where the r-th of them stood.
    ranks_U = ranks_within(bits_U, segments_U > 0, segments_U)
    is_moved_U = ranks_U < moved_S[segments_U]
    first_U = jax.lax.cummax(jnp.where(starts_of(segments_U), index_U, 0))
    moved_before_U = jnp.cumsum(is_moved_U, dtype=jnp.int32) - is_moved_U
    slot_U = first_U + moved_before_U - moved_before_U[first_U]
    stood_U = jnp.zeros(length, jnp.int32).at[jnp.where(is_moved_U, slot_U, length)].set(index_U - first_U, mode="drop")
    places_U = jnp.where(is_moved_U, stood_U[first_U + ranks_U], index_U - first_U)
    return places_U[sentences_L]


def reorder(segment_ids_L: Array, places_L: Array) -> Array:
    """Return where each token of the new row is taken from: documents stay, their tokens are ordered by place.

    Args:
      segment_ids_L: [L] i32, 0 = padding, which stays at the end.
      places_L: [L] i32, of each token in its document; tokens of one place keep their order.

    >>> reorder(jnp.array([1, 1, 1, 1, 2, 0]), jnp.array([-1, 1, 1, 0, 0, 0])).tolist()
    [0, 3, 1, 2, 4, 5]
    """
    length = segment_ids_L.shape[0]
    documents_L = jnp.where(segment_ids_L > 0, segment_ids_L, length + 1)
    index_L = jnp.arange(length, dtype=jnp.int32)
    return jax.lax.sort((documents_L, places_L, index_L), num_keys=3)[2]
