"""Compile the train step of a configuration for a topology, and read what it needs from the compiled program."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpt.config import BUILT_IN, PhaseConfig, RunConfig, parse_source, resolve_phases, validate, with_layers
from jaxpt.data.manifest import load_vocab
from jaxpt.data.pipeline import Phase
from jaxpt.metrics import matmul_flops
from jaxpt.plan.advice import advise, remark
from jaxpt.plan.collectives import collectives
from jaxpt.plan.hardware import Chip, axis_bandwidth, layout, open_topology
from jaxpt.plan.memory import Memory, bytes_needed, measure_memory
from jaxpt.plan.traffic import Traffic, group
from jaxpt.sharding import ROWS, check_rows, make_mesh
from jaxpt.train import compiled_train_step, make_parts, step_flops
from jaxpt.types import Batch, RowSpec, Vocab

SENTINELS = 256  # of a stand-in vocabulary: enough for every objective


@dataclass(frozen=True)
class Roofline:
    """Seconds per step that no program can beat on this hardware; no measurement."""

    compute: float  # executed FLOPs / peak
    memory: float  # state and temporaries once through memory: at least
    communication: dict[str, float]  # by mesh axis
    overlapped: float  # everything at once: the slowest of the three
    serial: float  # nothing at once: their sum
    mfu: tuple[float, float]  # without and with overlap


@dataclass(frozen=True)
class Plan:
    """What a run needs on a topology."""

    topology: str
    chips: int
    mesh: dict[str, int]
    layout: dict[str, tuple[int, ...]]  # mesh axis: how many places it takes in each dimension of the slice
    vocabulary: str
    batch_size: int
    seq_len: int
    microbatches: int
    parameters: int
    flops: float  # useful ones of one step, all chips
    executed_flops: float  # with what is computed again in the backward pass
    memory: Memory
    traffic: tuple[Traffic, ...]
    roofline: Roofline | None
    advice: tuple[str, ...]
    seconds: float  # to compile


def make_plan(config: RunConfig, topology: str, say: Callable[[str], None] = lambda line: None) -> Plan:
    """Return what a run needs on a topology.

    The step is the one that ``train`` runs: the same function, shardings and donation. Of several phases the
    one with the most tokens per batch is taken, and the longest rows among those.

    Args:
      config: the run; its data need not be there.
      topology: "v5p:4x4x4", "v6e:16x16", ..., or "cpu:8".
      say: told what goes on; compiling takes minutes.

    Raises:
      ValueError: configuration, mesh and topology do not go together, or libtpu is not installed.
    """
    validate(config, data=False)
    devices, chip = open_topology(topology)
    mesh = make_mesh(config.mesh, devices)
    phase = max(resolve_phases(config), key=lambda p: ((p.batch_size or 0) * (p.seq_len or 0), p.seq_len or 0))
    assert phase.batch_size and phase.seq_len  # resolved
    check_rows(phase.batch_size, config.microbatches, mesh)
    vocab, told = find_vocab(config, phase)
    # The mesh is set for tracing only: what runs at once (keys, constants) must run on this machine.
    parts = make_parts(config, vocab, mesh)
    batch = abstract_batch(parts.objective.rows, phase.seq_len, phase.batch_size, mesh)
    step = compiled_train_step(config, parts, mesh)
    flops = step_flops(parts, batch, Phase(0, (), phase.seq_len, phase.batch_size))
    executed = executed_flops(config, vocab, mesh, batch)
    begin = time.perf_counter()
    say("lowering the train step ...")
    with jax.set_mesh(mesh):
        lowered = step.lower(parts.abstract, batch)
    say(f"compiling for {len(devices)} x {devices[0].device_kind}; this takes some minutes ...")
    try:
        compiled, needed = lowered.compile(), None
    except jax.errors.JaxRuntimeError as error:
        compiled, needed = None, bytes_needed(str(error))
        if needed is None:
            raise _refused(str(error)) from error
    seconds = time.perf_counter() - begin
    found = [] if compiled is None else collectives(compiled.as_text(), dict(mesh.shape))
    memory = measure_memory(parts, batch, compiled, needed, chip)
    traffic = group(found, parts.abstract.params)
    sides = layout(mesh) if chip else {}
    return Plan(
        topology,
        len(devices),
        dict(mesh.shape),
        sides,
        told,
        phase.batch_size,
        phase.seq_len,
        config.microbatches,
        sum(leaf.size for leaf in jax.tree.leaves(parts.abstract.params)),
        flops,
        executed,
        memory,
        traffic,
        roofline(flops, executed, memory, traffic, mesh, chip) if chip and compiled else None,
        (*advise(config, memory, mesh.shape, phase), *remark(traffic, sides)),
        seconds,
    )


def _refused(message: str) -> ValueError:
    """An error of the compiler for which the run is not to blame."""
    fix = "try another --mesh or --microbatches, or a newer libtpu"
    if "sparse_core" in message:
        fix = 'set LIBTPU_INIT_ARGS="--xla_tpu_offload_gather_to_sparsecore=false" (for the run, too)'
    return ValueError(f"the compiler failed ({message.partition(chr(10))[0][:200]}): {fix}")


# ------------------------------------------------------------------------------------------------ what goes in


def find_vocab(config: RunConfig, phase: PhaseConfig) -> tuple[Vocab, str]:
    """Return the vocabulary of the data where they are there, else one of ``vocab_size`` tokens, and which it is."""
    for path, _ in map(parse_source, phase.data or ()):
        if path not in BUILT_IN:
            try:
                vocab = load_vocab(path)
            except ValueError:
                continue
            return vocab, f"{vocab.size:,} tokens, of {path}"
    return stand_in_vocab(config.vocab_size), f"{config.vocab_size:,} tokens, a stand-in of --vocab-size"


def stand_in_vocab(size: int) -> Vocab:
    """Return a vocabulary with every special token and numbers of no meaning."""
    special = np.zeros(size, bool)
    special[:7] = True
    last = tuple(range(size - 1, size - 1 - min(SENTINELS, size // 4), -1))
    special[list(last)] = True
    places = np.arange(size)
    counts = np.where(special, 0, 10**6 // (1 + places))  # uneven, as words are: a table of ones is folded away
    return Vocab(
        size, 0, 1, 2, 3, 4, 5, 6, last, special, special | (places % 3 > 0), counts, (1 + places % 5).astype(np.int32)
    )


def abstract_batch(rows: RowSpec, length: int, size: int, mesh: Mesh) -> Batch:
    """Return the shapes of a batch, placed as ``put_batch`` places it."""
    sharding = NamedSharding(mesh, P(ROWS))

    def leaf(dtype: str, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=sharding)

    width = rows.tokens(length)
    token: Any = leaf("int32", width)
    extras: dict[str, Any] = dict.fromkeys(rows.fields, token)
    return Batch(token, token, token, token, leaf("uint32"), leaf("int32"), leaf("float32"), extras)


# ------------------------------------------------------------------------------------------------ what comes out


def executed_flops(config: RunConfig, vocab: Vocab, mesh: Mesh, batch: Batch) -> float:
    """Return the matrix FLOPs that a step executes; attention counts as whole squares, as in ``step_flops``."""
    config = replace(config, objective=with_layers(config.objective, attention="dense"))
    parts = make_parts(config, vocab, mesh)
    return matmul_flops(compiled_train_step(config, parts, mesh), parts.abstract, batch)


def roofline(
    flops: float, executed: float, memory: Memory, traffic: tuple[Traffic, ...], mesh: Mesh, chip: Chip
) -> Roofline:
    """Return the bounds of a step's time: compute, memory and links, each at its data sheet's speed."""
    useful, compute = (number / mesh.size / chip.flops for number in (flops, executed))
    state = memory.params + memory.optimizer + memory.other
    through = (2 * state + 2 * memory.temporaries) / chip.memory_bandwidth
    communication: dict[str, float] = {}
    for line in traffic:
        speed = sum(axis_bandwidth(mesh, axis, chip) for axis in line.axis.split("+"))
        communication[line.axis] = communication.get(line.axis, 0.0) + line.bytes / speed
    # axes share no link, but the compiler may run them one after the other
    fastest = max(compute, through, max(communication.values(), default=0.0))
    slowest = compute + through + sum(communication.values())
    return Roofline(compute, through, communication, fastest, slowest, (useful / slowest, useful / fastest))
