"""Attention as one GPU kernel (Pallas, lowered through Triton): any pattern, forward and backward, tiles skipped.

It is tested in interpret mode and lowers for CUDA, and it HAS NOT RUN ON HARDWARE yet. So the automatic choice takes
it only after ``works_here`` has compared it with the blockwise form on the GPU at hand. JAX 0.12 says that the Triton
backend of Pallas will go one day; then this file moves to its Mosaic GPU backend, and blockwise serves until it has:
the backend is imported where the kernel is made, so that nothing else needs it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from jaxpt.models.blockwise import HIDDEN, NOTHING
from jaxpt.models.patterns import NO_KEY, NO_QUERY, Side, causal, fill_up, key_side, query_side, sees, tile_bounds
from jaxpt.types import Array, AttentionPattern

TILE = 64  # queries and keys of a tile


def fused(
    query: Array,
    key: Array,
    value: Array,
    pattern: AttentionPattern,
    *,
    scale: float,
    window: int | None = None,
    interpret: bool = False,
) -> Array:
    """``attend`` in one kernel, without a bias; Args as there.

    Args:
      interpret: run it as plain JAX, for tests.
    """
    length = query.shape[1]
    sides = (
        fill_up(query_side(pattern), length + -length % TILE, NO_QUERY),
        fill_up(key_side(pattern), key.shape[1] + -key.shape[1] % TILE, NO_KEY),
    )
    width = max(16, pl.next_power_of_2(query.shape[-1]))
    grown = [
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE), (0, 0), (0, width - x.shape[-1]))) for x in (query, key, value)
    ]
    out: Any = _fused(scale, window, interpret, *grown, sides)
    return out[:, :length, :, : query.shape[-1]]


def _ranges(sides: tuple[Side, Side], window: int | None) -> tuple[Array, Array, Array, Array]:
    """First and last + 1 tile of keys for a tile of queries, [R, nq], and of queries for a tile of keys, [R, nk]."""
    seen = tile_bounds(*sides, (TILE, TILE), window)

    def ends(seen: Array) -> tuple[Array, Array]:
        first = jnp.argmax(seen, -1)
        end = seen.shape[-1] - jnp.argmax(seen[..., ::-1], -1)
        return first.astype(jnp.int32), jnp.where(seen.any(-1), end, first).astype(jnp.int32)

    return *ends(seen), *ends(seen.swapaxes(1, 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fused(
    scale: float, window: int | None, interpret: bool, query: Array, key: Array, value: Array, sides: tuple[Side, Side]
) -> Array:
    return _forward(scale, window, interpret, query, key, value, sides)[0]


# ----------------------------------------------------------------------------------------- kernels
# A kernel sees one tile of one row and head; the other side it reads tile by tile from the whole row.


def _dot(a: Array, b: Array) -> Array:
    from jax.experimental.pallas import triton

    return triton.dot(a, b, allow_tf32=False)


def _part(refs: Sequence[Any], place: Any, *, of_queries: bool) -> Side:
    """One tile of a side, to broadcast against the other; absent arrays stay absent."""
    read = [None if ref is None else ref[place] for ref in refs]
    return [None if x is None else (x[:, None] if of_queries else x[None, :]) for x in read]


def _forward_kernel(scale: float, window: int | None, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    query_ref, key_ref, value_ref, query_refs, key_refs, first_ref, end_ref = inputs
    out_ref, logsumexp_ref = outputs
    i = pl.program_id(0)
    query, queries = query_ref[...], _part(query_refs, slice(None), of_queries=True)

    def tile(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = carry
        place = pl.ds(j * TILE, TILE)
        scores = scale * _dot(query, key_ref[place, :].T)
        scores = jnp.where(sees(queries, _part(key_refs, place, of_queries=False), window), scores, HIDDEN)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.exp(scores - new_top[:, None])
        decay = jnp.exp(top - new_top)
        value = value_ref[place, :]
        out = out * decay[:, None] + _dot(weights.astype(value.dtype), value)
        return new_top, total * decay + weights.sum(-1), out

    start = jnp.full(TILE, HIDDEN / 2), jnp.zeros(TILE), jnp.zeros(query.shape, jnp.float32)
    top, total, out = jax.lax.fori_loop(first_ref[i], end_ref[i], tile, start)
    safe = jnp.maximum(total, 1e-37)
    out_ref[...] = (out / safe[:, None]).astype(out_ref.dtype)
    logsumexp_ref[...] = jnp.where(total > 0, top + jnp.log(safe), NOTHING)


def _query_kernel(scale: float, window: int | None, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    query_ref, d_out_ref, logsumexp_ref, delta_ref, key_ref, value_ref, query_refs, key_refs, first_ref, end_ref = (
        inputs
    )
    i = pl.program_id(0)
    query, d_out, logsumexp, delta = query_ref[...], d_out_ref[...], logsumexp_ref[...], delta_ref[...]
    queries = _part(query_refs, slice(None), of_queries=True)

    def tile(j: Array, d_query: Array) -> Array:
        place = pl.ds(j * TILE, TILE)
        key = key_ref[place, :]
        scores = scale * _dot(query, key.T)
        scores = jnp.where(sees(queries, _part(key_refs, place, of_queries=False), window), scores, HIDDEN)
        weights = jnp.exp(scores - logsumexp[:, None])
        d_scores = scale * weights * (_dot(d_out, value_ref[place, :].T) - delta[:, None])
        return d_query + _dot(d_scores.astype(key.dtype), key)

    d_query = jax.lax.fori_loop(first_ref[i], end_ref[i], tile, jnp.zeros(query.shape, jnp.float32))
    outputs[0][...] = d_query.astype(outputs[0].dtype)


def _key_kernel(scale: float, window: int | None, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    query_ref, d_out_ref, logsumexp_ref, delta_ref, key_ref, value_ref, query_refs, key_refs, first_ref, end_ref = (
        inputs
    )
    j = pl.program_id(0)
    key, value = key_ref[...], value_ref[...]
    keys = _part(key_refs, slice(None), of_queries=False)

    def tile(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_key, d_value = carry
        place = pl.ds(i * TILE, TILE)
        query, d_out = query_ref[place, :], d_out_ref[place, :]
        scores = scale * _dot(query, key.T)
        scores = jnp.where(sees(_part(query_refs, place, of_queries=True), keys, window), scores, HIDDEN)
        weights = jnp.exp(scores - logsumexp_ref[place][:, None])
        d_scores = scale * weights * (_dot(d_out, value.T) - delta_ref[place][:, None])
        d_key += _dot(d_scores.astype(query.dtype).T, query)
        return d_key, d_value + _dot(weights.astype(d_out.dtype).T, d_out)

    zeros = jnp.zeros(key.shape, jnp.float32)
    outputs[0][...], outputs[1][...] = jax.lax.fori_loop(first_ref[j], end_ref[j], tile, (zeros, zeros))


# ------------------------------------------------------------------------------------------- calls


def _call(
    kernel: Callable[..., None],
    interpret: bool,
    grid: tuple[int, int, int],
    inputs: Sequence[Any],
    specs: Sequence[Any],
    outputs: Sequence[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
) -> Sequence[Array]:
    """``pallas_call`` over (tiles, rows, heads) with nested inputs."""
    from jax.experimental.pallas import triton

    leaves, structure = jax.tree.flatten(inputs)

    def body(*refs: Any) -> None:
        kernel(structure.unflatten(refs[: len(leaves)]), refs[len(leaves) :])

    flat_specs = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, pl.BlockSpec))
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=flat_specs,
        out_specs=[spec for _, spec in outputs],
        out_shape=[shape for shape, _ in outputs],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name=kernel.func.__name__.strip("_") if isinstance(kernel, functools.partial) else None,
    )(*leaves)


def _one(width: int, share: int = 1) -> pl.BlockSpec:
    """One tile of [R, L, heads, width]; ``share`` query heads read one key head."""
    return pl.BlockSpec((None, TILE, None, width), lambda i, r, h: (r, i, h // share, 0))


def _all(length: int, width: int, share: int = 1) -> pl.BlockSpec:
    return pl.BlockSpec((None, length, None, width), lambda i, r, h: (r, 0, h // share, 0))


def _integers(side: Side, size: int | None) -> list[pl.BlockSpec]:
    """One tile of every array of a side, or all of it."""
    one = pl.BlockSpec((None, TILE), lambda i, r, h: (r, i))
    whole = pl.BlockSpec((None, size), lambda i, r, h: (r, 0))
    return [whole if size else one for x in side if x is not None]


def _forward(
    scale: float, window: int | None, interpret: bool, query: Array, key: Array, value: Array, sides: tuple[Side, Side]
) -> tuple[Array, tuple]:
    rows, queries, heads, width = query.shape
    keys, share = key.shape[1], heads // key.shape[2]
    ranges = _ranges(sides, window)
    tiles = queries // TILE
    bound = pl.BlockSpec((None, tiles), lambda i, r, h: (r, 0))
    whole = _all(keys, width, share)
    out, logsumexp = _call(
        functools.partial(_forward_kernel, scale, window),
        interpret,
        (tiles, rows, heads),
        (query, key, value, *sides, *ranges[:2]),
        (_one(width), whole, whole, _integers(sides[0], None), _integers(sides[1], keys), bound, bound),
        (
            (jax.ShapeDtypeStruct(query.shape, query.dtype), _one(width)),
            (
                jax.ShapeDtypeStruct((rows, heads, queries), jnp.float32),
                pl.BlockSpec((None, None, TILE), lambda i, r, h: (r, h, i)),
            ),
        ),
    )
    return out, (query, key, value, sides, out, logsumexp)


def _backward(scale: float, window: int | None, interpret: bool, saved: tuple, d_out: Array) -> tuple:
    query, key, value, sides, out, logsumexp = saved
    rows, queries, heads, width = query.shape
    keys, groups = key.shape[1:3]
    share = heads // groups
    ranges = _ranges(sides, window)
    delta_RHQ = jnp.einsum("rqhc,rqhc->rhq", out.astype(jnp.float32), d_out.astype(jnp.float32))
    inputs = query, d_out, logsumexp, delta_RHQ, key, value, *sides
    number = pl.BlockSpec((None, None, TILE), lambda i, r, h: (r, h, i))
    numbers = pl.BlockSpec((None, None, queries), lambda i, r, h: (r, h, 0))

    whole, tiles = _all(keys, width, share), queries // TILE
    bound = pl.BlockSpec((None, tiles), lambda i, r, h: (r, 0))
    own = _one(width), _one(width), number, number, whole, whole
    (d_query,) = _call(
        functools.partial(_query_kernel, scale, window),
        interpret,
        (tiles, rows, heads),
        (*inputs, *ranges[:2]),
        (*own, _integers(sides[0], None), _integers(sides[1], keys), bound, bound),
        ((jax.ShapeDtypeStruct(query.shape, query.dtype), _one(width)),),
    )
    whole, tiles, one = _all(queries, width), keys // TILE, _one(width, share)
    bound = pl.BlockSpec((None, tiles), lambda i, r, h: (r, 0))
    own = whole, whole, numbers, numbers, one, one
    shape = jax.ShapeDtypeStruct((rows, keys, heads, width), jnp.float32)  # of query heads, summed below
    d_key, d_value = _call(
        functools.partial(_key_kernel, scale, window),
        interpret,
        (tiles, rows, heads),
        (*inputs, *ranges[2:]),
        (*own, _integers(sides[0], queries), _integers(sides[1], None), bound, bound),
        ((shape, _one(width)), (shape, _one(width))),
    )
    d_key, d_value = (x.reshape(rows, keys, groups, share, width).sum(3) for x in (d_key, d_value))
    return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype), None


_fused.defvjp(_forward, _backward)


@functools.cache
def works_here(reference: Callable[..., Array]) -> bool:
    """Whether the kernel gives, on the GPU of this process, what ``reference`` gives: once, on a small packed row."""
    if jax.default_backend() != "gpu":  # a program for a machine that is not here
        return False
    try:
        with jax.ensure_compile_time_eval():
            rng = np.random.default_rng(0)
            query, key, value, d_out = (
                jnp.asarray(rng.standard_normal((2, 200, heads, 64)), jnp.bfloat16) for heads in (4, 2, 2, 4)
            )
            segments = jnp.asarray(np.repeat([[1, 2, 3, 0]], 50, axis=1).repeat(2, axis=0), jnp.int32)
            pattern = causal(segments, jnp.tile(jnp.arange(50), (2, 4)))

            def both(attend: Callable[..., Array]) -> list[np.ndarray]:
                run = lambda *args: attend(*args, pattern, scale=0.125)  # noqa: E731
                out, pull = jax.vjp(jax.jit(run), query, key, value)
                return [np.asarray(x, np.float32) for x in (out, *pull(d_out))]

            for got, want in zip(both(fused), both(reference), strict=True):
                np.testing.assert_allclose(got, want, rtol=0.05, atol=0.05)
    except Exception as error:
        warnings.warn(f"the fused attention kernel does not work here, using blockwise: {error}", stacklevel=2)
        return False
    return True
