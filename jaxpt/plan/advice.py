"""What to change where a run does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxpt.config import PhaseConfig, RunConfig, parts, with_layers
from jaxpt.plan.memory import Memory
from jaxpt.plan.traffic import Traffic
from jaxpt.sharding import ROWS


def networks(config: RunConfig) -> list[tuple[str, Any]]:
    """Return every stack of layers in a run's objective, with the flag that leads to it."""
    found = parts("objective", config.objective)
    return [(f"--{path.replace('_', '-')}", value) for path, value in found if hasattr(value, "remat")]


def advise(config: RunConfig, memory: Memory, mesh: Mapping[str, int], phase: PhaseConfig) -> Iterator[str]:
    """Say what would make a run fit that does not, with the bytes per chip that each change saves."""
    if memory.fits:
        return
    assert phase.batch_size and phase.seq_len
    gib = 2**30
    over = "" if memory.capacity is None else f" of {memory.capacity / gib:.1f}"
    yield f"needs {memory.peak / gib:.1f}{over} GiB per chip; what would help, and about how many GiB each saves:"
    split = math.prod(mesh[axis] for axis in ROWS)
    rows = phase.batch_size // config.microbatches // split
    for flag, network in networks(config):
        if network.remat != "full":
            width = 2 if network.dtype == "bfloat16" else 4
            kept = rows * phase.seq_len * network.width * width * network.depth
            saved = max(memory.temporaries - 2 * kept, 0) / gib
            yield (
                f"{flag}.remat full: up to {saved:.1f} ({kept / gib:.2f} of layer inputs stay; a third more compute)"
            )
    if rows > 1:
        more = config.microbatches * next(n for n in range(2, rows + 1) if rows % n == 0)
        saved = memory.temporaries * (1 - config.microbatches / more) / gib
        yield f"--microbatches {more}: up to {saved:.1f} of activations"
    else:
        yield "one row per chip and microbatch already: --mesh.tensor or --mesh.context split what is left of a row"
    data = mesh["data"]
    if data > 1:
        state = memory.params + memory.optimizer
        yield (
            f"--mesh.data 1 --mesh.fsdp {mesh['fsdp'] * data}: {state * (1 - 1 / data) / gib:.1f} of parameters "
            f"and optimizer state"
        )
    if config.optimizer.name != "adafactor":
        yield f"--optimizer.name adafactor: {memory.optimizer / gib:.1f} of optimizer state (another optimizer)"


def remark(traffic: Sequence[Traffic], sides: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Say why parameters or gradients are reduced whole where the layout of the mesh is the cause.

    Args:
      traffic: the collectives of a step.
      sides: over how many places of each dimension of the slice every mesh axis runs (``layout``).
    """
    over = [places for places in sides.get("fsdp", ()) if places > 1]
    if len(over) > 1 and any(not line.wanted and line.axis == "fsdp" for line in traffic):
        yield (
            f"fsdp runs over {len(over)} sides of the slice: there the TPU compiler makes all-reduces of "
            f"reduce-scatters, and on v5p of gathers. Over one side, --mesh.fsdp {max(over)}, it does not, but every "
            f"chip then holds a greater part of the state"
        )


def remedies(config: RunConfig, mesh: Mapping[str, int], batch_size: int) -> Iterator[tuple[str, RunConfig]]:
    """Yield changed configurations that need less memory, the cheapest change first, each on top of the last."""
    if mesh["data"] > 1:
        fsdp = mesh["fsdp"] * mesh["data"]
        config = replace(config, mesh=replace(config.mesh, data=1, fsdp=fsdp))
        yield f"--mesh.data 1 --mesh.fsdp {fsdp}", config
    flags = [f"{flag}.remat full" for flag, network in networks(config) if network.remat != "full"]
    if flags:
        config = replace(config, objective=with_layers(config.objective, remat="full"))
        yield " ".join(flags), config
    rows = batch_size // config.microbatches // (mesh["data"] * mesh["fsdp"])
    while rows > 1:
        factor = next(n for n in range(2, rows + 1) if rows % n == 0)
        rows //= factor
        config = replace(config, microbatches=config.microbatches * factor)
        yield f"--microbatches {config.microbatches}", config
