"""What a network reads in one row, place by place, as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.data.tokenizer import Tokenizer
from jaxpt.models.patterns import visible
from jaxpt.types import AttentionPattern, View

FINEST = 2048  # queries and keys of a panel; of longer rows every second, third, ... token stands for its neighbours


@dataclass(frozen=True)
class Target:
    """Something that is predicted: a token or a class as text, and its loss weight."""

    text: str
    weight: float


@dataclass(frozen=True)
class Place:
    """One place of a sequence: the token that a network reads there, and what it is asked there.

    Args:
      index: place in the row.
      token: id.
      text: of the token, for a person.
      position: as the network is told.
      document: segment id, 0 = padding.
      special: the token stands for no text.
      changed: the row has another token here, or (where tokens have moved) no such token in this order.
      was: the row's token at this place, where another one is read and nothing has moved.
      targets: what is predicted here.
    """

    index: int
    token: int
    text: str
    position: int
    document: int
    special: bool
    changed: bool = False
    was: str | None = None
    targets: tuple[Target, ...] = ()


@dataclass(frozen=True)
class Panel:
    """Who sees whom in some layers: ``seen`` [Q, K] bool of every ``stride``-th query and key."""

    title: str
    seen: np.ndarray
    stride: int = 1


@dataclass(frozen=True)
class Reading:
    """One sequence, without the ``padding`` places at its end, and its attention."""

    name: str
    places: tuple[Place, ...]
    padding: int
    panels: tuple[Panel, ...] = ()

    @property
    def documents(self) -> list[tuple[Place, ...]]:
        """The places, cut where a document ends."""
        starts = [0, *(i for i in range(1, len(self.places)) if self._begins(i)), len(self.places)]
        return [self.places[a:b] for a, b in pairwise(starts) if a < b]

    def _begins(self, index: int) -> bool:
        return self.places[index].document != self.places[index - 1].document

    @property
    def weighed(self) -> bool:
        """Whether some weight is not 1, so that weights say something."""
        return any(target.weight != 1 for place in self.places for target in place.targets)

    @property
    def moved(self) -> bool:
        """Whether positions do not count a document's tokens one by one, so that they say something."""
        pairs = (pair for document in self.documents if document[0].document for pair in pairwise(document))
        return any(after.position != before.position + 1 for before, after in pairs)

    @property
    def summary(self) -> str:
        """What is read and predicted, in a line."""
        tokens = sum(place.document > 0 for place in self.places)
        targets = sum(len(place.targets) for place in self.places)
        changed = sum(place.changed and place.document > 0 for place in self.places)
        told = f"{tokens} tokens" + f" and {self.padding} of padding" * (self.padding > 0)
        told += f", {changed} not as in the row" * (changed > 0)
        return told + (f"; {targets} predictions ({targets / max(tokens, 1):.1%} of the tokens)" if targets else "")


def reading_of(name: str, view: View, row: View, tokenizer: Tokenizer, windows: dict[int | None, str]) -> Reading:
    """Return one view of one row.

    Args:
      name: of the view.
      view: its arrays, without the leading R.
      row: the row before the objective touched it, likewise.
      tokenizer: of the data.
      windows: of the network's layers, with titles; empty where there is no attention to show.
    """
    targets = _targets(view, tokenizer)
    length = 1 + max([*np.flatnonzero(view.segment_ids).tolist(), *targets, 0])
    changed, stays = _changed(np.asarray(view.tokens)[:length], row)
    places = []
    for i in range(length):
        token = int(view.tokens[i])
        place = Place(
            i,
            token,
            tokenizer.name(token),
            int(view.positions[i]),
            int(view.segment_ids[i]),
            bool(tokenizer.is_special[token]) if token < tokenizer.size else True,
            bool(changed[i]),
            tokenizer.name(int(row.tokens[i])) if changed[i] and stays else None,
            tuple(targets.get(i, ())),
        )
        places.append(place)
    panels = () if view.pattern is None else _panels(view.pattern, length, len(view.tokens), windows)
    return Reading(name, tuple(places), len(view.tokens) - length, panels)


def _targets(view: View, tokenizer: Tokenizer) -> dict[int, list[Target]]:
    """What is predicted, by the place that predicts it; what weighs nothing is left out."""
    found: dict[int, list[Target]] = {}
    if view.targets is None:
        return found
    targets = np.asarray(view.targets).reshape(-1)
    where = np.arange(len(targets)) if view.target_positions is None else np.asarray(view.target_positions).reshape(-1)
    weights = np.asarray(view.segment_ids)[where] > 0 if view.weights is None else np.asarray(view.weights).reshape(-1)
    for k in np.flatnonzero(weights):
        target = int(targets[k])
        text = view.classes[target] if view.classes else tokenizer.name(target)
        found.setdefault(int(where[k]), []).append(Target(text, float(weights[k])))
    return found


def _changed(tokens: np.ndarray, row: View) -> tuple[np.ndarray, bool]:
    """Which tokens are not those of the row, and whether tokens keep their places."""
    original = np.asarray(row.tokens)[: len(tokens)]
    if len(original) == len(tokens) and np.mean(original == tokens) >= 0.4:
        return original != tokens, True
    changed = np.ones(len(tokens), bool)
    present = np.asarray(row.tokens)[np.asarray(row.segment_ids) > 0]
    matcher = SequenceMatcher(None, present.tolist(), tokens.tolist(), autojunk=False)
    for _, start, size in matcher.get_matching_blocks():
        changed[start : start + size] = False
    return changed, False


def _panels(pattern: AttentionPattern, length: int, whole: int, windows: dict[int | None, str]) -> tuple[Panel, ...]:
    """Who sees whom, once per window, without padding at the end; windows that make no difference share one."""
    stride = -(-length // FINEST)
    rowed = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], pattern)
    keys = length if rowed.key_segments.shape[1] == whole else rowed.key_segments.shape[1]
    cut = rowed._replace(
        **{
            name: None if leaf is None else leaf[:, : length if name.startswith("query") else keys : stride]
            for name, leaf in rowed._asdict().items()
            if name != "order"
        }
    )
    panels: list[Panel] = []
    for window, title in (windows or {None: ""}).items():
        seen = np.asarray(visible(cut, window))[0]
        alike = next((n for n, panel in enumerate(panels) if np.array_equal(panel.seen, seen)), None)
        if alike is None:
            panels.append(Panel(title, seen, stride))
        else:
            panels[alike] = dataclasses.replace(panels[alike], title=f"{panels[alike].title}, {title}, alike here")
    return tuple(panels)
