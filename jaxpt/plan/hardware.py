"""What the makers' data sheets say of a chip, and how fast a mesh axis is on it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip, from its data sheet.

    Args:
      flops: dense bfloat16 FLOP/s.
      memory: bytes of high-bandwidth memory.
      memory_bandwidth: bytes/s of it.
      link_bandwidth: bytes/s of one link to a neighbour, one way.
      torus: a side of the slice wraps around where it is a multiple of this.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    torus: int


# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. Their "bidirectional ICI bandwidth per chip" is both ways and all links
# together (v5p: 1,200 GB/s over 6 links; v5e 400 and v6e 800 over 4; v4: 2,400 Gbps one way over 6).
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 50e9, 4),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 50e9, 16),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 100e9, 4),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 100e9, 16),
}


def open_topology(name: str) -> tuple[Sequence[Any], Chip | None]:
    """Return the devices of a topology, none of which need be here, and what its chip can do.

    Args:
      name: "v5p:4x4x4" and the like, or "cpu:8" for virtual devices of this machine.

    Raises:
      ValueError: there is no such topology, or libtpu is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind == "cpu":
        return _cpu_devices(name, shape), None
    if kind not in CHIPS or not shape:
        raise ValueError(f"--topology {name}: it is KIND:SHAPE, KIND one of {', '.join(CHIPS)}, for example v5p:4x4x4")
    from jax.experimental import topologies

    # Two cores of a v4 chip are one device, as they are in a run.
    more = {"megacore": True} if kind == "v4" else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices, CHIPS[kind]
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        if "lockfile" in reason:
            raise ValueError(
                f"--topology {name}: another process uses the TPU compiler; wait for it or set "
                f"ALLOW_MULTIPLE_LIBTPU_LOAD=1"
            ) from None
        if "not installed" in reason or "libtpu" in reason.lower() or "unknown backend" in reason.lower():
            raise ValueError(
                f'--topology {name} needs the TPU compiler, libtpu, but no TPU: pip install -e ".[tpu]" ({reason})'
            ) from None
        raise ValueError(
            f"--topology {name} is no slice that the TPU compiler knows ({reason}): shapes look like 4x4x4 for v4 and "
            f"v5p, 8x8 for v5e and v6e"
        ) from None


def _cpu_devices(name: str, count: str) -> Sequence[Any]:
    if not count.isdigit() or int(count) < 1:
        raise ValueError(f"--topology {name}: write cpu:8 for eight virtual devices of this machine")
    with contextlib.suppress(RuntimeError):  # the backend runs already and has what it has
        jax.config.update("jax_num_cpu_devices", int(count))
    devices = jax.devices("cpu")
    if len(devices) < int(count):
        raise ValueError(f"--topology {name}: this process has {len(devices)} CPU devices already")
    return devices[: int(count)]


def axis_bandwidth(mesh: Mesh, axis: str, chip: Chip) -> float:
    """Bytes/s that a chip can receive along a mesh axis.

    Every dimension of the slice that the axis runs along gives two links where it spans a side that wraps around,
    else one (at the ends of a line there is one neighbour). Links are one-way figures.
    """
    places = np.array([device.coords for device in mesh.devices.flat]).reshape(*mesh.devices.shape, -1)
    sides = places.reshape(-1, places.shape[-1]).max(0) + 1
    number = mesh.axis_names.index(axis)
    line = np.moveaxis(places, number, 0).reshape(mesh.shape[axis], -1, places.shape[-1])[:, 0]
    links = 0
    for dimension, side in enumerate(sides):
        spanned = len(np.unique(line[:, dimension]))
        if spanned > 1:
            links += 2 if spanned == side and side % chip.torus == 0 else 1
    return max(links, 1) * chip.link_bandwidth


def layout(mesh: Mesh) -> dict[str, tuple[int, ...]]:
    """Return over how many places of each dimension of the slice every mesh axis runs."""
    places = np.array([device.coords for device in mesh.devices.flat]).reshape(*mesh.devices.shape, -1)
    result = {}
    for number, axis in enumerate(mesh.axis_names):
        line = np.moveaxis(places, number, 0).reshape(mesh.shape[axis], -1, places.shape[-1])[:, 0]
        if mesh.shape[axis] > 1:
            result[axis] = tuple(len(np.unique(column)) for column in line.T)
    return result
