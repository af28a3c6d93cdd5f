"""Weights that change over a run: small configurations that are functions of the traced step.

Each is called with the step and returns a float32 scalar; none branches in Python, so a weight that reaches 0
compiles nothing anew. ``last`` is the value after all its steps, which evaluation uses, so that evaluations of one
run compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import jax.numpy as jnp

from jaxpt.objectives.parts import check
from jaxpt.types import Array


def progress(step: Array, begin: int, end: int) -> Array:
    """Return how far ``step`` is from ``begin`` to ``end``: 0 before, 1 after."""
    return jnp.clip((jnp.asarray(step, jnp.float32) - begin) / (end - begin), 0.0, 1.0)


def check_steps(schedule: object, begin: int, end: int) -> None:
    """Refuse a schedule that ends before it begins."""
    check(0 <= begin < end, f"{schedule}: begin must be at least 0 and end must come after begin")


@dataclass(frozen=True)
class Linear:
    """From ``start`` to ``last`` in a straight line.

    >>> weight = Linear(start=1.0, last=0.0, begin=10, end=20)
    >>> [float(weight(step)) for step in (0, 10, 15, 20, 99)]
    [1.0, 1.0, 0.5, 0.0, 0.0]
    """

    start: float
    """Weight up to step ``begin``."""
    last: float
    """Weight from step ``end`` on."""
    begin: int
    """The step at which it begins to change."""
    end: int
    """The step at which it has changed."""

    def __post_init__(self) -> None:
        """Refuse steps that cannot be."""
        check_steps(self, self.begin, self.end)

    def __call__(self, step: Array) -> Array:
        """The weight at a step."""
        return self.start + (self.last - self.start) * progress(step, self.begin, self.end)


@dataclass(frozen=True)
class Cosine:
    """From ``start`` to ``last`` along half a cosine: slow, fast, slow.

    >>> weight = Cosine(start=1.0, last=0.0, begin=0, end=100)
    >>> [round(float(weight(step)), 4) for step in (0, 25, 50, 100, 101)]
    [1.0, 0.8536, 0.5, 0.0, 0.0]
    """

    start: float
    """Weight up to step ``begin``."""
    last: float
    """Weight from step ``end`` on."""
    begin: int
    """The step at which it begins to change."""
    end: int
    """The step at which it has changed."""

    def __post_init__(self) -> None:
        """Refuse steps that cannot be."""
        check_steps(self, self.begin, self.end)

    def __call__(self, step: Array) -> Array:
        """The weight at a step."""
        turned = 0.5 - 0.5 * jnp.cos(jnp.pi * progress(step, self.begin, self.end))
        return self.start + (self.last - self.start) * turned


@dataclass(frozen=True)
class Exponential:
    """From ``start`` to ``last``, both above 0, by the same factor at every step.

    >>> weight = Exponential(start=1.0, last=0.01, begin=0, end=100)
    >>> [round(float(weight(step)), 4) for step in (0, 50, 100, 200)]
    [1.0, 0.1, 0.01, 0.01]
    """

    start: float
    """Weight up to step ``begin``."""
    last: float
    """Weight from step ``end`` on."""
    begin: int
    """The step at which it begins to change."""
    end: int
    """The step at which it has changed."""

    def __post_init__(self) -> None:
        """Refuse steps and weights that cannot be."""
        check_steps(self, self.begin, self.end)
        check(self.start > 0 and self.last > 0, f"{self}: start and last must be above 0; Linear reaches 0")

    def __call__(self, step: Array) -> Array:
        """The weight at a step."""
        return self.start * jnp.float32(self.last / self.start) ** progress(step, self.begin, self.end)


@dataclass(frozen=True)
class Stairs:
    """One weight after another: ``values[i]`` from step ``begins[i]`` on.

    >>> weight = Stairs(begins=(0, 10, 30), values=(1.0, 0.0, 0.5))
    >>> [float(weight(step)) for step in (0, 9, 10, 29, 30)]
    [1.0, 1.0, 0.0, 0.0, 0.5]
    """

    begins: tuple[int, ...]
    """The first step of each weight, rising; the first is 0."""
    values: tuple[float, ...]
    """The weights."""

    def __post_init__(self) -> None:
        """Refuse steps that cannot be."""
        rising = all(a < b for a, b in zip(self.begins, self.begins[1:], strict=False))
        check(
            len(self.begins) == len(self.values) and self.begins[:1] == (0,) and rising,
            f"{self}: begins must rise from 0, with one value each",
        )

    @property
    def last(self) -> float:
        """The weight of the last stair."""
        return self.values[-1]

    def __call__(self, step: Array) -> Array:
        """The weight at a step."""
        stair = jnp.sum(jnp.asarray(step) >= jnp.array(self.begins)) - 1
        return jnp.array(self.values, jnp.float32)[stair]


@dataclass(frozen=True)
class WarmUp:
    """0 until ``begin``, a straight line to ``last`` at ``end``, and ``last`` from then on.

    >>> weight = WarmUp(last=2.0, begin=100, end=200)
    >>> [float(weight(step)) for step in (0, 100, 150, 200, 201)]
    [0.0, 0.0, 1.0, 2.0, 2.0]
    """

    last: float
    """The weight that is held."""
    begin: int
    """Steps without the part."""
    end: int
    """The step from which on the weight is held."""

    def __post_init__(self) -> None:
        """Refuse steps that cannot be."""
        check_steps(self, self.begin, self.end)

    def __call__(self, step: Array) -> Array:
        """The weight at a step."""
        return self.last * progress(step, self.begin, self.end)


Course: TypeAlias = Linear | Cosine | Exponential | Stairs | WarmUp
