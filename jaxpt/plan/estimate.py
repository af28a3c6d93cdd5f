"""Compile the train step of a configuration for a topology, and read what it needs from the compiled program."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpt.config import BUILT_IN, PhaseConfig, RunConfig, parse_source, resolve_phases, validate
from jaxpt.data.manifest import load_vocab
from jaxpt.data.pipeline import Phase
from jaxpt.metrics import matmul_flops
from jaxpt.plan.collectives import Collective, collectives
from jaxpt.plan.hardware import Chip, axis_bandwidth, open_topology
from jaxpt.sharding import ROWS, check_rows, make_mesh
from jaxpt.train import Parts, compiled_train_step, make_parts, step_flops
from jaxpt.types import Batch, RowSpec, Tree, Vocab

SENTINELS = 100


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


@dataclass(frozen=True)
class Traffic:
    """Like collectives, together."""

    kind: str
    axis: str
    dtype: str
    purpose: str
    count: int  # executions per step
    bytes: int  # that a chip receives per step
    wanted: bool


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
    flops, executed = count_flops(config, vocab, mesh, batch, phase)
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
    traffic = group(found, parts.abstract.params, config)
    return Plan(
        topology,
        len(devices),
        dict(mesh.shape),
        layout(mesh) if chip else {},
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
        tuple(advise(config, parts, memory, mesh, phase)),
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


def count_flops(config: RunConfig, vocab: Vocab, mesh: Mesh, batch: Batch, phase: PhaseConfig) -> tuple[float, float]:
    """Return the useful and the executed matrix FLOPs of a step.

    Attention counts as whole squares, whatever kernel runs it: how many tiles one skips is not known before.
    """
    assert phase.seq_len and phase.batch_size
    config = replace(config, objective=_with(config.objective, attention="dense"))
    parts = make_parts(config, vocab, mesh)
    useful = step_flops(parts, batch, Phase(0, (), phase.seq_len, phase.batch_size))
    return useful, matmul_flops(compiled_train_step(config, parts, mesh), parts.abstract, batch)


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
    if needed is not None:
        temporaries = round(needed[0])
        return Memory(params, optimizer, other, temporaries, params + optimizer + other + temporaries, capacity, False)
    stats = compiled.memory_analysis()
    fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.generated_code_size_in_bytes
    arguments = stats.argument_size_in_bytes
    # padding of the arguments to the chip's tiles is in "other"
    other = max(arguments - params - optimizer, 0) + fresh
    peak = arguments + fresh + stats.temp_size_in_bytes
    return Memory(
        params, optimizer, other, stats.temp_size_in_bytes, peak, capacity, capacity is None or peak <= capacity
    )


def layout(mesh: Mesh) -> dict[str, tuple[int, ...]]:
    """Return over how many places of each dimension of the slice every mesh axis runs."""
    places = np.array([device.coords for device in mesh.devices.flat]).reshape(*mesh.devices.shape, -1)
    result = {}
    for number, axis in enumerate(mesh.axis_names):
        line = np.moveaxis(places, number, 0).reshape(mesh.shape[axis], -1, places.shape[-1])[:, 0]
        if mesh.shape[axis] > 1:
            result[axis] = tuple(len(np.unique(column)) for column in line.T)
    return result


def group(found: list[Collective], params: Tree, config: RunConfig) -> tuple[Traffic, ...]:
    """Return the collectives of a step by kind, axis, type and purpose, the costliest first."""
    shapes = {_plain(shape) for leaf in jax.tree.leaves(params) for shape in (leaf.shape, leaf.shape[1:])}
    shapes.discard(())
    table: dict[tuple[str, str, str, str], list[Collective]] = {}
    for each in found:
        table.setdefault((each.kind, each.axis, each.dtype, purpose_of(each, shapes)), []).append(each)
    whole = max(sum(each.total for each in found), 1)
    lines = []
    for (kind, axis, dtype, purpose), members in table.items():
        total = sum(each.total for each in members)
        large = total > 0.01 * whole
        strange = not purpose.startswith(("parameters", "gradients", "sums"))
        rows = any(name in axis for name in ROWS)
        whole_gradient = kind == "all-reduce" and "fsdp" in axis and purpose.startswith(("gradients", "parameters"))
        wanted = not large or not ((rows and strange) or whole_gradient)
        lines.append(Traffic(kind, axis, dtype, purpose, sum(each.times for each in members), total, wanted))
    return tuple(sorted(lines, key=lambda line: -line.bytes))


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Dimensions above 1 in order of size: transposition and singletons do not matter."""
    return tuple(sorted(n for n in shape if n > 1))


def purpose_of(each: Collective, shapes: set[tuple[int, ...]]) -> str:
    """Say what a collective is for.

    An array with the dimensions of a parameter (of one layer of it), whole or with one dimension cut, is that
    parameter where it is gathered and its gradient where it is reduced or scattered. The rest is activations.
    """
    backward = "transpose(jvp" in each.op_name
    recomputed = "rematted_computation" in each.op_name
    forward = not backward and "jvp(" in each.op_name
    when = "recomputed" if recomputed else "backward" if backward else "forward" if forward else "once"
    reduces = each.kind in ("all-reduce", "reduce-scatter") or "scatter ring" in each.kind
    full = _plain(each.full)
    if math.prod(each.full) < 2**14:
        return "sums and small vectors"
    # a shape that is a parameter's but for one dimension, which is a part of the parameter's
    like = full in shapes or any(_is_part(full, shape) for shape in shapes)
    if reduces and set(each.axis.split("+")) <= set(ROWS):  # rows never meet but in their sums
        gathers = each.dtype == "bf16" or recomputed  # zeros but for the own part: a gather written as a sum
        return f"parameters, {when}, gathered by a sum" if like and gathers else "gradients"
    if like and not reduces:
        scattered = each.dtype == "f32" and backward and not recomputed and each.kind == "collective-permute"
        return "gradients" if scattered else f"parameters, {when}"
    places = [frame for frame in each.frames if not frame.startswith(("layers.py", "params.py"))]
    where = places[0] if places else each.op_name.rpartition("/")[2]
    return f"activations, {when}: {where}"


def _is_part(part: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    if len(part) != len(whole):
        return False
    rest = list(whole)
    cut = []
    for size in part:
        if size in rest:
            rest.remove(size)
        else:
            cut.append(size)
    return len(cut) == 1 and rest[0] % cut[0] == 0


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


# ------------------------------------------------------------------------------------------------ what to change


def networks(config: Any, path: str = "objective") -> Iterator[tuple[str, Any]]:
    """Yield every stack of layers in an objective's configuration, with the flag that leads to it."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        if hasattr(config, "remat"):
            yield path, config
        else:
            for each in dataclasses.fields(config):
                yield from networks(getattr(config, each.name), f"{path}.{each.name}")


def advise(config: RunConfig, parts: Parts, memory: Memory, mesh: Mesh, phase: PhaseConfig) -> Iterator[str]:
    """Say what would make a run fit that does not, with the bytes per chip that each change saves."""
    if memory.fits:
        return
    assert phase.batch_size and phase.seq_len
    gib = 2**30
    over = "" if memory.capacity is None else f" of {memory.capacity / gib:.1f}"
    yield f"needs {memory.peak / gib:.1f}{over} GiB per chip; what would help, and about how many GiB each saves:"
    split = math.prod(mesh.shape[axis] for axis in ROWS)
    rows = phase.batch_size // config.microbatches // split
    for path, network in networks(config.objective):
        if network.remat != "full":
            width = 2 if network.dtype == "bfloat16" else 4
            kept = rows * phase.seq_len * network.width * width * network.depth
            saved = max(memory.temporaries - 2 * kept, 0) / gib
            yield (
                f"--{path.replace('_', '-')}.remat full: up to {saved:.1f} ({kept / gib:.2f} of layer inputs stay; "
                f"a third more compute)"
            )
    if rows > 1:
        more = config.microbatches * next(n for n in range(2, rows + 1) if rows % n == 0)
        saved = memory.temporaries * (1 - config.microbatches / more) / gib
        yield f"--microbatches {more}: up to {saved:.1f} of activations"
    else:
        yield "one row per chip and microbatch already: --mesh.tensor or --mesh.context split what is left of a row"
    data = mesh.shape["data"]
    if data > 1:
        state = memory.params + memory.optimizer
        yield (
            f"--mesh.data 1 --mesh.fsdp {mesh.shape['fsdp'] * data}: {state * (1 - 1 / data) / gib:.1f} of parameters "
            f"and optimizer state"
        )
    if config.optimizer.name != "adafactor":
        yield f"--optimizer.name adafactor: {memory.optimizer / gib:.1f} of optimizer state (another optimizer)"


def remedies(config: RunConfig, plan: Plan) -> Iterator[tuple[str, RunConfig]]:
    """Yield changed configurations that need less memory, the cheapest change first, each on top of the last."""
    if plan.mesh["data"] > 1:
        fsdp = plan.mesh["fsdp"] * plan.mesh["data"]
        config = replace(config, mesh=replace(config.mesh, data=1, fsdp=fsdp))
        yield f"--mesh.data 1 --mesh.fsdp {fsdp}", config
    paths = [(path, network) for path, network in networks(config.objective) if network.remat != "full"]
    if paths:
        config = replace(config, objective=_with(config.objective, remat="full"))
        yield " ".join(f"--{path.replace('_', '-')}.remat full" for path, _ in paths), config
    rows = plan.batch_size // config.microbatches // (plan.mesh["data"] * plan.mesh["fsdp"])
    while rows > 1:
        factor = next(n for n in range(2, rows + 1) if rows % n == 0)
        rows //= factor
        config = replace(config, microbatches=config.microbatches * factor)
        yield f"--microbatches {config.microbatches}", config


def _with(value: Any, **changes: Any) -> Any:
    """The same configuration with some fields of every stack of layers changed."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    if hasattr(value, "remat"):
        return replace(value, **changes)
    parts = {each.name: _with(getattr(value, each.name), **changes) for each in dataclasses.fields(value)}
    return replace(value, **parts)
