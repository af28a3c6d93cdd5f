"""Attention in tiles of plain jax.numpy: any pattern, on every platform, in memory linear in the length.

The backward pass keeps the output and one number per query and computes the tiles again (FlashAttention-2, Dao 2023,
arXiv:2307.08691). Tiles that no query of any row sees into are never computed.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpt.models.patterns import NO_KEY, NO_QUERY, Side, fill_up, key_side, query_side, sees, tile_bounds
from jaxpt.types import Array, AttentionPattern

TILE = 512  # queries and keys of a tile at most
HIDDEN = -1e30  # the score of a key that is not seen; its exp is 0 beside any score that is
NOTHING = 1e30  # log-sum-exp of a query that sees nothing, so that every weight becomes 0


class Plan(NamedTuple):
    """Which tiles there are and which are seen: O(L) integers and (L / TILE)^2 bits."""

    query: Side  # [nq, R, bq]
    key: Side  # [nk, R, bk]
    order: Array  # [nq, nk] i32: for each tile of queries the seen tiles of keys, then the others
    seen: Array  # [nq] i32: how many are seen


def blockwise(
    query: Array,
    key: Array,
    value: Array,
    pattern: AttentionPattern,
    *,
    scale: float,
    window: int | None = None,
    bias: Array | None = None,
    tile: int = TILE,
) -> Array:
    """``attend`` tile by tile.

    Args:
      query: [R, Q, H, C].
      key, value: [R, L, G, C], where G divides H.
      pattern: who sees whom.
      scale: of the scores.
      window: see ``visible``.
      bias: [2 D + 1, H] f32, by the distance ``key position - query position``, clipped to [-D, D].
      tile: queries and keys of a tile at most.

    Returns:
      [R, Q, H, C] of the dtype of ``query``.

    Example:
      >>> from jaxpt.models.patterns import causal
      >>> one, places = jnp.ones((1, 5), int), jnp.arange(5)[None]
      >>> x = jnp.arange(5.0).reshape(1, 5, 1, 1)
      >>> out = blockwise(x, x, x, causal(one, places), scale=0.0, tile=2)
      >>> [round(float(mean), 3) for mean in out.ravel()]
      [0.0, 0.5, 1.0, 1.5, 2.0]
    """
    rows, queries, heads, width = query.shape
    keys, groups = key.shape[1:3]
    sizes = _tile(queries, tile), _tile(keys, tile)
    plan = _plan(pattern, queries, keys, sizes, window)
    query_NRGMQC = _cut(query.reshape(rows, queries, groups, heads // groups, width), sizes[0])
    key_NRGKC, value_NRGKC = _cut(key, sizes[1]), _cut(value, sizes[1])
    table = None if bias is None else bias.astype(jnp.float32)
    out_NRGMQC: Any = _attend(scale, window, query_NRGMQC, key_NRGKC, value_NRGKC, table, plan)
    out = jnp.moveaxis(out_NRGMQC, (0, 4), (1, 2)).reshape(rows, -1, heads, width)
    return out[:, :queries]


def _tile(size: int, largest: int) -> int:
    return -(-size // -(-size // largest))


def _cut(x: Array, size: int) -> Array:
    """[R, L, ..., C] -> [tiles, R, ..., size, C], filled up with zeros."""
    missing = -x.shape[1] % size
    if missing:
        x = jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.moveaxis(x, (1, 2), (0, -2))


def _plan(pattern: AttentionPattern, queries: int, keys: int, sizes: tuple[int, int], window: int | None) -> Plan:
    query = fill_up(query_side(pattern), queries + -queries % sizes[0], NO_QUERY)
    key = fill_up(key_side(pattern), keys + -keys % sizes[1], NO_KEY)
    seen_QK = tile_bounds(query, key, sizes, window).any(0)
    order = jnp.argsort(~seen_QK, axis=1, stable=True).astype(jnp.int32)
    cut = lambda x, size: None if x is None else jnp.moveaxis(x.reshape(x.shape[0], -1, size), 1, 0)  # noqa: E731
    return Plan(
        [cut(x, sizes[0]) for x in query],
        [cut(x, sizes[1]) for x in key],
        order,
        seen_QK.sum(1, dtype=jnp.int32),
    )


# ------------------------------------------------------------------------------------------- tiles


def _take(side: Side, tile: Array) -> Side:
    return [None if x is None else x[tile] for x in side]


def _distances(query: Side, key: Side, table: Array) -> Array:
    """[R, bq, bk]: rows of the table of biases."""
    reach = table.shape[0] // 2
    assert query[2] is not None and key[2] is not None
    return jnp.clip(key[2][:, None, :] - query[2][:, :, None], -reach, reach) + reach


def _scores(
    scale: float, window: int | None, query: Array, key: Array, table: Array | None, sides: tuple[Side, Side]
) -> Array:
    """[R, G, M, bq, bk] f32, HIDDEN where the query does not see the key."""
    scores = scale * jnp.einsum("rgmqc,rgkc->rgmqk", query, key, preferred_element_type=jnp.float32)
    if table is not None:
        bias_RQKH = jnp.take(table, _distances(*sides, table), axis=0)
        scores += jnp.moveaxis(bias_RQKH, -1, 1).reshape(scores.shape)
    queries = [None if x is None else x[:, None, None, :, None] for x in sides[0]]
    keys = [None if x is None else x[:, None, None, None, :] for x in sides[1]]
    return jnp.where(sees(queries, keys, window), scores, HIDDEN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    scale: float, window: int | None, query: Array, key: Array, value: Array, table: Array | None, plan: Plan
) -> Array:
    return _forward(scale, window, query, key, value, table, plan)[0]


def _forward(
    scale: float, window: int | None, query: Array, key: Array, value: Array, table: Array | None, plan: Plan
) -> tuple[Array, tuple[Any, ...]]:
    """The output of every tile of queries, with what the backward pass needs."""

    def queries_tile(_: None, xs: tuple[Array, Side, Array, Array]) -> tuple[None, tuple[Array, Array]]:
        tile, side, order, count = xs

        def keys_tile(t: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = carry
            k = order[t]
            scores = _scores(scale, window, tile, key[k], table, (side, _take(plan.key, k)))
            # Never as low as HIDDEN: where nothing is seen yet, the weights are 0 and not 1.
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            decay = jnp.exp(top - new_top)
            total = total * decay + weights.sum(-1)
            seen = jnp.einsum(
                "rgmqk,rgkc->rgmqc", weights.astype(value.dtype), value[k], preferred_element_type=jnp.float32
            )
            return new_top, total, out * decay[..., None] + seen

        shape = tile.shape[:-1]
        start = jnp.full(shape, HIDDEN / 2), jnp.zeros(shape), jnp.zeros((*shape, value.shape[-1]))
        top, total, out = jax.lax.fori_loop(0, count, keys_tile, start)
        out = out / jnp.maximum(total, 1e-37)[..., None]
        return None, (out.astype(query.dtype), jnp.where(total > 0, top + jnp.log(total), NOTHING))

    _, (out, logsumexp) = jax.lax.scan(queries_tile, None, (query, plan.query, plan.order, plan.seen))
    return out, (query, key, value, table, plan, out, logsumexp)


def _backward(scale: float, window: int | None, saved: tuple, d_out: Array) -> tuple:
    """Gradients of queries, keys, values and the table of biases, tile by tile, summed in float32."""
    query, key, value, table, plan, out, logsumexp = saved
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)

    def queries_tile(carry: tuple, xs: tuple) -> tuple[tuple, Array]:
        tile, d_tile, tile_logsumexp, tile_delta, side, order, count = xs

        def keys_tile(t: Array, carry: tuple) -> tuple:
            d_query, d_key, d_value, d_table = carry
            k = order[t]
            sides = side, _take(plan.key, k)
            scores = _scores(scale, window, tile, key[k], table, sides)
            weights = jnp.exp(scores - tile_logsumexp[..., None])
            d_weights = einsum("rgmqc,rgkc->rgmqk", d_tile, value[k])
            d_scores = weights * (d_weights - tile_delta[..., None])
            d_value = d_value.at[k].add(einsum("rgmqk,rgmqc->rgkc", weights.astype(d_tile.dtype), d_tile))
            if table is not None:
                rows, _, _, queries, keys = d_scores.shape
                d_RQKH = jnp.moveaxis(d_scores.reshape(rows, -1, queries, keys), 1, -1)
                d_table = d_table.at[_distances(*sides, table)].add(d_RQKH)
            d_scores = (scale * d_scores).astype(query.dtype)
            d_query += einsum("rgmqk,rgkc->rgmqc", d_scores, key[k])
            d_key = d_key.at[k].add(einsum("rgmqk,rgmqc->rgkc", d_scores, tile))
            return d_query, d_key, d_value, d_table

        start = jnp.zeros(tile.shape, jnp.float32), *carry
        d_query, *sums = jax.lax.fori_loop(0, count, keys_tile, start)
        return tuple(sums), d_query.astype(query.dtype)

    start = (
        jnp.zeros(key.shape, jnp.float32),
        jnp.zeros(value.shape, jnp.float32),
        None if table is None else jnp.zeros_like(table),
    )
    xs = query, d_out, logsumexp, delta, plan.query, plan.order, plan.seen
    (d_key, d_value, d_table), d_query = jax.lax.scan(queries_tile, start, xs)
    return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype), d_table, None


_attend.defvjp(_forward, _backward)
