"""One mesh, one rule table: where every parameter, optimizer moment and row lives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpt.types import AXIS_RULES, MESH_AXES, ROW_STATE, Batch, ParamSpec, Tree

ROWS = AXIS_RULES["batch"]


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged. One axis may be -1: all the devices that the others leave."""

    data: int = -1
    """Replicas of the parameters; each takes a part of the rows."""
    fsdp: int = 1
    """Devices over which parameters and optimizer state are split; each takes a part of the rows, too."""
    tensor: int = 1
    """Devices over which heads, feed-forward width and vocabulary are split."""
    context: int = 1
    """Devices over which the positions of a row are split."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of a run.

    Args:
      config: sizes of the axes; at most one is -1.
      devices: all devices of all processes by default.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.

    >>> dict(make_mesh(MeshConfig(fsdp=2, tensor=2)).shape)
    {'data': 2, 'fsdp': 2, 'tensor': 2, 'context': 1}
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    shown = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {shown}: sizes are positive, and at most one of them is -1")
    known = math.prod(size for size in sizes if size != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ValueError(
            f"mesh {shown} needs a multiple of {known} devices, and there are {len(devices)}: "
            f"change --mesh.* so that the product is {len(devices)} (-1 takes what is left)"
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def partition_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    """Return where an array lives: each logical axis by ``AXIS_RULES``, a mesh axis once, and only where it divides.

    >>> mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    >>> partition_spec(("vocab", "embed"), (30, 16), mesh) == P("tensor", "fsdp")
    True
    >>> partition_spec(("vocab", "embed"), (31, 16), mesh) == P(None, "fsdp")
    True
    """
    assert len(axes) == len(shape), f"{axes} names {len(axes)} dimensions of an array of shape {shape}"
    used: set[str] = set()
    entries: list[str | tuple[str, ...] | None] = []
    for name, size in zip(axes, shape, strict=True):
        wanted = tuple(a for a in AXIS_RULES.get(name or "", ()) if a not in used and mesh.shape[a] > 1)
        if not wanted or size % math.prod(mesh.shape[a] for a in wanted):
            entries.append(None)
            continue
        used.update(wanted)
        entries.append(wanted[0] if len(wanted) == 1 else wanted)
    return P(*entries)


def param_shardings(specs: Tree, shapes: Tree, mesh: Mesh) -> Tree:
    """Return a NamedSharding per parameter from its logical axes."""
    return jax.tree.map(
        lambda spec, leaf: NamedSharding(mesh, partition_spec(spec.axes, leaf.shape, mesh)),
        specs,
        shapes,
        is_leaf=lambda leaf: isinstance(leaf, ParamSpec),
    )


def state_shardings(state: Tree, specs: Tree, shapes: Tree, mesh: Mesh) -> Tree:
    """Return a NamedSharding per leaf of the whole train state.

    A leaf whose path ends with a parameter's path and which has its shape lives where the parameter lives: that
    finds the moments in any optax state, averaged parameters, and networks kept in the carry. What stands under
    ``ROW_STATE`` is spread by rows. Everything else (counts, factored moments, which are small) is replicated.

    Args:
      state: tree of ShapeDtypeStructs (from ``jax.eval_shape``).
      specs, shapes: the parameters' specs and shapes.
      mesh: the run's mesh.
    """
    wanted = jax.tree_util.tree_leaves_with_path(param_shardings(specs, shapes, mesh))
    leaves = [leaf.shape for leaf in jax.tree.leaves(shapes)]
    by_path = {path: (shape, sharding) for (path, sharding), shape in zip(wanted, leaves, strict=True)}
    longest = max((len(path) for path in by_path), default=0)

    def place(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        for length in range(min(longest, len(path)), 0, -1):
            shape, sharding = by_path.get(path[-length:], (None, None))
            if sharding is not None and shape == leaf.shape:
                return sharding
        if any(getattr(part, "key", None) == ROW_STATE for part in path):
            return NamedSharding(mesh, partition_spec(("batch", *[None] * (len(leaf.shape) - 1)), leaf.shape, mesh))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, state)


def check_rows(batch_size: int, microbatches: int, mesh: Mesh) -> None:
    """Raise ValueError where a batch cannot be cut into equal microbatches over the devices."""
    parts = math.prod(mesh.shape[axis] for axis in ROWS)
    if batch_size % (microbatches * parts):
        raise ValueError(
            f"batch_size {batch_size} cannot be cut into {microbatches} microbatches over data x fsdp = {parts} "
            f"devices: make it a multiple of {microbatches * parts}"
        )


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Return the rows of the global batch, ascending, that this process must read."""
    placed = NamedSharding(mesh, P(ROWS)).addressable_devices_indices_map((batch_size,))
    rows = [np.arange(batch_size)[index] for index in placed.values() if index is not None]
    return np.unique(np.concatenate(rows))


def put_batch(batch: Batch, rows: np.ndarray, batch_size: int, mesh: Mesh) -> Batch:
    """Return the global batch on the devices, from the rows of it that this process holds.

    Args:
      batch: numpy arrays with this process's rows.
      rows: their places in the global batch, ascending (``local_rows``).
      batch_size: rows of the global batch.
      mesh: the run's mesh.
    """
    sharding = NamedSharding(mesh, P(ROWS))

    def put(local: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            wanted = np.arange(batch_size)[index[0] if index else slice(None)]
            return local[np.searchsorted(rows, wanted)]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, part)

    return jax.tree.map(put, batch)


def constrain_rows(tree: Tree, axis: int = 0) -> Tree:
    """Return the tree with the rows of every leaf spread over the devices of the ambient mesh, if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    spec = P(*[None] * axis, tuple(a for a in ROWS))
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, spec), tree)
