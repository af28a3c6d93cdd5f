"""The collectives of a step put together, and what each is for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax

from jaxpt.plan.collectives import Collective
from jaxpt.sharding import ROWS
from jaxpt.types import Tree


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


def group(found: list[Collective], params: Tree) -> tuple[Traffic, ...]:
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
