"""Attention on a mesh: rows over data and fsdp, heads over tensor, queries over context, each device by itself.

Keys, values and what the pattern says of the keys are gathered over context: as visibility is a rule on integers,
any piece of the queries can be answered anywhere, exactly, in memory linear in the length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jaxpt.types import AXIS_RULES, Array, AttentionPattern, Everyone

CONTEXT = "context"


class Split(NamedTuple):
    """How one attention call is cut over the ambient mesh."""

    axes: frozenset[str]  # mesh axes that the compiler would else decide about; none = one device
    rows: tuple[str, ...]
    heads: tuple[str, ...]
    copies: int  # of each key head, so that every device has its own
    context: int  # pieces of the queries
    gather: bool  # keys are cut, too
    balanced: bool  # each device answers one early and one late piece


def split_of(query: Array, key: Array, order: Any, window: int | None) -> Split:
    """The split for these shapes; axes that do not divide a dimension leave it whole."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {
        name: mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }
    rows, left = [], query.shape[0]
    for name in AXIS_RULES["batch"]:
        if left % sizes.get(name, 1) == 0 and sizes.get(name, 1) > 1:
            rows.append(name)
            left //= sizes[name]
    heads, copies = (), 1
    tensor = math.prod(sizes.get(name, 1) for name in AXIS_RULES["heads"])
    if tensor > 1 and query.shape[2] % tensor == 0:
        copies = tensor // math.gcd(tensor, key.shape[2])
        if (key.shape[2] * copies) % tensor == 0 and query.shape[2] % (key.shape[2] * copies) == 0:
            heads = AXIS_RULES["heads"]
    context = sizes.get(CONTEXT, 1)
    context = context if query.shape[1] % context == 0 else 1
    return Split(
        axes=frozenset(sizes) if math.prod(sizes.values()) > 1 else frozenset(),
        rows=tuple(rows),
        heads=heads,
        copies=copies if heads else 1,
        context=context,
        gather=context > 1 and key.shape[1] % context == 0,
        # With ranks along the row the first piece would see least and the last one most; a window sees alike.
        balanced=context > 1
        and window is None
        and not isinstance(order, Everyone)
        and query.shape[1] % (2 * context) == 0,
    )


def places_of(split: Split, queries: int) -> np.ndarray:
    """[Q] the place in the row of each query, as the devices along context hold them one after the other."""
    places = np.arange(queries)
    if not split.balanced:
        return places
    early, late = _owners(split.context)
    holds = {owner: [0, 0] for owner in range(split.context)}
    for device in range(split.context):
        holds[early[device]][0], holds[late[device]][1] = 2 * device, 2 * device + 1
    pieces = np.split(places, 2 * split.context)
    return np.concatenate([pieces[piece] for owner in range(split.context) for piece in holds[owner]])


def _owners(devices: int) -> tuple[list[int], list[int]]:
    """Who answers the first and who the second half of each device's queries: piece p or 2 n - 1 - p for device p."""
    owner = [min(piece, 2 * devices - 1 - piece) for piece in range(2 * devices)]
    return owner[::2], owner[1::2]


def spread(
    function: Callable[..., Array],
    split: Split,
    query: Array,
    key: Array,
    value: Array,
    pattern: AttentionPattern,
    bias: Array | None,
    extra: Any = (),
    extra_specs: Any = (),
) -> Array:
    """Run ``function(query, key, value, pattern, bias, extra)`` on each device's part.

    Args:
      function: attends; returns [R, Q, H, C].
      split: from ``split_of``.
      query, key, value, pattern: as for ``attend``.
      bias: [2 D + 1, H] or None.
      extra: any tree, cut by ``extra_specs``.
    """
    if not split.axes:
        return function(query, key, value, pattern, bias, extra)
    if split.copies > 1:
        key, value = (jnp.repeat(x, split.copies, axis=2) for x in (key, value))
    context = CONTEXT if split.context > 1 else None
    rows, heads = split.rows or None, split.heads or None
    key_spec = PartitionSpec(rows, CONTEXT if split.gather else None, heads)
    query_spec = PartitionSpec(rows, context, heads)
    specs = [
        None if x is None else PartitionSpec(rows, context if name.startswith("query") else None)
        for name, x in pattern._asdict().items()
        if name != "order"
    ]
    pattern_spec = AttentionPattern._make([*specs, pattern.order])

    def local(query: Array, key: Array, value: Array, pattern: AttentionPattern, bias: Any, extra: Any) -> Array:
        if split.gather:
            key, value = (jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True) for x in (key, value))
        if not split.balanced:
            return function(query, key, value, pattern, bias, extra)
        moved = {
            name: _exchange(x, split.context, back=False)
            for name, x in pattern._asdict().items()
            if name.startswith("query") and x is not None
        }
        query = _exchange(query, split.context, back=False)
        out = function(query, key, value, pattern._replace(**moved), bias, extra)
        return _exchange(out, split.context, back=True)

    return jax.shard_map(
        local,
        in_specs=(query_spec, key_spec, key_spec, pattern_spec, PartitionSpec(None, heads), extra_specs),
        out_specs=query_spec,
        axis_names=set(split.axes),
        check_vma=False,  # the kernels do not say over which axes their results vary
    )(query, key, value, pattern, bias, extra)


def _exchange(x: Array, devices: int, *, back: bool) -> Array:
    """Send both halves of a device's queries to who answers them, or the answers back: two permutations."""
    halves = jnp.split(x, 2, axis=1)
    for half, owners in enumerate(_owners(devices)):
        pairs = [(owner, device) if back else (device, owner) for device, owner in enumerate(owners)]
        halves[half] = jax.lax.ppermute(halves[half], CONTEXT, pairs)
    return jnp.concatenate(halves, axis=1)
