"""Which tokens a denoising objective predicts: one frozen dataclass per rule.

Each has ``draw(key, rate, row, room) -> selected [L] bool`` over one row and ``room(rate, length)``, the static
number of predictions per row that it needs. A rule never selects a special token or padding, never more than
``room`` tokens, nothing at rate 0 and, given the room (and no cap), everything at rate 1. The rate may be traced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.corruption.choose import Rounding, draw_count, draw_subset, draw_units, draw_within, uniform
from jaxpt.corruption.rows import Row, Unit, unit_ids
from jaxpt.corruption.spans import cover, draw_fit, draw_lengths, draw_starts, truncated_geometric
from jaxpt.corruption.unequal import capped_shares, chances, draw_unequal
from jaxpt.types import Array, Key


def exact_room(rate: float, length: int, extra: int = 0) -> int:
    """The static number of predictions of a row, for a share that is met to one token."""
    return min(length, math.ceil(rate * length - 1e-6) + extra)


def _random_room(rate: float, length: int, unit: float) -> int:
    """Three standard deviations above the mean, for units of ``unit`` tokens."""
    return exact_room(rate, length, math.ceil(3 * math.sqrt(unit * length * rate * (1 - rate))))


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
        return min(length, max(exact_room(rate, length), self.minimum))

    def draw(self, key: Key, rate: Array | float, row: Row, room: int) -> Array:
        """Select tokens of one row: [L] bool."""
        bits = jax.random.bits(key, (1 + row.candidates.shape[0],), jnp.uint32)
        size = jnp.sum(row.present if self.count_special else row.candidates)
        count = draw_count(bits[0], jnp.asarray(rate, jnp.float32) * size, self.rounding)
        count = jnp.where(jnp.asarray(rate) > 0, jnp.maximum(count, self.minimum), 0)
        return draw_subset(bits[1:], row.candidates, jnp.minimum(count, room))


@dataclass(frozen=True)
class WholeWord:
    """All pieces of a word or none (BERT's whole-word masking; Cui et al. 2021, arXiv:1906.08101).

    With ``unit="phrase"`` all words of a phrase or none: PMI masking (Levine et al. 2021, arXiv:2010.01825).
    """

    fixed: bool = True
    """Fill a fixed budget of tokens with random words, the last one by chance, so that the expected count is
    exact; otherwise every word by its own coin, where the count varies and 3 deviations of room are kept."""
    rounding: Rounding = "unbiased"
    """How the budget becomes a whole number (with ``fixed``)."""
    unit: Literal["word", "phrase"] = "word"
    """What is taken whole; phrases are found at data build (`jaxpt data build --phrases`)."""

    def room(self, rate: float, length: int) -> int:
        """Predictions per row."""
        pieces = 2 if self.unit == "word" else 4  # of a unit, on average; a few are longer
        return exact_room(rate, length, 4 * pieces) if self.fixed else _random_room(rate, length, pieces)

    def draw(self, key: Key, rate: Array | float, row: Row, room: int) -> Array:
        """Select words of one row: [L] bool."""
        first_L, second_L = jax.random.bits(key, (2, row.candidates.shape[0]), jnp.uint32)
        words_L = unit_ids(row.starts(self.unit))
        if self.fixed:
            expected = jnp.asarray(rate, jnp.float32) * jnp.sum(row.candidates)
            budget = draw_count(first_L[0], expected, self.rounding)
            return draw_units(second_L, first_L[1], words_L, row.candidates, budget, room)
        coins_L = uniform(first_L)[words_L] < rate
        return draw_within(second_L, words_L, row.candidates & coins_L, room)


@dataclass(frozen=True)
class Spans:
    """Runs of tokens, words or phrases (SpanBERT: Joshi et al. 2020, arXiv:1907.10529; ALBERT's n-grams).

    Lengths and budget count units. Unlike SpanBERT's, which grow rightwards from an anchor and under-mask the
    start of a row, and DeBERTa's, which walk over the row and leave its end alone, the places are uniform. Spans are
    laid over the row without its special tokens and padding: one that reaches over the end of a document goes on in
    the next, as two shorter spans.
    """

    stop: float = 0.2
    """Probability that a span ends after each unit: the parameter of the geometric law."""
    longest: int = 10
    """Units of the longest span; the law is cut there and renormalised."""
    lengths: tuple[float, ...] = ()
    """If given, how frequent spans of 1, 2, 3, ... units are relative to each other, in place of the geometric law:
    (6, 3, 2) is ALBERT's 1/n; ``smoothed_lengths`` makes it of the answers of a task."""
    unit: Unit = "token"
    """What a span is made of; SpanBERT's and ALBERT's are whole words."""
    touching: bool = False
    """A span may begin where another ends, as ALBERT's n-grams do; otherwise a run is a span."""
    rounding: Rounding = "unbiased"
    """How the budget of rate * units becomes a whole number (SpanBERT: "ceil")."""

    def __post_init__(self) -> None:
        """Refuse a law that is none."""
        if not (0 < self.stop < 1 and self.longest >= 1):
            raise ValueError(f"Spans needs 0 < stop < 1 and longest >= 1, not stop={self.stop}, longest={self.longest}")
        if self.lengths and not (min(self.lengths) >= 0 and 0 < sum(self.lengths) < math.inf):
            raise ValueError(f"Spans: lengths are frequencies, not negative and not all 0; they are {self.lengths}")

    @property
    def law(self) -> np.ndarray:
        """P(length = 1, 2, ...)."""
        if self.lengths:
            return np.asarray(self.lengths, float) / sum(self.lengths)
        return truncated_geometric(self.stop, self.longest)

    def room(self, rate: float, length: int) -> int:
        """Predictions per row."""
        longest = len(self.law)
        exact = exact_room(rate, length, longest - 1)
        return exact if self.unit == "token" else max(exact, _random_room(rate, length, 2 * longest))

    def draw(self, key: Key, rate: Array | float, row: Row, room: int) -> Array:
        """Select spans of one row: [L] bool."""
        length = row.candidates.shape[0]
        lengths_bits, places_bits, excess_bits, few_bits = jax.random.bits(key, (4, length + 1), jnp.uint32)
        first_L = row.candidates & row.starts(self.unit)
        units_L = jnp.maximum(unit_ids(first_L), 0)  # special tokens count with the unit before them; unused
        size = jnp.sum(first_L)
        budget = draw_count(few_bits[0], jnp.asarray(rate, jnp.float32) * size, self.rounding)
        lengths_S = draw_fit(few_bits[jnp.array([1, -1])], draw_lengths(lengths_bits[:room], self.law), budget, size)
        starts_S = draw_starts(places_bits, lengths_S, size, touching=self.touching)
        selected_L = row.candidates & cover(starts_S, lengths_S, length)[units_L]
        return draw_within(excess_bits[:-1], units_L, selected_L, room)


@dataclass(frozen=True)
class InverseFrequency:
    """Rare tokens more often: token v with probability min(cap, c / p_v), p_v its share of the training data.

    Every type that is not capped then makes up the same share c of all selected tokens. Each token has its own coin,
    so that this holds over rows; the room is three deviations above the mean.
    """

    cap: float = 0.5
    """The highest probability of a token. At 1 the rarest types are always hidden and never seen as context."""
    uniform: float = 0.0
    """Share of the rate that goes to all types alike, in addition."""

    def __post_init__(self) -> None:
        """Refuse what is no probability."""
        if not (0 < self.cap <= 1 and 0 <= self.uniform <= 1):
            raise ValueError(
                f"InverseFrequency: cap is in (0, 1] and uniform in [0, 1], not {self.cap}, {self.uniform}"
            )

    def room(self, rate: float, length: int) -> int:
        """Predictions per row."""
        if rate > self.cap:
            raise ValueError(
                f"InverseFrequency: no token is selected more often than cap={self.cap}, so not {rate} of all"
            )
        return _random_room(rate, length, 1)

    def draw(self, key: Key, rate: Array | float, row: Row, room: int) -> Array:
        """Select tokens of one row: [L] bool."""
        assert row.shares is not None and row.tokens is not None, "the Row was not made by `describe`"
        coins_L, excess_L = jax.random.bits(key, (2, row.candidates.shape[0]), jnp.uint32)
        capped_V = capped_shares(row.shares, rate, self.cap)
        chance_L = (1 - self.uniform) * capped_V[row.tokens] + self.uniform * rate
        selected_L = row.candidates & (uniform(coins_L) < chance_L)
        return draw_within(excess_L, jnp.arange(selected_L.shape[0]), selected_L, room)


@dataclass(frozen=True)
class Informative:
    """What the model itself finds hard to predict: a fixed share of every row, with probability by its scores.

        P(t) = min(1, c w_t),   w_t = (1 - floor) s_t^power / mean(s^power) + floor,   c so that they add up to k

    s_t is the surprisal -log p(x_t | context) or the entropy of p(. | context), of a context in which t is hidden.
    The selected surprisal is 1 + (deviation / mean)^2 times that of a uniform choice (where nothing is capped).
    """

    score: Literal["surprisal", "entropy"] = "surprisal"
    """What a model's prediction is judged by."""
    passes: Literal[1, 2] = 2
    """Forward passes that score: 2 hide one half of the tokens each; 1 hides a random half and selects from it."""
    power: float = 1.0
    """Tempers the scores: 0 is uniform."""
    clip: float = 12.0
    """The highest score, in nats: noise that nobody can predict is always the most surprising."""
    floor: float = 0.1
    """Share of the weight that goes to all tokens alike, so that none is forgotten."""
    unbiased: bool = False
    """Multiply each loss by (k / n) / P(t): an estimate of the mean over all tokens, which is importance sampling."""

    def __post_init__(self) -> None:
        """Refuse what is no weighting."""
        if not (0 < self.floor <= 1 and self.power >= 0 and self.clip > 0):
            raise ValueError(
                f"Informative needs 0 < floor <= 1, power >= 0 and clip > 0, not floor={self.floor}, "
                f"power={self.power}, clip={self.clip}"
            )

    def room(self, rate: float, length: int) -> int:
        """Predictions per row."""
        if self.passes == 1 and rate > 0.5:
            raise ValueError(f"Informative(passes=1) scores one half of the tokens and cannot select {rate} of them")
        return exact_room(rate, length)

    def draw(self, key: Key, rate: Array | float, row: Row, room: int) -> Array:
        """Select tokens of one row: [L] bool."""
        bits = jax.random.bits(key, (2 + row.candidates.shape[0],), jnp.uint32)
        chance_L, count = self._chances(bits[0], rate, row, room)
        return draw_unequal(bits[2:], bits[1], chance_L, count)

    def importance(self, key: Key, rate: Array | float, row: Row, room: int) -> Array:
        """What the loss of each token selected by ``draw`` with the same arguments is multiplied by: [L] f32."""
        bits = jax.random.bits(key, (2 + row.candidates.shape[0],), jnp.uint32)
        chance_L, count = self._chances(bits[0], rate, row, room)
        share = count / jnp.maximum(jnp.sum(chance_L > 0), 1)
        return share / jnp.where(chance_L > 0, chance_L, 1)

    def _chances(self, bits: Array, rate: Array | float, row: Row, room: int) -> tuple[Array, Array]:
        assert row.scores is not None, "Informative selects by the scores of a model, which this Row lacks"
        scored_L = row.candidates & (row.scores >= 0)
        expected = jnp.asarray(rate, jnp.float32) * jnp.sum(row.candidates)
        count = jnp.minimum(draw_count(bits, expected, "unbiased"), jnp.minimum(room, jnp.sum(scored_L)))
        raised_L = jnp.where(scored_L, jnp.clip(row.scores, 0, self.clip), 0) ** self.power
        mean = jnp.sum(raised_L * scored_L) / jnp.maximum(jnp.sum(scored_L), 1)
        weights_L = (1 - self.floor) * raised_L / jnp.where(mean > 0, mean, 1) + self.floor
        return chances(jnp.where(scored_L, weights_L, 0), count), count


@dataclass(frozen=True)
class Alternative:
    """One of the rules of a ``Mixed``."""

    selection: Independent | FixedCount | WholeWord | Spans | InverseFrequency
    """The rule."""
    share: float = 1.0
    """How often a row is drawn by it, relative to the other rules."""
    rate: float = 1.0
    """Its rate, as a multiple of the objective's."""


@dataclass(frozen=True)
class Mixed:
    """One of several rules for each row: a mixture of corruptions under one loss, in one pass.

    Example:
      >>> Mixed((Alternative(FixedCount()), Alternative(Spans(), share=3, rate=2))).room(0.15, 100)
      39
    """

    alternatives: tuple[Alternative, ...]
    """The rules and their shares."""

    def __post_init__(self) -> None:
        """Refuse what is no mixture."""
        shares, rates = ([getattr(each, name) for each in self.alternatives] for name in ("share", "rate"))
        if not (self.alternatives and min(shares) >= 0 and sum(shares) > 0 and min(rates) >= 0):
            raise ValueError(f"Mixed needs alternatives with shares and rates of 0 or more, not {self.alternatives}")

    def room(self, rate: float, length: int) -> int:
        """Predictions per row."""
        for each in self.alternatives:
            if each.rate * rate > 1:
                raise ValueError(f"Mixed: rate {rate} times {each.rate} of {each.selection} is more than all tokens")
        return max(each.selection.room(each.rate * rate, length) for each in self.alternatives)

    def draw(self, key: Key, rate: Array | float, row: Row, room: int) -> Array:
        """Select tokens of one row: [L] bool."""
        which, *keys = jax.random.split(key, 1 + len(self.alternatives))
        edges = np.cumsum([each.share for each in self.alternatives])[:-1] / sum(e.share for e in self.alternatives)
        chosen = jnp.sum(uniform(jax.random.bits(which, (), jnp.uint32)) >= edges)
        drawn = [
            each.selection.draw(own, each.rate * rate, row, room)
            for each, own in zip(self.alternatives, keys, strict=True)
        ]
        return jnp.stack(drawn)[chosen]


Selection: TypeAlias = Independent | FixedCount | WholeWord | Spans | InverseFrequency | Informative | Mixed


def fields_of(selection: Selection) -> tuple[str, ...]:
    """Return what a selection reads of ``Batch.extras``, for ``RowSpec.fields``."""
    rules = [each.selection for each in selection.alternatives] if isinstance(selection, Mixed) else [selection]
    return ("phrase_starts",) if any(getattr(rule, "unit", "") == "phrase" for rule in rules) else ()
