"""The collectives of a compiled program, read from its text: what, along which mesh axis, how often, how many bytes."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8}
BYTES |= {"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8}

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([^ ]+) = (.*)$")
_SHAPE = re.compile(r"([a-z]+\d*(?:e\d+m\d+[a-z]*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([^ ,)}]+)")


class Shape(NamedTuple):
    """An array of the program, as each device holds it."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What it takes."""
        return int(np.prod(self.dims, dtype=np.int64)) * BYTES.get(self.dtype, 1)


@dataclass
class Instruction:
    """One line of a computation."""

    name: str
    op: str
    shapes: list[Shape]  # of the result; of all members of a tuple
    text: str  # operands and attributes
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([^ ,)]+)", self.text.partition(")")[0])

    def attribute(self, pattern: str) -> str:
        """The first group of a pattern in the attributes, or nothing."""
        found = re.search(pattern, self.text)
        return found.group(1) if found else ""


@dataclass(frozen=True)
class Collective:
    """One collective of the program and all its executions in one step."""

    kind: str  # an HLO name; a ring of permutes that the compiler made of a gather or scatter says so
    axis: str  # mesh axes joined by "+", "?" where the groups are no mesh axes
    dtype: str
    full: tuple[int, ...]  # the array in whole: what a gather makes, what a reduction reads
    times: int  # executions per step
    received: int  # bytes that each device receives per execution
    op_name: str
    frames: tuple[str, ...] = field(default=(), compare=False)  # functions from the innermost outwards

    @property
    def total(self) -> int:
        """Bytes that each device receives per step."""
        return self.times * self.received


# ------------------------------------------------------------------------------------------------ the text


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Split the text of a program into its computations; the name of the entry comes second."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")) and line.endswith("{"):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            current = computations[name] = []
            entry = name if line.startswith("ENTRY ") else entry
        elif found := _INSTRUCTION.match(line):
            root, name, rest = found.groups()
            result, rest = _result(rest)
            op, _, rest = rest.partition("(")
            shapes = [Shape(kind, tuple(map(int, dims.split(","))) if dims else ()) for kind, dims in result]
            current.append(Instruction(name, op.strip(), shapes, rest, root is not None))
    return computations, entry


def _result(text: str) -> tuple[list[tuple[str, str]], str]:
    """The shapes of the result type at the head of an instruction, and what follows it."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if depth == 0 and letter == " ":
            return _SHAPE.findall(text[:place]), text[place + 1 :]
    return [], text


def trip_count(loop: Instruction, computations: Mapping[str, list[Instruction]], around: Sequence[Instruction]) -> int:
    """How often a while loop runs: as the compiler says, or from its counter, bound and stride."""
    known = loop.attribute(r'known_trip_count[^}]*?"n":"(\d+)"')
    if known:
        return int(known)
    condition = {each.name: each for each in computations[loop.attribute(r"condition=%([^ ,)}]+)")]}
    body = {each.name: each for each in computations[loop.attribute(r"body=%([^ ,)}]+)")]}
    test = next((each for each in condition.values() if each.op == "compare"), None)
    if test is None:
        return 1
    bounds = [int(c.text.partition(")")[0]) for c in map(condition.get, test.operands) if c and c.op == "constant"]
    counters = [c.attribute(r"index=(\d+)") for c in map(condition.get, test.operands) if c and c.attribute("(index=)")]
    if not bounds or not counters:
        return 1
    place = int(counters[0])

    def number(name: str, where: Mapping[str, Instruction]) -> int | None:
        each = where.get(name)
        while each is not None and each.op in ("copy", "bitcast", "convert") and each.operands:
            each = where.get(each.operands[0])
        value = each.text.partition(")")[0] if each is not None and each.op == "constant" else ""
        return int(value) if value.lstrip("-").isdigit() else None

    result = next(each for each in body.values() if each.is_root)
    after = body.get(result.operands[place]) if place < len(result.operands) else None
    steps = [number(name, body) for name in after.operands] if after is not None and after.op == "add" else []
    step = next((value for value in steps if value), 1)
    outside = {each.name: each for each in around}
    given = outside.get(loop.operands[0]) if loop.operands else None
    start = (number(given.operands[place], outside) if given is not None and given.op == "tuple" else 0) or 0
    last = bounds[0] + (test.attribute(r"direction=(\w+)") == "LE")
    return max(-(-(last - start) // step), 0)


# ------------------------------------------------------------------------------------------ the mesh axes


def groups_of(instruction: Instruction, devices: int) -> list[list[int]]:
    """The groups of devices, by their place in the mesh, that an instruction talks in; of a permute the pairs.

    >>> one = Instruction("x", "all-gather", [], "%a), replica_groups=[2,2]<=[2,2]T(1,0)", False)
    >>> groups_of(one, 4)
    [[0, 2], [1, 3]]
    """
    text = instruction.text
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}?,? ", text + " ")
    if pairs:
        return [[int(a), int(b)] for a, b in re.findall(r"(\d+),(\d+)", pairs.group(1))]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, whole, order = ([int(n) for n in (part or "").split(",") if n] for part in found.groups())
        ids = np.arange(devices).reshape(whole).transpose(order or range(len(whole)))
        return ids.reshape(shape).tolist()
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}", text
    ):
        named, whole, order, along = found.groups()
        sizes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", named)]
        ids = np.arange(devices)
        if whole:
            ids = ids.reshape([int(n) for n in whole.split(",")])
            ids = ids.transpose([int(n) for n in order.split(",")]) if order else ids
        ids = ids.reshape([size for _, size in sizes])
        inside = [i for i, (name, _) in enumerate(sizes) if f"'{name}'" in along]
        outside = [i for i in range(len(sizes)) if i not in inside]
        return ids.transpose(outside + inside).reshape(-1, math.prod(sizes[i][1] for i in inside)).tolist()
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found.group(1))]
    return [list(range(devices))]


def axis_of(groups: list[list[int]], mesh_shape: Mapping[str, int]) -> str:
    """The mesh axes along which the devices of a group differ.

    >>> axis_of([[0, 1], [2, 3]], {"data": 2, "fsdp": 2}), axis_of([[0, 1, 2, 3]], {"data": 2, "fsdp": 2})
    ('fsdp', 'data+fsdp')
    """
    places = np.array(np.unravel_index(np.array(groups[0]), tuple(mesh_shape.values())))
    return "+".join(axis for axis, row in zip(mesh_shape, places, strict=True) if len(set(row.tolist())) > 1) or "?"


# ------------------------------------------------------------------------------------------ the collectives


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Return every collective of a compiled program, with its executions per step.

    Loops are counted by their trips. What a TPU compiler cuts into a chain of fused pieces (one channel) is one
    collective.

    Args:
      text: ``compiled.as_text()``.
      mesh_shape: {axis: size}, in the order of the mesh.
    """
    computations, entry = parse(text)
    frames = stack_frames(text)
    devices = int(np.prod(list(mesh_shape.values())))
    found: dict[tuple[str, ...], Collective] = {}

    def visit(name: str, times: int, home: str, ring: str) -> None:
        for each in computations.get(name, ()):
            kind = each.op.removesuffix("-start")
            if kind in KINDS:
                groups = groups_of(each, devices)
                size = len(groups[0]) if kind != "collective-permute" else _ring_size(groups)
                scattered = kind == "all-reduce" and "all-reduce-scatter" in name
                one = _measure(each, kind, size, axis_of(groups, mesh_shape), times, scattered, ring)
                one = replace(one, frames=frames.get(each.attribute(r"stack_frame_id=(\d+)"), ()))
                channel = each.attribute(r"channel_id=(\d+)") or each.name
                # a gather that is fused piece by piece into what runs beside it, even into the loops of other rings
                chained = "chain_id" in each.text
                key = (kind, channel) if chained else (home, kind, channel)
                if key not in found or times < found[key].times:
                    found[key] = one
            if each.op.endswith(("-done", "-update")):
                continue
            if each.op == "while":
                trips = trip_count(each, computations, computations[name])
                body = each.attribute(r"body=%([^ ,)}]+)")
                inner = "gather" if "body_ag" in body else "scatter" if "body_rs" in body else ring
                visit(body, times * trips, body, inner)
            elif each.op == "conditional":
                for branch in re.findall(r"%([^ ,)}]+)", each.attribute(r"branch_computations=\{([^}]*)\}")):
                    visit(branch, times, branch, ring)
            elif each.op in ("fusion", "call", "async-start"):
                for called in _CALLED.findall(each.text):
                    visit(called, times, home, ring)

    visit(entry, 1, entry, "")
    return [each for each in found.values() if each.axis != "?" and each.received]


def _ring_size(pairs: list[list[int]]) -> int:
    """How many devices a permute passes before it returns to where it began; 2 where it never does."""
    following = {source: target for source, target in pairs}  # noqa: C416
    start = place = next(iter(following))
    for count in range(1, len(following) + 1):
        place = following.get(place, -1)
        if place == start:
            return count
    return 2


def _measure(each: Instruction, kind: str, size: int, axis: str, times: int, scattered: bool, ring: str) -> Collective:
    shapes = [shape for shape in each.shapes if shape.dims or kind == "all-reduce"]
    total = sum(shape.bytes for shape in shapes)
    biggest = max(shapes, key=lambda shape: shape.bytes, default=Shape("f32", ()))
    full, share = biggest.dims, (size - 1) / size
    if kind == "all-gather":
        whole = total * size / (size + 1) if each.op.endswith("-start") else total
        received = whole * share
    elif kind == "reduce-scatter":
        part = total / (size + 1) if each.op.endswith("-start") else total
        received, full = part * (size - 1), _grow(biggest.dims, each, size)
    elif kind == "all-reduce":
        kind, received = ("reduce-scatter", total * share) if scattered else (kind, 2 * total * share)
    elif kind == "all-to-all":
        received = total * share
    else:
        received = biggest.bytes
        kind = f"{kind} ({ring} ring)" if ring else kind
    op_name = each.attribute(r'op_name="([^"]*)"')
    return Collective(kind, axis, biggest.dtype, full, times, round(received), op_name)


def _grow(dims: tuple[int, ...], each: Instruction, size: int) -> tuple[int, ...]:
    place = each.attribute(r"dimensions=\{(\d+)")
    return tuple(n * size if str(i) == place else n for i, n in enumerate(dims))


def stack_frames(text: str) -> dict[str, tuple[str, ...]]:
    """{frame id: functions of this package, innermost first, as "file.py:function"}, if the text has the table."""
    tables: dict[str, dict[str, str]] = defaultdict(dict)
    table = ""
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = line
        elif table and (found := re.match(r"^(\d+) (.*)$", line)):
            tables[table][found.group(1)] = found.group(2)
        elif line.startswith(("%", "ENTRY")):
            break

    def number(entry: str, name: str) -> str:
        found = re.search(rf"{name}=(\d+)", entry)
        return found.group(1) if found else ""

    def walk(frame: str) -> Iterator[str]:
        seen: set[str] = set()
        while frame in tables["StackFrames"] and frame not in seen:
            seen.add(frame)
            entry = tables["StackFrames"][frame]
            location = tables["FileLocations"].get(number(entry, "file_location_id"), "")
            path = tables["FileNames"].get(number(location, "file_name_id"), "").strip('"')
            function = tables["FunctionNames"].get(number(location, "function_name_id"), "").strip('"')
            if "/jaxpt/" in path:
                yield f"{path.rpartition('/')[2]}:{function}"
            frame = number(entry, "parent_frame_id")

    return {frame: tuple(walk(frame)) for frame in tables["StackFrames"]}
