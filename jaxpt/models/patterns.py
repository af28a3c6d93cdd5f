"""Who sees whom, from a few integers per token: the patterns, their dense mask, and the tiles that it leaves empty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpt.types import Array, AttentionPattern, Everyone, RowOrder

FIRST, LAST = np.iinfo(np.int32).min, np.iinfo(np.int32).max


def _self_pattern(
    segment_ids: Array, positions: Array, ranks: Array, order: Everyone | RowOrder | None
) -> AttentionPattern:
    return AttentionPattern(segment_ids, segment_ids, ranks, ranks, positions, positions, order=order)


def bidirectional(segment_ids: Array, positions: Array) -> AttentionPattern:
    """Every token sees its whole segment.

    Args:
      segment_ids: [R, L] i32, 0 = padding.
      positions: [R, L] i32, restart in each segment.

    Example:
      >>> visible(bidirectional(jnp.array([[1, 1, 0]]), jnp.array([[0, 1, 0]]))).astype(int)
      Array([[[1, 1, 0],
              [1, 1, 0],
              [0, 0, 1]]], dtype=int32)
    """
    return _self_pattern(segment_ids, positions, jnp.zeros_like(segment_ids), Everyone())


def causal(segment_ids: Array, positions: Array) -> AttentionPattern:
    """Every token sees itself and what stands before it in its segment.

    The rank is the place in the row, which within a segment is the order of the text.

    Args:
      segment_ids: [R, L] i32, 0 = padding.
      positions: [R, L] i32, restart in each segment.

    Example:
      >>> visible(causal(jnp.array([[1, 1, 2]]), jnp.array([[0, 1, 0]]))).astype(int)
      Array([[[1, 0, 0],
              [1, 1, 0],
              [0, 0, 1]]], dtype=int32)
    """
    places = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    return _self_pattern(segment_ids, positions, places, RowOrder())


def prefix(segment_ids: Array, positions: Array, is_prefix: Array) -> AttentionPattern:
    """The tokens of a segment's prefix see the whole prefix; the others also see what stands before them.

    Args:
      segment_ids: [R, L] i32, 0 = padding.
      positions: [R, L] i32, restart in each segment.
      is_prefix: [R, L] bool.

    Example:
      >>> visible(prefix(jnp.ones((1, 3), int), jnp.arange(3)[None], jnp.array([[True, True, False]]))).astype(int)
      Array([[[1, 1, 0],
              [1, 1, 0],
              [1, 1, 1]]], dtype=int32)
    """
    places = jnp.arange(1, segment_ids.shape[1] + 1, dtype=jnp.int32)
    return _self_pattern(segment_ids, positions, jnp.where(is_prefix, 0, places), None)


def block_diffusion(segment_ids: Array, positions: Array, block: int) -> AttentionPattern:
    """Of a row read twice, [noisy ; clean]: a noisy block sees itself and the clean blocks before it.

    A clean block sees itself and the clean blocks before it; nothing clean sees anything noisy.

    Args:
      segment_ids: [R, L] i32, 0 = padding.
      positions: [R, L] i32, restart in each segment.
      block: tokens of a block, counted from the start of each segment.

    Returns:
      A pattern of 2 L queries and keys.

    Example:
      >>> visible(block_diffusion(jnp.ones((1, 3), int), jnp.arange(3)[None], block=2)).astype(int)
      Array([[[1, 1, 0, 0, 0, 0],
              [1, 1, 0, 0, 0, 0],
              [0, 0, 1, 1, 1, 0],
              [0, 0, 0, 1, 1, 0],
              [0, 0, 0, 1, 1, 0],
              [0, 0, 0, 1, 1, 1]]], dtype=int32)
    """
    blocks = positions // block + 1

    def twice(noisy: Array, clean: Array) -> Array:
        return jnp.concatenate([noisy, clean], axis=1)

    segments, places = twice(segment_ids, segment_ids), twice(positions, positions)
    ranks = twice(blocks - 1, blocks), twice(jnp.full_like(blocks, LAST), blocks)
    groups = twice(blocks, jnp.zeros_like(blocks))
    return AttentionPattern(segments, segments, *ranks, places, places, groups, groups)


def cross(query_segments: Array, query_positions: Array, key_segments: Array, key_positions: Array) -> AttentionPattern:
    """Every query sees all keys of its segment: a decoder looking at its encoder.

    Args:
      query_segments, query_positions: [R, Q] i32.
      key_segments, key_positions: [R, L] i32.
    """
    ranks = jnp.zeros_like(query_segments), jnp.zeros_like(key_segments)
    return AttentionPattern(query_segments, key_segments, *ranks, query_positions, key_positions)


def visible(pattern: AttentionPattern, window: int | None = None) -> Array:
    """The dense mask of a pattern: [R, Q, L] bool, True where the query sees the key.

    Args:
      pattern: who sees whom.
      window: if set, also ``|position[q] - position[k]| <= window``.

    Example:
      >>> pattern = causal(jnp.ones((1, 4), int), jnp.arange(4)[None])
      >>> visible(pattern, window=1).astype(int)
      Array([[[1, 0, 0, 0],
              [1, 1, 0, 0],
              [0, 1, 1, 0],
              [0, 0, 1, 1]]], dtype=int32)
    """
    query = [None if x is None else x[:, :, None] for x in query_side(pattern)]
    key = [None if x is None else x[:, None, :] for x in key_side(pattern)]
    return sees(query, key, window)


# ------------------------------------------------------------------------------------------- sides

Side = Sequence[Array | None]  # segments, ranks, positions, groups


def query_side(pattern: AttentionPattern) -> Side:
    """What a pattern says of its queries: segments, ranks, positions, groups."""
    return pattern.query_segments, pattern.query_ranks, pattern.query_positions, pattern.query_groups


def key_side(pattern: AttentionPattern) -> Side:
    """What a pattern says of its keys: segments, ranks, positions, groups."""
    return pattern.key_segments, pattern.key_ranks, pattern.key_positions, pattern.key_groups


def sees(query: Side, key: Side, window: int | None) -> Array:
    """The rule itself, on integers of queries and keys that broadcast against each other."""
    (query_segment, query_rank, query_position, query_group) = query
    (key_segment, key_rank, key_position, key_group) = key
    assert query_segment is not None and query_rank is not None and query_position is not None
    assert key_segment is not None and key_rank is not None and key_position is not None
    seen = key_rank <= query_rank
    if query_group is not None and key_group is not None:
        seen |= (query_group == key_group) & (query_group != 0)
    seen &= query_segment == key_segment
    if window is not None:
        seen &= jnp.abs(query_position - key_position) <= window
    return seen


# ------------------------------------------------------------------------------------------- tiles

NO_QUERY, NO_KEY = -1, -2  # segments of the places that fill up the last tile: no key is seen by any query


def fill_up(side: Side, size: int, segment: int) -> Side:
    """The side with its rows filled up to ``size`` places of a segment of their own."""

    def fill(x: Array | None, mode: dict[str, Any]) -> Array | None:
        missing = 0 if x is None else size - x.shape[1]
        return x if x is None or not missing else jnp.pad(x, ((0, 0), (0, missing)), **mode)

    return [fill(x, {"constant_values": segment} if place == 0 else {"mode": "edge"}) for place, x in enumerate(side)]


def tile_bounds(query: Side, key: Side, tile: tuple[int, int], window: int | None) -> Array:
    """The tiles in which some query may see some key: an upper bound from the least and greatest of each integer.

    Args:
      query, key: sides of whole tiles (``fill_up``), [R, Q] and [R, L].
      tile: queries and keys of a tile.
      window: see ``visible``.

    Returns:
      [R, Q / tile[0], L / tile[1]] bool; False is certain, True is not.
    """

    def span(x: Array, size: int, keep: Array | None = None) -> tuple[Array, Array]:
        low = x if keep is None else jnp.where(keep, x, LAST)
        high = x if keep is None else jnp.where(keep, x, FIRST)
        cut = (x.shape[0], -1, size)
        return low.reshape(cut).min(-1), high.reshape(cut).max(-1)

    def meet(a: tuple[Array, Array], b: tuple[Array, Array], slack: int = 0) -> Array:
        return (a[0][:, :, None] - slack <= b[1][:, None, :]) & (b[0][:, None, :] <= a[1][:, :, None] + slack)

    (query_segment, query_rank, query_position, query_group) = query
    (key_segment, key_rank, key_position, key_group) = key
    assert query_segment is not None and query_rank is not None and query_position is not None
    assert key_segment is not None and key_rank is not None and key_position is not None
    # Padding, segment 0, stands at the end of a row: with it, the span of a tile would reach over all segments.
    texts = [span(s, size, s > 0) for s, size in ((query_segment, tile[0]), (key_segment, tile[1]))]
    paddings = [span(s, size, s == 0)[0] == 0 for s, size in ((query_segment, tile[0]), (key_segment, tile[1]))]
    bound = span(key_rank, tile[1])[0][:, None, :] <= span(query_rank, tile[0])[1][:, :, None]
    if query_group is not None and key_group is not None:
        bound |= meet(span(query_group, tile[0], query_group != 0), span(key_group, tile[1], key_group != 0))
    bound &= meet(texts[0], texts[1]) | (paddings[0][:, :, None] & paddings[1][:, None, :])
    if window is not None:
        bound &= meet(span(query_position, tile[0]), span(key_position, tile[1]), window)
    return bound
