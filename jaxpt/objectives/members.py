"""The parts of a combination of objectives: built, their networks united by name, their rows made alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxpt.models.params import constrain
from jaxpt.objectives.parts import check
from jaxpt.objectives.schedules import Course
from jaxpt.types import Array, Example, Objective, ObjectiveConfig, RowSpec, Snapshot, Tree, Vocab


class Part(Protocol):
    """What every part of a combination is configured with."""

    @property
    def name(self) -> str:
        """Its name in the combination."""
        ...

    @property
    def objective(self) -> ObjectiveConfig:
        """What it learns."""
        ...

    @property
    def course(self) -> Course | None:
        """What its weight is multiplied with."""
        ...

    @property
    def own(self) -> tuple[str, ...]:
        """Networks that it does not share."""
        ...


class Member(NamedTuple):
    """A part, built, and where its networks stand in the parameters of all."""

    name: str
    objective: Objective
    weight: float
    course: Course | None
    networks: dict[str, str]  # the part's name of a network -> its name in the combination

    def look(self, snapshot: Snapshot) -> Snapshot:
        """What this part may look at: its own parameters and carry."""
        params = {own: snapshot.params[common] for own, common in self.networks.items()}
        return Snapshot(params, snapshot.carry.get(self.name, {}), snapshot.step)

    def put(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Entries of this part under its name."""
        return {f"{self.name}/{key}": value for key, value in entries.items()}

    def take(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of this part, without its name."""
        start = f"{self.name}/"
        return {key.removeprefix(start): value for key, value in entries.items() if key.startswith(start)}

    def example(self, example: Example, rows: slice) -> Example:
        """This part's example, of its own rows."""
        parts = example.inputs[self.name], example.row_ids, self.take(example.weights), self.take(example.counts)
        return Example(*pick(parts, rows))


def unite(name: str, vocab: Vocab, parts: Sequence[Part], weights: Sequence[float]) -> list[Member]:
    """Build the parts and check that the networks that they share are alike.

    Args:
      name: of the combination, for messages.
      vocab: of the tokenizer.
      parts: the configurations.
      weights: one per part.

    Raises:
      ValueError: two parts have one name, or one network with other parameters.
    """
    names = [part.name for part in parts]
    check(bool(parts), f"{name}: parts is empty: name at least one objective")
    check(
        len(set(names)) == len(names) and all(each and "/" not in each for each in names),
        f"{name}: every part needs a name of its own without a slash, not {', '.join(map(repr, names))}",
    )
    members, owners = [], {}
    for part, weight in zip(parts, weights, strict=True):
        objective = part.objective.build(vocab)
        strange = sorted(set(part.own) - objective.specs.keys())
        check(
            not strange,
            f"{name}: part {part.name!r} has no network {', '.join(strange)} of its own: it has "
            f"{', '.join(objective.specs)}",
        )
        networks = {each: f"{part.name}_{each}" if each in part.own else each for each in objective.specs}
        shapes = jax.eval_shape(objective.init, jax.random.key(0))
        for own, common in networks.items():
            here = _leaves(objective.specs[own], shapes[own])
            owner, there = owners.setdefault(common, (part.name, here))
            for leaf in sorted(here.keys() | there.keys()):
                first, second = there.get(leaf, "absent"), here.get(leaf, "absent")
                check(
                    first == second,
                    f"{name}: parts {owner!r} and {part.name!r} share the network {common!r}, but its {leaf} is "
                    f"{first} in {owner!r} and {second} in {part.name!r}: give both the same network, or keep it "
                    f"apart with own=({own!r},)",
                )
        members.append(Member(part.name, objective, weight, part.course, networks))
    return members


def _leaves(specs: Tree, shapes: Tree) -> dict[str, str]:
    described = jax.tree.map(lambda spec, leaf: f"{leaf.shape} of {leaf.dtype}, {spec}", specs, shapes)
    leaves = jax.tree_util.tree_leaves_with_path(described)
    return {"/".join(str(getattr(part, "key", part)) for part in path) or "value": leaf for path, leaf in leaves}


def unite_rows(name: str, members: Sequence[Member], choice: str | None) -> RowSpec:
    """Return what a combination asks of the data: room for the part that leaves the fewest tokens in a row.

    Args:
      name: of the combination, for messages.
      members: the parts.
      choice: the part whose packing, prefix and suffix count; None = they must agree.

    Raises:
      ValueError: the parts disagree, or there is no such part.
    """
    specs = {member.name: member.objective.rows for member in members}
    members_embed = {member.name: member.objective.embed is not None for member in members}
    known = ", ".join(map(repr, specs))
    check(choice is None or choice in specs, f"{name}: rows={choice!r} is not the name of a part: it has {known}")
    first = choice or next(iter(specs))
    chosen = specs[first]
    for other, spec in specs.items():
        for what in ("packing", "prefix", "suffix"):
            wanted, found = getattr(chosen, what), getattr(spec, what)
            check(
                choice is not None or wanted == found,
                f"{name}: {first!r} asks for rows with {what} {wanted!r} and {other!r} for {found!r}: give the parts "
                f"the same, or say whose rows all of them get: rows={first!r} or rows={other!r}",
            )
        check(
            spec.packing != "stream" or chosen.packing == "stream",
            f"{name}: {other!r} goes on where the row before ended and needs rows packed as a stream: say "
            f"rows={other!r}",
        )
        check(
            not spec.texts or chosen.packing in ("best_fit", "one_document"),
            f"{name}: {other!r} reads pairs, which rows packed as {chosen.packing!r} would cut: say rows={other!r}",
        )
        encloses = members_embed[other] and not (spec.prefix or spec.suffix)
        check(
            not encloses or (chosen.packing == "one_document" and not (chosen.prefix or chosen.suffix)),
            f"{name}: {other!r} puts the text of a row between [CLS] and [SEP] itself, and the rows of {first!r} hold "
            f"other documents or have both already: say rows={other!r}",
        )
        check(
            not spec.kinds,
            f"{name}: the rows of {other!r} are of several lengths, which rows that parts share or divide cannot be: "
            f"make a part of each of its kinds (of span_corruption: one denoiser per part)",
        )
    return RowSpec(
        chosen.packing,
        chosen.prefix,
        chosen.suffix,
        raw_length=lambda length: min(spec.tokens(length) for spec in specs.values()),
        fields=tuple(dict.fromkeys(entry for spec in specs.values() for entry in spec.fields)),
        texts=max(spec.texts for spec in specs.values()),
    )


def pick(tree: Tree, rows: slice) -> Tree:
    """Return the rows of one part of leaves [R, ...], spread over the devices that divide them.

    Left to the compiler, a few rows of many stay unevenly where they were; its gradients are then wrong (the padding
    of an uneven shard is added in, jax 0.10).
    """

    def one(leaf: Array) -> Array:
        whole = rows.start == 0 and rows.stop == leaf.shape[0]
        return leaf if whole else constrain(leaf[rows], "batch", *[None] * (leaf.ndim - 1))

    return jax.tree.map(one, tree)


def spread(tree: Tree, rows: slice, total: int) -> Tree:
    """Undo ``pick``: return leaves [total, ...] with these rows in their place and 0 elsewhere.

    >>> import jax.numpy as jnp
    >>> spread(jnp.array([7, 8]), slice(1, 3), 4).tolist()
    [0, 7, 8, 0]
    """

    def one(leaf: Array) -> Array:
        edges = (rows.start, total - rows.stop)
        others = [(0, 0)] * (leaf.ndim - 1)
        return leaf if edges == (0, 0) else constrain(jnp.pad(leaf, (edges, *others)), "batch", *[None] * len(others))

    return jax.tree.map(one, tree)
