"""Objectives made of objectives: a weighted sum on the same rows, or rows divided among the parts.

    Multitask:   loss(t) = sum over parts k of  w_k(t) * loss_k(all rows)
    Mixture:     loss(t) = sum over parts k of  w_k(t) * loss_k(its share of the rows)

Both are objectives themselves, so they nest. Parameters unite by name: parts that call a network "trunk" train one
trunk. Everything else of a part stands under the part's name: term "lm" of part "clm" is "clm/lm".

The rows of a Mixture are fixed ranges of the batch, the same at every step, on any devices and for any number of
microbatches: each strided microbatch holds every part's share of its own. Which data stand in a row is random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from zlib import crc32

import jax
import jax.numpy as jnp

from jaxpt.models.presets import gpt2
from jaxpt.objectives.causal_lm import CausalLM
from jaxpt.objectives.masked_lm import MaskedLM
from jaxpt.objectives.members import Member, pick, spread, unite, unite_rows
from jaxpt.objectives.parts import check
from jaxpt.objectives.schedules import Course
from jaxpt.types import (
    Array,
    Batch,
    Example,
    Key,
    Objective,
    ObjectiveConfig,
    Out,
    Params,
    Schedule,
    Snapshot,
    Sums,
    Tree,
    View,
    Vocab,
    divide_rows,
)


@dataclass(frozen=True)
class Task:
    """A part of a ``Multitask``."""

    name: str
    """Its name, before its terms and metrics."""
    objective: ObjectiveConfig
    """What it learns."""
    weight: float = 1.0
    """Its weight."""
    course: Course | None = None
    """What the weight is multiplied with over the run: Linear, Cosine, Exponential, Stairs or WarmUp."""
    own: tuple[str, ...] = ()
    """Networks that it does not share: "head" becomes "<name>_head"."""


@dataclass(frozen=True)
class Portion:
    """A part of a ``Mixture``."""

    name: str
    """Its name, before its terms and metrics."""
    objective: ObjectiveConfig
    """What it learns."""
    share: int = 1
    """Rows of every batch, relative to the other parts' shares."""
    weight: float | None = None
    """Its weight; None = its share of the rows, so that every row weighs the same."""
    course: Course | None = None
    """What the weight is multiplied with over the run: Linear, Cosine, Exponential, Stairs or WarmUp."""
    own: tuple[str, ...] = ()
    """Networks that it does not share: "head" becomes "<name>_head"."""


def _hybrid() -> tuple[tuple[str, ObjectiveConfig], tuple[str, ObjectiveConfig]]:
    network = gpt2("small")
    return ("mlm", MaskedLM(encoder=network, predict_from="previous")), ("clm", CausalLM(decoder=network))


@dataclass(frozen=True)
class Multitask:
    """A weighted sum of objectives, each on all rows."""

    parts: tuple[Task, ...] = field(default_factory=lambda: tuple(Task(*part) for part in _hybrid()))
    """The objectives, each with a name and a weight."""
    rows: str | None = "mlm"
    """The part whose packing, prefix and suffix all parts get; None asks that they agree."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for parts that do not fit together."""
        weights = [task.weight for task in self.parts]
        members = unite("multitask", vocab, self.parts, weights)
        return combine("multitask", members, self.rows, lambda total: [slice(0, total)] * len(members), apart=True)

    def for_evaluation(self) -> Multitask:
        """All parts as they are evaluated, with the last value of their weights."""
        parts = (
            replace(
                task, objective=task.objective.for_evaluation(), weight=task.weight * last(task.course), course=None
            )
            for task in self.parts
        )
        return replace(self, parts=tuple(parts))


@dataclass(frozen=True)
class Mixture:
    """Objectives that divide the rows of every batch among themselves."""

    parts: tuple[Portion, ...] = field(default_factory=lambda: tuple(Portion(*part) for part in _hybrid()))
    """The objectives, each with a name and a share of the rows."""
    rows: str | None = "mlm"
    """The part whose packing, prefix and suffix all parts get; None asks that they agree."""
    every_row: bool = False
    """Give every row to every part, as evaluation does: each part's losses are those of a run of its own."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for parts that do not fit together."""
        shares = [portion.share for portion in self.parts]
        for portion in self.parts:
            check(portion.share >= 1, f"mixture: share of {portion.name!r} is {portion.share}: it must be at least 1")
        members = unite("mixture", vocab, self.parts, self._weights())

        def divide(total: int) -> list[slice]:
            return [slice(0, total)] * len(shares) if self.every_row else divide_rows(total, shares, "mixture")

        return combine("mixture", members, self.rows, divide, apart=False)

    def for_evaluation(self) -> Mixture:
        """All parts as they are evaluated, each on every row, with the last value of their weights."""
        parts = (
            replace(part, objective=part.objective.for_evaluation(), weight=weight * last(part.course), course=None)
            for part, weight in zip(self.parts, self._weights(), strict=True)
        )
        return replace(self, parts=tuple(parts), every_row=True)

    def _weights(self) -> list[float]:
        whole = sum(part.share for part in self.parts)
        return [part.share / whole if part.weight is None else part.weight for part in self.parts]


def last(course: Course | None) -> float:
    """Return what a course ends with; 1 where there is none."""
    return 1.0 if course is None else course.last


# ------------------------------------------------------------------------------------------------ combine


def combine(
    name: str, members: Sequence[Member], rows: str | None, divide: Callable[[int], list[slice]], *, apart: bool
) -> Objective:
    """Return one objective of several.

    Args:
      name: of the combination, for messages.
      members: the parts.
      rows: the part whose packing, prefix and suffix count.
      divide: number of rows -> the range of each part, in any slice of the batch that the step makes.
      apart: parts see the same rows in training and so draw from keys of their own; the first keeps the key.
    """

    def every(total: int) -> Iterator[tuple[Member, slice]]:
        return zip(members, divide(total), strict=True)

    def key_of(member: Member, key: Key) -> Key:
        return jax.random.fold_in(key, crc32(member.name.encode())) if apart and member is not members[0] else key

    def init(key: Key) -> Params:
        made: Params = {}
        for member in members:
            networks = member.objective.init(key)
            made = {common: networks[own] for own, common in member.networks.items()} | made
        return made

    def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
        total, inputs, weights, counts = batch.tokens.shape[0], {}, {}, {}
        for member, own in every(total):
            mine = pick(batch, own)
            made = member.objective.corrupt(member.look(snapshot), mine, key_of(member, key))
            made = spread(made, own, total)
            inputs[member.name] = made.inputs
            weights |= member.put(made.weights)
            counts |= member.put(made.counts)
        return Example(inputs, batch.row_ids, weights, counts)

    def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
        total, losses, stats, features = example.row_ids.shape[0], {}, {}, {}
        for member, own in every(total):
            out = member.objective.loss(member.look(snapshot), member.example(example, own), pick(keys, own))
            losses |= member.put(spread(out.losses, own, total))
            stats |= member.put(out.stats)
            features |= member.put(spread(out.features, own, total))
        return Out(losses, stats, features)

    def couple(
        snapshot: Snapshot, features: dict[str, Array], example: Example
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        total, losses, stats = example.row_ids.shape[0], {}, {}
        for member, own in every(total):
            if member.objective.couple is not None:
                mine = pick(member.take(features), own)
                made, sums = member.objective.couple(member.look(snapshot), mine, member.example(example, own))
                losses |= member.put(spread(made, own, total))
                stats |= member.put(sums)
        return losses, stats

    def start(params: Params, key: Key) -> Tree:
        first = Snapshot(params, {}, jnp.zeros((), jnp.int32))
        return {
            member.name: member.objective.start(member.look(first).params, key_of(member, key))
            for member in members
            if member.objective.start is not None
        }

    def advance(snapshot: Snapshot, features: dict[str, Array], example: Example) -> tuple[Params, Tree]:
        total, carry = example.row_ids.shape[0], dict(snapshot.carry)
        for member, own in every(total):
            if member.objective.advance is not None:
                mine = pick(member.take(features), own)
                look, seen = member.look(snapshot), member.example(example, own)
                params, moved = member.objective.advance(look, mine, seen)
                common = {member.networks[each]: value for each, value in params.items()}
                snapshot = snapshot._replace(params=snapshot.params | common)
                if member.name in carry:
                    carry[member.name] = moved
        return snapshot.params, carry

    def summary(sums: Sums) -> dict[str, Array]:
        metrics: dict[str, Array] = {}
        for member in members:
            if member.objective.summary is not None:
                metrics |= member.put(member.objective.summary(Sums(*map(member.take, sums))))
        return metrics

    def views(snapshot: Snapshot, example: Example) -> dict[str, View]:
        total, shown = example.row_ids.shape[0], {}
        for member, own in every(total):
            if member.objective.views is not None:
                made = member.objective.views(member.look(snapshot), member.example(example, own))
                for each, view in made.items():
                    wide = spread(view._replace(classes=()), own, total)
                    shown |= member.put({each: wide._replace(classes=view.classes)})
        return shown

    def embed(snapshot: Snapshot, batch: Batch, text: int) -> Array:
        """Those of the first part that has vectors."""
        reader = next(member for member in members if member.objective.embed is not None)
        assert reader.objective.embed is not None
        return reader.objective.embed(reader.look(snapshot), batch, text)

    def has(what: str) -> bool:
        return any(getattr(member.objective, what) is not None for member in members)

    return Objective(
        rows=unite_rows(name, members, rows),
        specs={common: m.objective.specs[own] for m in members for own, common in m.networks.items()},
        init=init,
        corrupt=corrupt,
        loss=loss,
        scale={key: scale for m in members for key, scale in m.put(_scales(m)).items()},
        couple=couple if has("couple") else None,
        start=start if has("start") else None,
        advance=advance if has("advance") else None,
        summary=summary if has("summary") else None,
        views=views if has("views") else None,
        embed=embed if has("embed") else None,
    )


def _scales(member: Member) -> dict[str, float | Schedule]:
    """The scales of a part's terms times its weight; numbers stay numbers."""

    def times(scale: float | Schedule) -> float | Schedule:
        weight, course = member.weight, member.course
        if course is None:
            return (lambda step: weight * scale(step)) if callable(scale) else weight * scale
        return lambda step: weight * course(step) * (scale(step) if callable(scale) else scale)

    return {term: times(scale) for term, scale in member.objective.scale.items()}
