"""Span corruption's numbers, all known before anything is traced: spans of a text, text of a row, sentinels."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Denoiser:
    """How much is hidden, and in how long spans."""

    rate: float = 0.15
    """Share of the tokens that is hidden."""
    mean: float | None = 3.0
    """Mean length of a span; None = one span, at the end, which makes a prefix language model."""
    share: int = 1
    """Rows of every batch, relative to the other denoisers' shares."""
    mode: str | None = None
    """Name of the token before the inputs that tells which denoiser it is, one of the objective's ``modes``."""


UL2 = (
    Denoiser(0.15, 3.0, mode="NLU"),
    Denoiser(0.15, 8.0, mode="NLU"),
    Denoiser(0.25, None, mode="S2S"),
    Denoiser(0.5, 3.0, mode="NLG"),
    Denoiser(0.5, 8.0, mode="NLG"),
    Denoiser(0.15, 64.0, mode="NLG"),
    Denoiser(0.5, 64.0, mode="NLG"),
)
"""The seven denoisers of UL2: regular, sequential and extreme ones."""


@dataclass(frozen=True)
class Layout:
    """What decides how much text fills a row.

    Args:
      denoisers: of the rows.
      documents: texts of a row, at most.
      roll: whether spans are shifted round.
      one_row: whether inputs and targets stand in one row.
    """

    denoisers: tuple[Denoiser, ...]
    documents: int = 1
    roll: bool = False
    one_row: bool = False

    def shifts(self, denoiser: Denoiser) -> bool:
        """Whether a denoiser's spans are shifted round; that of a prefix language model stays at the end."""
        return self.roll and denoiser.mean is not None


class Lengths(NamedTuple):
    """How much text goes into a row, and what becomes of it; known before anything is traced."""

    inputs: int  # slots of the inputs, or of both sides where one decoder reads them
    tokens: tuple[int, ...]  # [K] raw tokens of a row, per denoiser
    targets: int  # slots of the targets
    noise: np.ndarray  # [K, N + 1] i32: tokens that are hidden of a text of n tokens
    spans: np.ndarray  # [K, N + 1] i32: in so many spans


def counts(denoiser: Denoiser, most: int, dtype: type[np.floating] = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Return how many tokens, in how many spans, are hidden of texts of 0 .. most tokens::

        noise = clip(round(rate * n), 1, n - 1)        spans = max(1, round(noise / mean)),    round half to even

    No more spans than tokens on either side, which T5's code lacks; of a single token nothing is hidden.

    Args:
      denoiser: rate and mean length.
      most: tokens, N.
      dtype: of the products. T5 takes float32 for what it hides and float64 for how long rows are.

    Returns:
      [N + 1] i32 each; a text of one token counts one span of no token.

    >>> [table[[190, 568]].tolist() for table in counts(Denoiser(), 568)]
    [[29, 85], [10, 28]]
    """
    sizes = np.maximum(np.arange(most + 1), 2).astype(dtype)
    noise = np.clip(np.round(sizes * dtype(denoiser.rate)), 1, sizes - 1)
    spans = np.maximum(np.round(noise / dtype(denoiser.mean)), 1) if denoiser.mean else np.ones_like(noise)
    spans = np.minimum(spans, np.minimum(noise, sizes - noise))
    noise[:2], spans[0] = 0, 0
    return noise.astype(np.int32), spans.astype(np.int32)


def slots(layout: Layout, denoiser: Denoiser, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the slots that 0 .. most tokens take at most, however they are divided among the texts of a row.

    Of a text: what is left, a sentinel per span, the end and the mode in the inputs; what is hidden, as many sentinels
    and the end in the targets. At rate 0.5 the targets count like inputs where they are longer (T5's rule); rolled
    spans may be cut in two by the ends of a text.

    Returns:
      [most + 1] i64 each: slots of the inputs (of both sides, for one decoder) and of the targets.
    """
    takes = []
    for dtype in (np.float64, np.float32):
        noise, spans = counts(denoiser, most, dtype)
        inputs = np.arange(most + 1) - noise + np.where(noise > 0, spans, 0) + 1 + (denoiser.mode is not None)
        targets = noise + spans + 1
        if layout.one_row:
            inputs = inputs + targets
        elif denoiser.rate == 0.5:
            inputs = np.maximum(inputs, targets)
        takes.append(np.stack([inputs, targets]) + layout.shifts(denoiser))
    of_inputs, of_targets = np.maximum(*takes)
    return _worst(of_inputs, layout.documents), _worst(of_targets, layout.documents)


def _worst(take_N: np.ndarray, documents: int) -> np.ndarray:
    take_N[0] = 0
    total_N = take_N
    for _ in range(documents - 1):
        total_N = np.array([np.max(take_N[: n + 1] + total_N[n::-1]) for n in range(len(take_N))])
    return np.maximum.accumulate(total_N)


@functools.lru_cache(maxsize=64)
def plan(layout: Layout, length: int) -> Lengths:
    """Return how much text fills rows of a model length, for one text and no mode by the law of T5's helper.

    That one counts spans in float64 alone; here a row holds what is hidden in float32, too, which at some lengths are
    one or two slots more (0.15 and 3.0 at 172: 190 tokens, with targets of 38 there and of 40 here).

    >>> lengths = plan(Layout((Denoiser(),)), 512)
    >>> lengths.inputs, lengths.tokens, lengths.targets
    (512, (568,), 114)
    """
    most = max(int((length + 2) / (1 - each.rate)) + 2 for each in layout.denoisers)
    takes = [slots(layout, each, most) for each in layout.denoisers]

    def fitting(length: int) -> tuple[int, ...]:
        return tuple(int(np.searchsorted(inputs, length, side="right")) - 1 for inputs, _ in takes)

    # A batch is as wide as its longest kind, and that width must tell the length: the least one that has it.
    widest = max(fitting(length))
    length = min(int(inputs[widest]) for inputs, _ in takes)
    tokens = fitting(length)
    tables = [counts(each, max(tokens)) for each in layout.denoisers]
    targets = max(int(of_targets[own]) for (_, of_targets), own in zip(takes, tokens, strict=True))
    return Lengths(length, tokens, targets, *map(np.stack, zip(*tables, strict=True)))


@functools.lru_cache(maxsize=64)
def plan_of_rows(layout: Layout, width: int) -> Lengths:
    """Return the ``plan`` by which rows of ``width`` raw tokens were made."""
    return plan(layout, min(int(slots(layout, each, width)[0][width]) for each in layout.denoisers))
