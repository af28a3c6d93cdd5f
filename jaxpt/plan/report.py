"""A plan for people and for programs."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxpt.plan.estimate import Plan

GIB = 2**30
NOTE = (
    "The times are bounds from the data sheets (FLOP/s, memory and link bandwidth), no measurement: the first with "
    "compute, memory and links all at once, the second one after the other. Memory time is at least that: state "
    "and temporaries once each way."
)


def to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values."""
    return dataclasses.asdict(plan)


def show(plan: Plan, console: Console) -> None:
    """Print the plan."""
    axes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    where = "; ".join(f"{axis} over {'x'.join(map(str, sides))}" for axis, sides in plan.layout.items())
    tokens = plan.batch_size * plan.seq_len
    console.print(f"[bold]{plan.topology}[/bold]: {plan.chips} chips as {axes}" + (f" ({where})" if where else ""))
    console.print(
        f"{plan.parameters:,} parameters; vocabulary of {plan.vocabulary}; {plan.batch_size} rows x {plan.seq_len} = "
        f"{tokens:,} tokens per step, {plan.microbatches} microbatch(es); compiled in {plan.seconds:.0f} s"
    )
    _show_memory(plan, console)
    console.print(
        f"useful FLOPs of a step: {plan.flops:.4g}, {plan.flops / plan.chips:.4g} per chip, "
        f"{plan.flops / tokens:.4g} per token; executed, with what is computed again: {plan.executed_flops:.4g}"
    )
    if plan.memory.temporaries and plan.traffic:
        _show_traffic(plan, console)
    if plan.roofline is not None:
        times = plan.roofline
        links = ", ".join(f"{axis} {_time(value)}" for axis, value in times.communication.items() if value > 1e-5)
        console.print(
            f"per step: compute {_time(times.compute)}, memory {_time(times.memory)}, links: {links or 'idle'}\n"
            f"predicted step {_time(times.overlapped)} to {_time(times.serial)}, "
            f"MFU {times.mfu[1]:.0%} down to {times.mfu[0]:.0%}, "
            f"{tokens / times.overlapped:,.0f} to {tokens / times.serial:,.0f} tokens/s"
        )
        console.print(NOTE, style="dim")
    for line in plan.advice:
        console.print(line, style="yellow")


def _show_memory(plan: Plan, console: Console) -> None:
    memory = plan.memory
    table = Table("memory per chip", "GiB", title_justify="left")
    table.columns[1].justify = "right"
    for name, value in (
        ("parameters", memory.params),
        ("optimizer state", memory.optimizer),
        ("batch, counters, program, padding", memory.other),
        ("activations and other temporaries", memory.temporaries),
        ("peak", memory.peak),
    ):
        table.add_row(name, f"{value / GIB:.2f}")
    if memory.capacity is not None:
        table.add_row("capacity", f"{memory.capacity / GIB:.2f}")
        room = memory.capacity - memory.peak
        fits = "[green]fits, head room" if memory.fits else "[red]does not fit, over by"
        table.add_row(fits, f"{abs(room) / GIB:.2f}")
    console.print(table)


def _show_traffic(plan: Plan, console: Console) -> None:
    table = Table("collective", "axis", "type", "for", "per step", "MB each", "MB received")
    for column in table.columns[4:]:
        column.justify = "right"
    for line in plan.traffic:
        style = None if line.wanted else "red"
        purpose = line.purpose + ("" if line.wanted else "  <- not wanted")
        each = line.bytes / max(line.count, 1) / 1e6
        table.add_row(
            line.kind, line.axis, line.dtype, purpose, str(line.count), f"{each:.3g}", f"{line.bytes / 1e6:,.1f}",
            style=style,
        )  # fmt: skip
    console.print(table)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
