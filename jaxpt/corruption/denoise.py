"""BART's noise: spans hidden behind one mask, masks put between tokens, documents turned round (arXiv:1910.13461).

Every function works on one packed row and treats its documents, each for itself, in one pass. First and last tokens
that are special (BOS, EOS) stay where they are and are never hidden; a special token inside a text ends a span.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.corruption.choose import draw_count, ranks_within, uniform
from jaxpt.corruption.compact import compact
from jaxpt.corruption.pieces import before, before_within, lay
from jaxpt.corruption.rows import starts_of
from jaxpt.corruption.spans import draw_lengths
from jaxpt.types import Array, Key

ReplaceLength: TypeAlias = Literal[-1, 0, 1]  # a span becomes: a mask for each of its tokens, nothing, or one mask
EACH, NOTHING, ONE = -1, 0, 1


def poisson_law(mean: float) -> np.ndarray:
    """Return P(length = 0, 1, 2, ...) of a Poisson law, cut behind the first value below 1e-7 as BART does.

    >>> law = poisson_law(3.5)
    >>> len(law), round(float(law[0]), 4)
    (19, 0.0302)
    """
    law = [math.exp(-mean)]
    while law[-1] >= 1e-7 or len(law) <= mean:
        law.append(law[-1] * mean / len(law))
    return np.array(law) / sum(law)


# ------------------------------------------------------------------------------------------- infilling


class Infilling(NamedTuple):
    """The decisions about the spans of one row."""

    units: Array  # [L] i32: units of the span that starts at this token, 0 = none starts
    random: Array  # [L] bool: a span that starts here becomes a random token, not a mask
    ids: Array  # [L] i32: what a random token is
    inserts: Array  # [S] i32: spans of no unit, for each document; they become insertions


def draw_infilling(
    key: Key,
    starts_L: Array,
    segment_ids_L: Array,
    rate: float,
    law: np.ndarray | None,
    random: float,
    ids_M: np.ndarray,
) -> Infilling:
    """Draw spans until they hold ``ceil(rate * n)`` of the n units of each document, and a start for each.

    Lengths come from the law; the one that passes the budget is cut to it. Starts are distinct random units, so that
    spans may overlap. A length of 0 is an insertion. (A document of few units may run out of starts before its
    lengths fill the budget: then the last one takes the rest, where fairseq draws further insertions.)

    Args:
      key: a key.
      starts_L: [L] bool, the first token of each unit that may be hidden.
      segment_ids_L: [L] i32, 0 = padding.
      rate: share of the units.
      law: P(length = 0, 1, ...); None = every span is one unit.
      random: share of the spans that become a random token.
      ids_M: [M] i32, what a random token is drawn from.
    """
    length = starts_L.shape[0]
    order_bits_L, length_bits_L, random_bits_L, id_bits_L = jax.random.bits(key, (4, length), jnp.uint32)
    index_L = jnp.arange(length, dtype=jnp.int32)
    documents_L = starts_of(segment_ids_L)
    first_L = jax.lax.cummax(jnp.where(documents_L, index_L, 0))
    units_S = jnp.zeros(length + 1, jnp.int32).at[segment_ids_L].add(starts_L.astype(jnp.int32))
    budget_L = draw_count(jnp.uint32(0), jnp.float32(rate) * units_S, "ceil")[segment_ids_L]
    # The places first, first + 1, ... of a document hold the lengths of its units in their random order.
    left_units_L = units_S[segment_ids_L] - (index_L - first_L)  # this one among them
    lengths_L = jnp.ones(length, jnp.int32) if law is None else draw_lengths(length_bits_L, law) - 1
    lengths_L = jnp.where(left_units_L > 0, lengths_L, 0)
    left_L = budget_L - before_within(lengths_L, segment_ids_L)
    lengths_L = jnp.where(left_units_L == 1, left_L, jnp.minimum(lengths_L, left_L))
    is_drawn_L = (left_units_L > 0) & (left_L > 0)
    lengths_L = jnp.where(is_drawn_L, lengths_L, 0)
    inserts_S = (
        jnp.zeros(length + 1, jnp.int32).at[segment_ids_L].add((is_drawn_L & (lengths_L == 0)).astype(jnp.int32))
    )
    ranks_L = ranks_within(order_bits_L, starts_L, segment_ids_L)
    return Infilling(
        jnp.where(starts_L, lengths_L[first_L + ranks_L], 0),
        uniform(random_bits_L) < random,
        jnp.asarray(ids_M, jnp.int32)[id_bits_L % len(ids_M)],
        inserts_S.at[0].set(0),
    )


def infill(
    tokens_L: Array,
    starts_L: Array,
    candidates_L: Array,
    segment_ids_L: Array,
    infilling: Infilling,
    replace_length: ReplaceLength,
    mask_id: int,
) -> tuple[Array, Array]:
    """Hide the spans.

    A span is its first unit and the next ones up to its length, the end of its document or a special token. A start
    that another span covers counts as a part of that one; spans that touch keep a mask each.

    Args:
      tokens_L: [L] i32.
      starts_L: [L] bool, the first token of each unit.
      candidates_L: [L] bool, neither special nor padding.
      segment_ids_L: [L] i32, 0 = padding.
      infilling: the decisions.
      replace_length: what becomes of a span.
      mask_id: what is written.

    Returns:
      tokens_L ([L] i32, with masks) and kept_L ([L] bool: what is not deleted).

    >>> ones, two = jnp.ones(6, int), jnp.array([0, 2, 0, 0, 0, 0])
    >>> spans = Infilling(two, two < 0, two, two)
    >>> [[int(t) for t, kept in zip(*infill(jnp.arange(6), ones > 0, ones > 0, ones, spans, how, -9)) if kept]
    ...  for how in (1, 0, -1)]
    [[0, -9, 3, 4, 5], [0, 3, 4, 5], [0, -9, -9, 3, 4, 5]]
    """
    length = tokens_L.shape[0]
    blocks_L = ~candidates_L | starts_of(segment_ids_L)  # no span goes on into these
    units_L = jnp.cumsum(starts_L | blocks_L, dtype=jnp.int32)
    is_last_L = jnp.roll(blocks_L, -1).at[-1].set(True)
    last_unit_L = jax.lax.cummin(jnp.where(is_last_L, units_L, length), reverse=True)
    is_start_L = infilling.units > 0
    reach_L = jnp.where(is_start_L, jnp.minimum(units_L + infilling.units - 1, last_unit_L), -1)
    reached_L = jnp.pad(jax.lax.cummax(reach_L)[:-1], (1, 0), constant_values=-1)  # by spans that start before
    covered_L = candidates_L & (reached_L >= units_L)
    owner_L = jax.lax.cummax(jnp.where(is_start_L & ~covered_L, jnp.arange(length), 0))
    written_L = jnp.where(infilling.random[owner_L], infilling.ids, mask_id)
    present_L = segment_ids_L > 0
    if replace_length == EACH:
        return jnp.where(is_start_L | covered_L, written_L, tokens_L), present_L
    kept_L = present_L & ~covered_L & (~is_start_L if replace_length == NOTHING else True)
    return jnp.where(is_start_L, written_L, tokens_L), kept_L


# ------------------------------------------------------------------------------ the new row: inserts, turns


class Layout(NamedTuple):
    """The documents of a new row: what is kept of them, and what is inserted."""

    segment_ids: Array  # [J] i32, 0 = padding
    positions: Array  # [J] i32, restart in each document
    heads: Array  # [S] i32: 1 where a document begins with a special token
    sizes: Array  # [S] i32: tokens of each document between a special first and a special last one

    @property
    def movable(self) -> Array:
        """[J] bool: all but padding and a first or last token that is special."""
        place_J = self.positions - self.heads[self.segment_ids]
        return (self.segment_ids > 0) & (place_J >= 0) & (place_J < self.sizes[self.segment_ids])


def lay_documents(
    candidates_L: Array, segment_ids_L: Array, kept_L: Array, inserts_S: Array, length: int
) -> tuple[Layout, Array]:
    """Lay the documents into a row of another length.

    Insertions that do not fit into it are left out, and so are those into a document without text.

    Args:
      candidates_L: [L] bool, neither special nor padding.
      segment_ids_L: [L] i32, 0 = padding.
      kept_L: [L] bool, no padding; at most ``length`` tokens.
      inserts_S: [S] i32, entry 0 is 0.
      length: slots of the row, J.

    Returns:
      The layout and the insertions that are left, [S] i32.
    """
    nothing_S = jnp.zeros(segment_ids_L.shape[0] + 1, jnp.int32)
    kept_S = nothing_S.at[segment_ids_L].add(kept_L.astype(jnp.int32))
    inserts_S = jnp.where(nothing_S.at[segment_ids_L].max(candidates_L.astype(jnp.int32)) > 0, inserts_S, 0)
    inserts_S = jnp.clip(length - jnp.sum(kept_S) - before(inserts_S), 0, inserts_S)
    first_L = starts_of(segment_ids_L)
    last_L = jnp.roll(first_L, -1).at[-1].set(True)
    special_L = ~candidates_L & (segment_ids_L > 0)
    heads_S = nothing_S.at[segment_ids_L].add((special_L & first_L).astype(jnp.int32))
    tails_S = nothing_S.at[segment_ids_L].add((special_L & last_L & ~first_L).astype(jnp.int32))
    sizes_S = kept_S + inserts_S
    return Layout(*lay(sizes_S, length), heads_S, sizes_S - heads_S - tails_S), inserts_S


class Insertions(NamedTuple):
    """The decisions about what is inserted, and where in the new row."""

    slots: Array  # [J] bool
    tokens: Array  # [J] i32, what stands there


def draw_insertions(
    key: Key, layout: Layout, inserts_S: Array, random: float, ids_M: np.ndarray, mask_id: int
) -> Insertions:
    """Choose the slots of the insertions, uniform over the movable ones of each document, and what is written there.

    Args:
      key: a key.
      layout: of the new row.
      inserts_S: [S] i32, for each document.
      random: share of the insertions that are a random token.
      ids_M: [M] i32, what a random token is drawn from.
      mask_id: what the others are.
    """
    order_bits_J, random_bits_J, id_bits_J = jax.random.bits(key, (3, layout.positions.shape[0]), jnp.uint32)
    ranks_J = ranks_within(order_bits_J, layout.movable, layout.segment_ids)
    ids_J = jnp.asarray(ids_M, jnp.int32)[id_bits_J % len(ids_M)]
    return Insertions(
        layout.movable & (ranks_J < inserts_S[layout.segment_ids]),
        jnp.where(uniform(random_bits_J) < random, ids_J, mask_id),
    )


def insert(tokens_L: Array, kept_L: Array, layout: Layout, insertions: Insertions, pad: int) -> Array:
    """Write the kept tokens, in order, and the insertions between them: [J] i32.

    >>> layout = Layout(jnp.ones(4, int), jnp.arange(4), jnp.array([0, 0]), jnp.array([0, 4]))
    >>> insertions = Insertions(jnp.array([False, True, False, True]), jnp.full(4, -9))
    >>> insert(jnp.array([5, 6, 7]), jnp.array([True, False, True]), layout, insertions, pad=0).tolist()
    [5, -9, 7, -9]
    """
    places_L, _ = compact(kept_L, kept_L.shape[0])
    present_J = layout.segment_ids > 0
    index_J = jnp.cumsum(present_J & ~insertions.slots, dtype=jnp.int32) - 1
    tokens_J = jnp.where(insertions.slots, insertions.tokens, tokens_L[places_L[jnp.maximum(index_J, 0)]])
    return jnp.where(present_J, tokens_J, pad)


def draw_turns(key: Key, layout: Layout, rate: float) -> Array:
    """Decide how far each document is turned round: [S] i32, uniform on 0 .. n - 1, and 0 of most below rate 1."""
    coins_S, bits_S = jax.random.bits(key, (2, layout.sizes.shape[0]), jnp.uint32)
    turns_S = (bits_S % jnp.maximum(layout.sizes, 1).astype(jnp.uint32)).astype(jnp.int32)
    return jnp.where(uniform(coins_S) < rate, turns_S, 0)


def turn(tokens_J: Array, layout: Layout, turns_S: Array) -> Array:
    """Turn the movable tokens of each document to the left, so that another one begins it: [J] i32.

    >>> layout = Layout(jnp.ones(4, int), jnp.arange(4), jnp.array([0, 1]), jnp.array([0, 3]))
    >>> turn(jnp.array([9, 1, 2, 3]), layout, jnp.array([0, 1])).tolist()
    [9, 2, 3, 1]
    """
    index_J = jnp.arange(tokens_J.shape[0], dtype=jnp.int32)
    of_J = layout.segment_ids
    place_J = layout.positions - layout.heads[of_J]
    turned_J = (place_J + turns_S[of_J]) % jnp.maximum(layout.sizes[of_J], 1)
    return tokens_J[jnp.where(layout.movable, index_J - place_J + turned_J, index_J)]
