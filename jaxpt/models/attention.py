"""Attention: the one door, and the form behind it that fits the pattern, the length and the platform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxpt.models.blockwise import blockwise
from jaxpt.models.fused import fused, works_here
from jaxpt.models.params import platform
from jaxpt.models.patterns import visible
from jaxpt.models.splash import LANES, places_are_positions, splash, splash_kernel
from jaxpt.models.spread import CONTEXT, Split, places_of, split_of, spread
from jaxpt.types import Array, AttentionPattern, RowOrder

Form = Literal["auto", "dense", "blockwise", "splash", "fused"]
Chosen = Literal["dense", "blockwise", "splash", "fused"]

# Rows of fewer keys are attended dense. Measured on CPU (docs/benchmarks.md): from here on tiles are faster as well as
# smaller. Not measured on GPU and TPU.
DENSE_BELOW = {"cpu": 512, "gpu": 512, "tpu": 512}
TILES = {"cpu": 128, "gpu": 512, "tpu": 512}  # of the blockwise form: CPU caches want small ones, the others big ones


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
    form: Form = "auto",
) -> Array:
    """Scaled dot-product attention; a query that sees nothing gets 0.

        out[q] = sum_k softmax_k(scale * query[q] . key[k] + bias[q, k]) value[k]      over visible k

    Scores, softmax and sums are float32 whatever the operands. Head h reads key/value head ``h * G // H``, and
    no key is copied for it. All forms give the same values and gradients, to rounding; all but the dense one need
    memory linear in the length, and on a mesh (``jax.set_mesh``) each device attends for its own rows, heads and
    queries.

    Args:
      query: [R, Q, H, C].
      key: [R, L, G, C], where G divides H.
      value: [R, L, G, C].
      pattern: who sees whom.
      scale: of the scores.
      window: see ``visible``.
      bias: [2 D + 1, H] f32, added to the scores by ``key position - query position``, clipped to [-D, D]; or, dense
        only, what ``spell_out`` makes of it.
      dropout: applied to the [R, H, Q, L] weights; dense only.
      form: how to compute it; "auto" is the fastest that can (``choose``).

    Returns:
      [R, Q, H, C] of the dtype of ``query``.

    Raises:
      ValueError: the form cannot do what is asked.
    """
    chosen = choose(form, query, key, pattern, window, has_bias=bias is not None, has_dropout=dropout is not None)
    if chosen == "dense":
        if bias is not None and bias.ndim == 2:
            bias = spell_out(bias, pattern)
        return dense(query, key, value, pattern, scale=scale, window=window, bias=bias, dropout=dropout)
    split = split_of(query, key, pattern.order, window)
    if chosen == "splash":
        return _splash(split, query, key, value, pattern, scale, window)
    if chosen == "fused":
        run = functools.partial(fused, scale=scale, window=window, interpret=platform() != "gpu")
        return spread(lambda q, k, v, p, _, __: run(q, k, v, p), split, query, key, value, pattern, None)
    return spread(_blocks(scale, window), split, query, key, value, pattern, bias)


def choose(
    form: Form,
    query: Any,
    key: Any,
    pattern: AttentionPattern,
    window: int | None,
    *,
    has_bias: bool,
    has_dropout: bool,
) -> Chosen:
    """The form that attends; Args as for ``attend``, of arrays only the shapes count.

    "auto" takes dense for short rows and under dropout of the weights, else the platform's kernel where it can do the
    pattern, else blockwise.

    Raises:
      ValueError: a form by name that cannot do what is asked.
    """
    if form == "dense" or (form == "auto" and (has_dropout or key.shape[1] < DENSE_BELOW[platform()])):
        return "dense"
    lacks = {name: _lacks(name, query, key, pattern, window, has_bias, has_dropout) for name in ("splash", "fused")}
    if form == "auto":
        if platform() == "tpu" and not lacks["splash"]:
            return "splash"
        return "fused" if platform() == "gpu" and not lacks["fused"] and works_here(blockwise) else "blockwise"
    problem = lacks.get(form) or ("dropout of attention weights" if has_dropout else "")
    if problem:
        cure = "attention_dropout=0" if has_dropout else 'attention="auto" or "blockwise"'
        raise ValueError(f'attention="{form}" cannot do {problem}: set {cure}')
    return form


def _lacks(
    name: str, query: Any, key: Any, pattern: AttentionPattern, window: int | None, has_bias: bool, has_dropout: bool
) -> str:
    """What stands in the way of a kernel, or nothing."""
    if has_dropout:
        return "dropout of attention weights"
    if has_bias:
        return "a relative bias"
    if name == "splash":
        if pattern.order is None or pattern.query_groups is not None:
            return "a pattern that is neither bidirectional nor causal"
        pieces = split_of(query, key, pattern.order, window).context * LANES
        if query.shape[1] % pieces or key.shape[1] % LANES:
            return f"rows of {query.shape[1]} tokens, which is no multiple of {pieces}"
    return ""


def _blocks(scale: float, window: int | None) -> Callable[..., Array]:
    run = functools.partial(blockwise, scale=scale, window=window, tile=TILES[platform()])
    return lambda query, key, value, pattern, bias, _: run(query, key, value, pattern, bias=bias)


def _splash(
    split: Split,
    query: Array,
    key: Array,
    value: Array,
    pattern: AttentionPattern,
    scale: float,
    window: int | None,
) -> Array:
    mesh, queries = jax.sharding.get_abstract_mesh(), query.shape[1]
    assert pattern.order is not None
    heads = query.shape[2] // (mesh.shape[split.heads[0]] if split.heads else 1)
    # Where nothing is masked, all pieces of the queries have one mask.
    pieces = split.context if window is not None or isinstance(pattern.order, RowOrder) else 1
    kernel = splash_kernel(
        pattern.order,
        heads,
        places_of(split, queries)[: queries * pieces // split.context],
        key.shape[1],
        window,
        shards=pieces,
        interpret=platform() != "tpu",
    )
    spec = PartitionSpec(None, CONTEXT if pieces > 1 else None)
    specs = kernel.manual_sharding_spec(NamedSharding(mesh, spec)) if split.axes else ()

    def run(query: Array, key: Array, value: Array, pattern: AttentionPattern, _: None, kernel: Any) -> Array:
        fast = lambda *args: splash(kernel, *args, scale=scale)  # noqa: E731
        if window is None:
            return fast(query, key, value, pattern)
        # Its windows are of places, ours of positions.
        slow = lambda *args: _blocks(scale, window)(*args, None, None)  # noqa: E731
        return jax.lax.cond(places_are_positions(pattern), fast, slow, query, key, value, pattern)

    return spread(run, split, query, key, value, pattern, None, kernel, specs)


# ------------------------------------------------------------------------------------------- dense


def spell_out(bias: Array, pattern: AttentionPattern) -> Array:
    """The bias of every pair, [R, H, Q, L], from a table by distance, once for all layers."""
    reach = bias.shape[0] // 2
    distance_RQL = pattern.key_positions[:, None, :] - pattern.query_positions[:, :, None]
    return jnp.moveaxis(jnp.take(bias, jnp.clip(distance_RQL, -reach, reach) + reach, axis=0), -1, 1)


def dense(
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
    """``attend`` with the whole mask, [R, Q, L]; ``bias`` is [R, H, Q, L]."""
    rows, queries, heads, width = query.shape
    keys, groups = key.shape[1:3]
    # Heads first, and the queries that share a key head in one product: other layouts are slower on a CPU, and some
    # have no bfloat16 form there.
    query_RGQC = jnp.swapaxes(query, 1, 2).reshape(rows, groups, -1, width)
    key_RGLC, value_RGLC = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    scores_RGQL = scale * jnp.einsum("rgqc,rglc->rgql", query_RGQC, key_RGLC, preferred_element_type=jnp.float32)
    scores_RHQL = scores_RGQL.reshape(rows, heads, queries, keys)
    if bias is not None:
        scores_RHQL += bias
    seen_RQL = visible(pattern, window)
    scores_RHQL = jnp.where(seen_RQL[:, None], scores_RHQL, jnp.finfo(jnp.float32).min)
    weights_RHQL = jax.nn.softmax(scores_RHQL, axis=-1)
    if dropout is not None:
        weights_RHQL = dropout(weights_RHQL)
    weights_RGQL = weights_RHQL.astype(value.dtype).reshape(scores_RGQL.shape)
    out_RGQC = jnp.einsum("rgql,rglc->rgqc", weights_RGQL, value_RGLC, preferred_element_type=jnp.float32)
    out_RQHC = jnp.swapaxes(out_RGQC.reshape(rows, heads, queries, width), 1, 2)
    # a query that sees nothing has spread its weights over everything
    return jnp.where(seen_RQL.any(-1)[..., None, None], out_RQHC, 0.0).astype(query.dtype)
