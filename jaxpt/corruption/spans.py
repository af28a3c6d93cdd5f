"""Spans: lengths from a law, a budget, and a place for each, uniform over all placements that do not touch."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.corruption.choose import draw_subset, uniform
from jaxpt.corruption.compact import compact
from jaxpt.corruption.pieces import before, lay
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


def draw_fit(bits_2: Array, lengths_S: Array, budget: Array, size: Array) -> Array:
    """Keep the first spans that fill the budget; the span that would pass it stays with probability left / length.

    So the expected number of tokens is the budget, and long spans are not thinned out as they are where the
    last span is cut or dropped (mean of the geometric law at budget 77: 3.759 of 3.797; cut 3.693; dropped 3.716).
    The span that fills the budget is longer than others on average, so it changes places with any of them: spans are
    laid in order, and one end of the row would be covered more often.

    Args:
      bits_2: [2] u32, random.
      lengths_S: [S] i32; S >= budget.
      budget: [] i32, tokens.
      size: [] i32, tokens that the spans are laid over; a span longer than the room left is cut to it.

    Returns:
      [S] i32, 0 = unused; used ones come first.
    """
    before_S = jnp.cumsum(lengths_S) - lengths_S
    lengths_S = jnp.minimum(lengths_S, size - before_S)
    left_S = budget - before_S
    kept_S = (left_S > 0) & ((lengths_S <= left_S) | (uniform(bits_2[0]) * lengths_S < left_S))
    lengths_S = jnp.where(kept_S, lengths_S, 0)
    used = jnp.maximum(jnp.sum(lengths_S > 0), 1)
    index_S, last, other = jnp.arange(lengths_S.shape[0]), used - 1, (bits_2[1] % used.astype(jnp.uint32)).astype(int)
    return jnp.select([index_S == last, index_S == other], [lengths_S[other], lengths_S[last]], lengths_S)


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


def draw_runs(bits_L: Array, tokens_S: Array, runs_S: Array) -> Array:
    """Cut the tokens of each piece into runs, none of them empty, uniformly over all ways to do so.

    A piece is cut at ``runs - 1`` of the ``tokens - 1`` places between two tokens.

    Args:
      bits_L: [L] u32, random; at least as many as there are tokens, or runs.
      tokens_S: [S] i32, of each piece; entry 0 is 0, as of padding (``Pieces``).
      runs_S: [S] i32, at most the tokens of the piece; a piece without tokens may have one, of length 0.

    Returns:
      [L] i32, the lengths of the runs, those of a piece behind those of the one before.

    >>> import jax.numpy as jnp
    >>> draw_runs(jnp.array([3, 9, 7, 5, 1, 2], jnp.uint32), jnp.array([0, 4, 1]), jnp.array([0, 2, 1])).tolist()
    [3, 1, 1, 0, 0, 0]
    """
    length = bits_L.shape[0]
    index_L = jnp.arange(length, dtype=jnp.int32)
    pieces_L, places_L = lay(tokens_S, length)
    first_L, unused_L = places_L == 0, pieces_L == 0
    # the order in which a piece is cut: by bits, and its first token, before which there is no cut, last
    groups_L = 2 * jnp.where(unused_L, length, pieces_L) + first_L
    *_, order_L = jax.lax.sort((groups_L, bits_L, index_L), num_keys=2)  # stable: a tie of bits changes no count
    ranks_L = jnp.zeros(length, jnp.int32).at[order_L].set(index_L, unique_indices=True) - (index_L - places_L)
    cut_L = ~first_L & (ranks_L < runs_S[pieces_L] - 1)
    cuts_before_S = before(jnp.maximum(jnp.minimum(runs_S, tokens_S) - 1, 0))
    runs_L = before(runs_S)[pieces_L] + jnp.cumsum(cut_L) - cuts_before_S[pieces_L]
    return jnp.zeros(length, jnp.int32).at[jnp.where(unused_L, length, runs_L)].add(1, mode="drop")


def draw_alternating(bits_2L: Array, sizes_S: Array, hidden_S: Array, spans_S: Array) -> Array:
    """Hide spans of each piece: its hidden and its other tokens, each cut at random into ``spans`` runs, alternate.

    So a piece begins with a run that is not hidden and ends with one that is (Raffel et al. 2020,
    arXiv:1910.10683). Of n hidden tokens in s spans, a span has l tokens with probability
    C(n - l - 1, s - 2) / C(n - 1, s - 1).

    Args:
      bits_2L: [2, L] u32, random.
      sizes_S: [S] i32, tokens of each piece, which follow one another from the start of the row; entry 0 is 0.
      hidden_S: [S] i32, tokens to hide.
      spans_S: [S] i32, at most ``hidden`` (1 where nothing is hidden) and ``sizes - hidden``; 0 of no tokens.

    Returns:
      [L] bool.

    >>> import jax.numpy as jnp
    >>> bits = jnp.array([[3, 9, 7, 5, 1, 2, 4, 8]] * 2, jnp.uint32)
    >>> draw_alternating(bits, jnp.array([0, 8]), jnp.array([0, 3]), jnp.array([0, 2])).astype(int).tolist()
    [0, 0, 0, 0, 1, 1, 0, 1]
    """
    open_L, hidden_L = jax.vmap(draw_runs, (0, 0, None))(bits_2L, jnp.stack([sizes_S - hidden_S, hidden_S]), spans_S)
    return cover(jnp.cumsum(open_L) + before(hidden_L), hidden_L, bits_2L.shape[1])
