"""Attention: who sees whom from a few integers per token, and the one function that attends."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpt.types import Array, AttentionPattern

# ---------------------------------------------------------------------------------------- patterns


def _self_pattern(segment_ids: Array, positions: Array, ranks: Array) -> AttentionPattern:
    return AttentionPattern(segment_ids, segment_ids, ranks, ranks, positions, positions)


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
    return _self_pattern(segment_ids, positions, jnp.zeros_like(segment_ids))


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
    return _self_pattern(segment_ids, positions, places)


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
    return _self_pattern(segment_ids, positions, jnp.where(is_prefix, 0, places))


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
    seen = pattern.key_ranks[:, None, :] <= pattern.query_ranks[:, :, None]
    if pattern.query_groups is not None and pattern.key_groups is not None:
        group_RQ1 = pattern.query_groups[:, :, None]
        seen |= (group_RQ1 == pattern.key_groups[:, None, :]) & (group_RQ1 != 0)
    seen &= pattern.query_segments[:, :, None] == pattern.key_segments[:, None, :]
    if window is not None:
        distance_RQL = pattern.query_positions[:, :, None] - pattern.key_positions[:, None, :]
        seen &= jnp.abs(distance_RQL) <= window
    return seen


# --------------------------------------------------------------------------------------- positions


def rotary_angles(positions: Array, width: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines of rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    Args:
      positions: [R, L] i32.
      width: of one head, even.
      theta: the base; pair i turns by ``position * theta ** (-2 i / width)``.

    Returns:
      Two [R, L, width / 2] f32 arrays.
    """
    frequency = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_RLHC: Array, angles: tuple[Array, Array]) -> Array:
    """Turn pair (i, i + C/2) of every head by its angle; dot products then depend on distance alone."""
    cos, sin = angles[0][:, :, None, :], angles[1][:, :, None, :]
    first, second = jnp.split(x_RLHC.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_RLHC.dtype)


def relative_buckets(distance: Array, *, is_causal: bool, buckets: int, max_distance: int) -> Array:
    """The bucket of ``key position - query position`` (T5, Raffel et al. 2020, arXiv:1910.10683).

    Half of the buckets hold one distance each, the others grow by a constant factor up to ``max_distance``.
    Looking both ways, the upper half of all buckets is for keys after the query.

    Args:
      distance: i32 of any shape.
      is_causal: keys after the query share bucket 0.
      buckets: how many there are.
      max_distance: everything at least this far shares the last one.

    Example:
      >>> relative_buckets(jnp.array([-3, 0, 3]), is_causal=False, buckets=8, max_distance=16)
      Array([2, 0, 6], dtype=int32)
    """
    if is_causal:
        offset, steps = 0, jnp.maximum(-distance, 0)
    else:
        buckets //= 2
        offset, steps = jnp.where(distance > 0, buckets, 0), jnp.abs(distance)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(steps, exact).astype(jnp.float32) / exact) / jnp.log(max_distance / exact)
    far = jnp.minimum(exact + (ratio * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return offset + jnp.where(steps < exact, steps, far)


# --------------------------------------------------------------------------------------- attention


def attend(
    query: Array,
    key: Array,
    value: Array,
    pattern: AttentionPattern,
    *,
    scale: float,
    window: int | None = None,
    bias: Array | None = None,
    dropout: Callable[[Array], Array] | None = None,
) -> Array:
    """Scaled dot-product attention; a query that sees nothing gets 0.

        out[q] = sum_k softmax_k(scale * query[q] . key[k] + bias[q, k]) value[k]      over visible k

    Scores, softmax and sums are float32 whatever the operands. Head h reads key/value head ``h * G // H``, and
    no key is copied for it.

    Args:
      query: [R, Q, H, C].
      key: [R, L, G, C], where G divides H.
      value: [R, L, G, C].
      pattern: who sees whom.
      scale: of the scores.
      window: see ``visible``.
      bias: [R, H, Q, L] f32, added to the scores.
      dropout: applied to the [R, H, Q, L] weights.

    Returns:
      [R, Q, H, C] of the dtype of ``query``.
    """
    rows, queries, heads, width = query.shape
    keys, groups = key.shape[1:3]
    query_RQGMC = query.reshape(rows, queries, groups, heads // groups, width)
    scores_RGMQL = scale * jnp.einsum("rqgmc,rlgc->rgmql", query_RQGMC, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores_RGMQL += bias.reshape(rows, groups, heads // groups, queries, keys)
    seen_R11QL = visible(pattern, window)[:, None, None]
    scores_RGMQL = jnp.where(seen_R11QL, scores_RGMQL, jnp.finfo(jnp.float32).min)
    weights_RGMQL = jnp.where(seen_R11QL, jax.nn.softmax(scores_RGMQL, axis=-1), 0.0)
    if dropout is not None:
        weights_RHQL = dropout(weights_RGMQL.reshape(rows, heads, queries, keys))
        weights_RGMQL = weights_RHQL.reshape(weights_RGMQL.shape)
    out_RQGMC = jnp.einsum(
        "rgmql,rlgc->rqgmc", weights_RGMQL.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return out_RQGMC.reshape(rows, queries, heads, width).astype(query.dtype)
