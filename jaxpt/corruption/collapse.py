"""Collapsing: runs of hidden tokens become sentinels, text by text (T5, Raffel et al. 2020, arXiv:1910.10683).

Arrays over the texts of a row (suffix ``_S``) are indexed as those over pieces are: entry 0 is the padding.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxpt.corruption.compact import compact
from jaxpt.corruption.pieces import before, lay
from jaxpt.types import Array


class Side(NamedTuple):
    """A row of texts of new lengths, one after the other."""

    tokens: Array  # [J] i32
    segment_ids: Array  # [J] i32: the text, 0 = padding
    positions: Array  # [J] i32, restart in each text
    sizes: Array  # [S] i32, tokens of each text


def text_sizes(texts_L: Array, count: int) -> Array:
    """Return how many tokens each text of a row has: [count + 1] i32, 0 for the padding."""
    return jnp.zeros(count + 1, jnp.int32).at[texts_L].add((texts_L > 0).astype(jnp.int32))


def collapse(
    tokens_L: Array,
    texts_L: Array,
    hidden_L: Array,
    count: int,
    size: int,
    *,
    sentinels: Array | np.ndarray,
    end: int,
    pad: int,
    front: Array | int = -1,
) -> Side:
    """Write a sentinel for each run of hidden tokens of a text, the first sentinel for the first, and an end behind it.

    T5's inputs are made of what it hides, its targets of the complement: there, too, sentinels count the runs that
    they stand for, so that a text that begins with a hidden token has other sentinels in its targets.

    Args:
      tokens_L: [L] i32.
      texts_L: [L] i32: 1, 2, ... up to ``count``, from the start of the row; 0 = padding.
      hidden_L: [L] bool.
      count: texts of a row, at most.
      size: slots of the new row, J; what does not fit is cut.
      sentinels: [M] i32, in the order of use; at least as many as a text has runs.
      end: the token behind each text.
      pad: what fills the row.
      front: [] i32, the token before each text; -1 = none.

    >>> import jax.numpy as jnp
    >>> hidden = jnp.array([0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 1, 1]) > 0
    >>> tokens, one, sentinels = jnp.arange(100, 112), jnp.ones(12, int), jnp.arange(999, 990, -1)
    >>> two = [collapse(tokens, one, x, 1, 12, sentinels=sentinels, end=1, pad=0) for x in (hidden, ~hidden)]
    >>> two[0].tokens.tolist()
    [100, 101, 999, 104, 105, 106, 998, 108, 109, 997, 1, 0]
    >>> two[1].tokens.tolist()
    [999, 102, 103, 998, 107, 997, 110, 111, 1, 0, 0, 0]
    """
    joined_L = jnp.concatenate([jnp.zeros(1, bool), hidden_L[:-1] & (texts_L[1:] == texts_L[:-1])])
    first_L = hidden_L & ~joined_L & (texts_L > 0)
    kept_L = (first_L | ~hidden_L) & (texts_L > 0)
    runs_S, kept_S = text_sizes(texts_L * first_L, count), text_sizes(texts_L * kept_L, count)
    numbers_L = jnp.cumsum(first_L) - 1 - before(runs_S)[texts_L]
    tokens_L = jnp.where(first_L, jnp.asarray(sentinels)[jnp.maximum(numbers_L, 0)], tokens_L)

    leads = jnp.asarray(front >= 0, jnp.int32)
    sizes_S = jnp.where(text_sizes(texts_L, count) > 0, leads + kept_S + 1, 0)
    texts_J, places_J = lay(sizes_S, size)
    positions_K, _ = compact(kept_L, size)
    kept_J = before(kept_S)[texts_J] + places_J - leads
    tokens_J = tokens_L[positions_K[jnp.clip(kept_J, 0, size - 1)]]
    tokens_J = jnp.where(places_J < leads, front, tokens_J)
    tokens_J = jnp.where(places_J == sizes_S[texts_J] - 1, end, tokens_J)
    return Side(jnp.where(texts_J > 0, tokens_J, pad), texts_J, places_J, sizes_S)


def follow(first: Side, second: Side, size: int, pad: int) -> tuple[Side, Array]:
    """Put each text of one row before the same text of another.

    Args:
      first, second: rows of the same texts.
      size: slots of the new row, J; what does not fit is cut.
      pad: what fills the row.

    Returns:
      The row, and which of its tokens are of the first: [J] bool.

    >>> import jax.numpy as jnp
    >>> row = lambda *tokens: Side(jnp.array(tokens), None, None, jnp.array([0, 2, 1]))
    >>> both, is_first = follow(row(7, 8, 9), row(4, 5, 6), 7, pad=0)
    >>> both.tokens.tolist(), is_first.astype(int).tolist()
    ([7, 8, 4, 5, 9, 6, 0], [1, 1, 0, 0, 1, 0, 0])
    """
    sizes_S = first.sizes + second.sizes
    texts_J, places_J = lay(sizes_S, size)
    ahead_J = first.sizes[texts_J]
    is_first_J = places_J < ahead_J
    one_J = first.tokens[jnp.clip(before(first.sizes)[texts_J] + places_J, 0, first.tokens.shape[0] - 1)]
    places_in_second_J = before(second.sizes)[texts_J] + places_J - ahead_J
    other_J = second.tokens[jnp.clip(places_in_second_J, 0, second.tokens.shape[0] - 1)]
    tokens_J = jnp.where(texts_J > 0, jnp.where(is_first_J, one_J, other_J), pad)
    return Side(tokens_J, texts_J, places_J, sizes_S), is_first_J
