"""Which tokens a denoising objective predicts: one frozen dataclass per rule.

Each has ``draw(key, rate, row, room) -> selected [L] bool`` over one row and ``room(rate, length)``, the static
number of predictions per row that it needs. A rule never selects a special token or padding, never more than
``room`` tokens, nothing at rate 0 and, given the room, everything at rate 1. The rate may be traced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from jaxpt.corruption.choose import Rounding, draw_count, draw_subset, draw_units, draw_within, uniform
from jaxpt.corruption.rows import Row, unit_ids
from jaxpt.corruption.spans import cover, draw_fit, draw_lengths, draw_starts, truncated_geometric
from jaxpt.types import Array, Key


def _exact_room(rate: float, length: int, extra: int = 0) -> int:
    return min(length, math.ceil(rate * length - 1e-6) + extra)


def _random_room(rate: float, length: int, unit: float) -> int:
    """Three standard deviations above the mean, for units of ``unit`` tokens."""
    return _exact_room(rate, length, math.ceil(3 * math.sqrt(unit * length * rate * (1 - rate))))


@dataclass(frozen=True)
class Independent:
    """Every token by its own coin, so the count is binomial (Hugging Face's collator, ModernBERT).

    The room is three standard deviations above the mean: in about one row in a thousand a random excess stays
    unselected.
    """

    def room(self, rate: float, length: int) -> int:
        """Predictions per row."""
        return _random_room(rate, length, 1)

    def draw(self, key: Key, rate: Array | float, row: Row, room: int) -> Array:
        """Select tokens of one row: [L] bool."""
        length = row.candidates.shape[0]
        coins_L, excess_L = jax.random.bits(key, (2, length), jnp.uint32)
        return draw_within(excess_L, jnp.arange(length), row.candidates & (uniform(coins_L) < rate), room)


@dataclass(frozen=True)
class FixedCount:
    """A fixed share of every row, every subset equally likely (BERT, RoBERTa, ELECTRA).

    BERT: ``FixedCount(rounding="nearest", minimum=1, count_special=True)``. RoBERTa: the default. ELECTRA:
    ``FixedCount(rounding="nearest", minimum=1, count_special=True)``, without its draws with replacement.
    """

    rounding: Rounding = "unbiased"
    """How rate * n becomes a whole number: "unbiased" floor(x + U), "nearest" half to even, "ceil"."""
    minimum: int = 0
    """The fewest tokens to select where there are that many (and the rate is not 0)."""
    count_special: bool = False
    """Count [CLS] and [SEP] in n (never padding), although they are never selected."""

    def room(self, rate: float, length: int) -> int:
        """Predictions per row."""
        return min(length, max(_exact_room(rate, length), self.minimum))

    def draw(self, key: Key, rate: Array | float, row: Row, room: int) -> Array:
        """Select tokens of one row: [L] bool."""
        bits = jax.random.bits(key, (1 + row.candidates.shape[0],), jnp.uint32)
        size = jnp.sum(row.present if self.count_special else row.candidates)
        count = draw_count(bits[0], jnp.asarray(rate, jnp.float32) * size, self.rounding)
        count = jnp.where(jnp.asarray(rate) > 0, jnp.maximum(count, self.minimum), 0)
        return draw_subset(bits[1:], row.candidates, jnp.minimum(count, room))


@dataclass(frozen=True)
class WholeWord:
    """All pieces of a word or none (BERT's whole-word masking; Cui et al. 2021, arXiv:1906.08101)."""

    fixed: bool = True
    """Fill a fixed budget of tokens with random words, the last one by chance, so that the expected count is
    exact; otherwise every word by its own coin, where the count varies and 3 deviations of room are kept."""
    rounding: Rounding = "unbiased"
    """How the budget becomes a whole number (with ``fixed``)."""

    def room(self, rate: float, length: int) -> int:
        """Predictions per row."""
        return _exact_room(rate, length, 8) if self.fixed else _random_room(rate, length, 2)

    def draw(self, key: Key, rate: Array | float, row: Row, room: int) -> Array:
        """Select words of one row: [L] bool."""
        first_L, second_L = jax.random.bits(key, (2, row.candidates.shape[0]), jnp.uint32)
        words_L = unit_ids(row.word_starts)
        if self.fixed:
            expected = jnp.asarray(rate, jnp.float32) * jnp.sum(row.candidates)
            budget = draw_count(first_L[0], expected, self.rounding)
            return draw_units(second_L, first_L[1], words_L, row.candidates, budget, room)
        coins_L = uniform(first_L)[words_L] < rate
        return draw_within(second_L, words_L, row.candidates & coins_L, room)


@dataclass(frozen=True)
class Spans:
    """Runs of tokens or words of geometric length that never touch (SpanBERT: Joshi et al. 2020, arXiv:1907.10529).

    Lengths and budget count units. Unlike SpanBERT's, which grow rightwards from an anchor and under-mask the
    start of a row, the places are uniform. Spans are laid over the row without its special tokens and padding:
    one that reaches over the end of a document goes on in the next, as two shorter spans.
    """

    stop: float = 0.2
    """Probability that a span ends after each unit: the parameter of the geometric law."""
    longest: int = 10
    """Units of the longest span; the law is cut there and renormalised."""
    unit: Literal["token", "word"] = "token"
    """What a span is made of; SpanBERT's are whole words."""
    rounding: Rounding = "unbiased"
    """How the budget of rate * units becomes a whole number (SpanBERT: "ceil")."""

    def __post_init__(self) -> None:
        """Refuse a law that is none."""
        if not (0 < self.stop < 1 and self.longest >= 1):
            raise ValueError(f"Spans needs 0 < stop < 1 and longest >= 1, not stop={self.stop}, longest={self.longest}")

    def room(self, rate: float, length: int) -> int:
        """Predictions per row."""
        exact = _exact_room(rate, length, self.longest - 1)
        return exact if self.unit == "token" else max(exact, _random_room(rate, length, 2 * self.longest))

    def draw(self, key: Key, rate: Array | float, row: Row, room: int) -> Array:
        """Select spans of one row: [L] bool."""
        length = row.candidates.shape[0]
        lengths_bits, places_bits, excess_bits, few_bits = jax.random.bits(key, (4, length + 1), jnp.uint32)
        first_L = row.candidates & (row.word_starts if self.unit == "word" else True)
        units_L = jnp.maximum(unit_ids(first_L), 0)  # special tokens count with the unit before them; unused
        size = jnp.sum(first_L)
        budget = draw_count(few_bits[0], jnp.asarray(rate, jnp.float32) * size, self.rounding)
        lengths_S = draw_lengths(lengths_bits[:room], truncated_geometric(self.stop, self.longest))
        lengths_S = draw_fit(few_bits[1], lengths_S, budget, size)
        covered_U = cover(draw_starts(places_bits, lengths_S, size), lengths_S, length)
        selected_L = row.candidates & covered_U[units_L]
        return draw_within(excess_bits[:-1], units_L, selected_L, room)


Selection: TypeAlias = Independent | FixedCount | WholeWord | Spans
