"""Spans: lengths from a law, a budget, and a place for each, uniform over all placements that do not touch."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxpt.corruption.choose import draw_subset, uniform
from jaxpt.corruption.compact import compact
from jaxpt.types import Array


def truncated_geometric(stop: float, longest: int) -> np.ndarray:
    """Return P(length = 1 .. longest) proportional to ``stop * (1 - stop)**(length - 1)``.

    SpanBERT's law is ``truncated_geometric(0.2, 10)``, of mean 3.797 (Joshi et al. 2020, arXiv:1907.10529).

    >>> law = truncated_geometric(0.2, 10)
    >>> float(round(law @ range(1, 11), 3))
    3.797
    """
    law = stop * (1 - stop) ** np.arange(longest)
    return law / law.sum()


def smoothed_lengths(counts: Sequence[int], longest: int) -> tuple[float, ...]:
    """Return span lengths like those of a task's answers: their histogram, clipped, every count plus one, of sum 1.

    Args:
      counts: how many answers have 1, 2, 3, ... tokens (or words, for spans of words).
      longest: of a span; longer answers count as this long.

    >>> smoothed_lengths([5, 2, 0, 3], longest=3)
    (0.46153846153846156, 0.23076923076923078, 0.3076923076923077)
    """
    clipped = np.ones(longest)
    np.add.at(clipped, np.minimum(np.arange(len(counts)), longest - 1), counts)
    return tuple((clipped / clipped.sum()).tolist())


def draw_lengths(bits_S: Array, law: np.ndarray) -> Array:
    """Turn random bits ([S] u32) into span lengths ([S] i32 in 1 .. len(law)) by the distribution function."""
    cumulative = jnp.asarray(np.cumsum(law)[:-1], jnp.float32)
    return 1 + jnp.sum(cumulative <= uniform(bits_S)[:, None], axis=1, dtype=jnp.int32)


def draw_fit(bits: Array, lengths_S: Array, budget: Array, size: Array) -> Array:
    """Keep the first spans that fill the budget; the span that would pass it stays with probability left / length.

    So the expected number of tokens is the budget, and long spans are not thinned out as they are where the
    last span is cut or dropped (mean of the geometric law at budget 77: 3.759 of 3.797; cut 3.693; dropped 3.716).

    Args:
      bits: [] u32, random.
      lengths_S: [S] i32; S >= budget.
      budget: [] i32, tokens.
      size: [] i32, tokens that the spans are laid over; a span longer than the room left is cut to it.

    Returns:
      [S] i32, 0 = unused; used ones come first.
    """
    before_S = jnp.cumsum(lengths_S) - lengths_S
    lengths_S = jnp.minimum(lengths_S, size - before_S)
    left_S = budget - before_S
    kept_S = (left_S > 0) & ((lengths_S <= left_S) | (uniform(bits) * lengths_S < left_S))
    return jnp.where(kept_S, lengths_S, 0)


def draw_starts(bits_G: Array, lengths_S: Array, size: Array, *, touching: bool = False) -> Array:
    """Place spans, in order, uniformly over all placements in which no two of them overlap, or touch.

    Of the ``size - tokens + 1`` gaps around the uncovered tokens one is chosen for each span; where there are
    fewer gaps than spans, the spans are spread evenly over them and some touch. Where spans may touch, they are
    chosen among the ``size - tokens + spans`` uncovered tokens and spans instead.

    Args:
      bits_G: [G] u32, random; G - 1 is the static bound of ``size``.
      lengths_S: [S] i32, 0 = unused, used ones first.
      size: [] i32, tokens that the spans are laid over.
      touching: whether a span may begin where another ends.

    Returns:
      [S] i32, the first token of each span (of no meaning where unused).
    """
    slots = lengths_S.shape[0]
    tokens, spans = jnp.sum(lengths_S), jnp.sum(lengths_S > 0)
    before_S = jnp.cumsum(lengths_S) - lengths_S
    places = size - tokens + (spans if touching else 1)
    chosen_G = draw_subset(bits_G, jnp.arange(bits_G.shape[0]) < places, spans)
    chosen_S, _ = compact(chosen_G, slots)
    index_S = jnp.arange(slots, dtype=jnp.int32)
    if touching:
        return chosen_S - index_S + before_S
    spread_S = index_S * places // jnp.maximum(spans, 1)
    return jnp.where(spans <= places, chosen_S, spread_S) + before_S


def cover(starts_S: Array, lengths_S: Array, capacity: int) -> Array:
    """Mark the tokens of the spans.

    Args:
      starts_S: [S] i32.
      lengths_S: [S] i32, 0 = unused.
      capacity: tokens, L.

    Returns:
      [L] bool.

    >>> import jax.numpy as jnp
    >>> cover(jnp.array([1, 4, 0]), jnp.array([2, 1, 0]), 6).astype(int).tolist()
    [0, 1, 1, 0, 1, 0]
    """
    used_S = (lengths_S > 0).astype(jnp.int32)
    edges = jnp.zeros(capacity + 1, jnp.int32).at[starts_S].add(used_S, mode="drop")
    edges = edges.at[starts_S + lengths_S].add(-used_S, mode="drop")
    return jnp.cumsum(edges)[:capacity] > 0
