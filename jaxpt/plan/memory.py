"""What a compiled step keeps in the memory of one chip."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import jax

from jaxpt.plan.hardware import Chip
from jaxpt.train import Parts
from jaxpt.types import Batch, Tree


@dataclass(frozen=True)
class Memory:
    """Bytes per chip."""

    params: int
    optimizer: int
    other: int  # batch, moving average, carry, counters
    temporaries: int  # activations, gathered parameters, gradients
    peak: int
    capacity: float | None  # None: not known
    fits: bool


def bytes_on_chip(tree: Tree) -> int:
    """Return what the leaves of a tree of placed ShapeDtypeStructs take on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def bytes_needed(message: str) -> tuple[float, float] | None:
    """Return what a program needs and what there is, from the TPU compiler's refusal.

    >>> bytes_needed("the total memory required for HLO temporaries (24.50G) exceeds available HBM (16.00G).")
    (26306674688.0, 17179869184.0)
    """
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(r"temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", message)
    found = found or re.search(r"[Uu]sed ([\d.]+)([KMGT])i?B? of ([\d.]+)([KMGT])i?B? hbm", message)
    if not found:
        return None
    need, need_unit, there, there_unit = found.groups()
    return float(need) * unit[need_unit], float(there) * unit[there_unit]


def measure_memory(
    parts: Parts, batch: Batch, compiled: Any, needed: tuple[float, float] | None, chip: Chip | None
) -> Memory:
    """Return the memory of one chip; ``needed`` is the compiler's refusal where there is no program."""
    state = parts.abstract
    params, optimizer = bytes_on_chip(state.params), bytes_on_chip(state.opt_state)
    other = bytes_on_chip(state) + bytes_on_chip(batch) - params - optimizer
    capacity = chip.memory if chip else None
    if needed is not None:  # both with arguments and results, though the compiler calls it temporaries
        peak, capacity = needed
        rest = max(round(peak) - params - optimizer - other, 0)
        return Memory(params, optimizer, other, rest, round(peak), capacity, False)
    stats = compiled.memory_analysis()
    fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.generated_code_size_in_bytes
    arguments = stats.argument_size_in_bytes
    # padding of the arguments to the chip's tiles is in "other"
    other = max(arguments - params - optimizer, 0) + fresh
    peak = arguments + fresh + stats.temp_size_in_bytes
    if chip:  # the compiler's own number, below the sum where not all temporaries live at once
        peak = getattr(stats, "peak_memory_in_bytes", 0) or peak
    temporaries = max(peak - params - optimizer - other, 0)
    return Memory(params, optimizer, other, temporaries, peak, capacity, fits=True)  # or there would be no program
