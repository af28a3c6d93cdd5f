"""Pairs of texts: where a document is cut in two, what stands in for its second half, and [CLS] A [SEP] B [SEP].

Everything is arithmetic on a row and the row beside it: no loop over sentences, documents or tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpt.corruption.choose import uniform
from jaxpt.types import Array, Key


class Text(NamedTuple):
    """The arrays of one row of raw text, without special tokens."""

    tokens: Array  # [M] i32
    segment_ids: Array  # [M] i32: the documents, 0 = padding
    sentence_ids: Array  # [M] i32, restart at 0 in each document
    document_ids: Array  # [M] i32: equal for the pieces of one document, whatever row they are in


class Pairs(NamedTuple):
    """The decisions for the P pairs of a row; places count through the row and on through the row beside it."""

    present: Array  # [P] bool
    first: Array  # [P] i32: where A begins
    first_size: Array  # [P] i32
    second: Array  # [P] i32: where B begins
    second_size: Array  # [P] i32
    is_negative: Array  # [P] bool: B is of another document, or A and B are swapped
    is_known: Array  # [P] bool: the label means something


class Assembled(NamedTuple):
    """The row that a network reads."""

    source: Array  # [L] i32: the place of each token in the two rows, one after the other; any at [CLS] and [SEP]
    tokens: Array  # [L] i32
    segment_ids: Array  # [L] i32: the pairs, 0 = padding
    positions: Array  # [L] i32, restart at 0 in each pair
    sides: Array  # [L] i32: 0 for [CLS] A [SEP], 1 for B [SEP]
    cls: Array  # [P] i32: the places of [CLS], 0 where there is no pair


def shortened(first: Array | int, second: Array | int, room: Array | int) -> tuple[Array, Array]:
    """Return the sizes of two texts after tokens were taken from the longer one, or B, until both fit in ``room``.

    The closed form of BERT's loop.

    >>> [tuple(int(n) for n in shortened(*sizes)) for sizes in ((9, 2, 8), (9, 5, 8), (4, 4, 7), (3, 4, 9))]
    [(6, 2), (4, 4), (4, 3), (3, 4)]
    """
    first, second = jnp.asarray(first), jnp.asarray(second)
    low = jnp.minimum(first, second)
    keeps = (first != second) & (low <= room // 2)
    half, other_half = (room + 1) // 2, room // 2
    short_first = jnp.where(keeps, jnp.where(first < second, first, room - second), half)
    short_second = jnp.where(keeps, jnp.where(first < second, room - first, second), other_half)
    fits = first + second <= room
    return jnp.where(fits, first, short_first), jnp.where(fits, second, short_second)


def heads_of(bits_W: Array, tosses: Array) -> Array:
    """Count heads in some tosses of a fair coin, [] i32: the first ``tosses`` bits of ``bits_W`` ([W] u32)."""
    left_W = jnp.clip(tosses - 32 * jnp.arange(bits_W.shape[0]), 0, 32)
    mask_W = jnp.where(left_W == 32, jnp.uint32(0xFFFFFFFF), (jnp.uint32(1) << left_W.astype(jnp.uint32)) - 1)
    return jnp.sum(jax.lax.population_count(bits_W & mask_W)).astype(jnp.int32)


def draw_pairs(key: Key, row: Text, beside: Text | None, pairs: int, negative_rate: float, short_rate: float) -> Pairs:
    """Cut every document of a row into two texts, and decide which pairs are wrong.

    A document has the room of its own tokens; the padding of the row is the last one's. With probability
    ``short_rate`` a pair aims at fewer tokens, uniform from 2 to its room. Of the sentences up to the aim, A has a
    uniform number, at least one and not all. B is the rest, or in a wrong pair

    - with ``beside``, sentences of another document, from a random one on, which fill what A leaves of the aim (next
      sentence prediction, Devlin et al. 2019; a document of one sentence is always such a pair);
    - without it, A, and A is what was B (sentence order prediction, Lan et al. 2020; one sentence has no order).

    Args:
      key: of the row.
      row: the row.
      beside: the row that wrong second texts are taken from, or None.
      pairs: P, the documents that are read; any others are left out.
      negative_rate: probability of a wrong pair.
      short_rate: probability of a shorter pair.
    """
    length = row.tokens.shape[0]
    words = -(-length // 32)
    bits_PN = jax.random.bits(key, (pairs, 6 + 2 * words), jnp.uint32)
    last = jnp.max(row.segment_ids)
    slack = jnp.sum(row.segment_ids == 0)

    def draw(bits_N: Array, document: Array) -> Pairs:
        inside_M = row.segment_ids == document
        size, begin = jnp.sum(inside_M), jnp.argmax(inside_M)
        room = size + jnp.where(document == last, slack, 0)
        short = 2 + (bits_N[1] % jnp.maximum(room - 1, 1).astype(jnp.uint32)).astype(jnp.int32)
        aim = jnp.where(uniform(bits_N[0]) < short_rate, short, room)
        final = row.sentence_ids[begin + jnp.clip(jnp.minimum(aim, size) - 1, 0)]  # the last sentence that is read
        split = 1 + (bits_N[2] % jnp.maximum(final, 1).astype(jnp.uint32)).astype(jnp.int32)
        first_size = jnp.sum(inside_M & (row.sentence_ids < split))
        second, second_size = begin + first_size, jnp.sum(inside_M & (row.sentence_ids <= final)) - first_size
        is_single, present = final == 0, size > 0
        is_negative, is_known = uniform(bits_N[3]) < negative_rate, present & ~is_single
        if beside is not None:
            is_negative |= is_single
            other, other_size = _other_text(bits_N[4:6], beside, aim - first_size)
            same = beside.document_ids[other] == row.document_ids[begin]
            is_known = present & ~(is_negative & same)
            second = jnp.where(is_negative, length + other, second)
            second_size = jnp.where(is_negative, other_size, second_size)
        kept_first, kept_second = shortened(first_size, second_size, room)
        is_known &= kept_second > 0
        first = begin + heads_of(bits_N[6 : 6 + words], first_size - kept_first)
        second += heads_of(bits_N[6 + words :], second_size - kept_second)
        if beside is None:  # swap
            first, second = jnp.where(is_negative, second, first), jnp.where(is_negative, first, second)
            sizes = kept_first, kept_second
            kept_first, kept_second = (jnp.where(is_negative, b, a) for a, b in (sizes, sizes[::-1]))
        return Pairs(present, first, kept_first, second, kept_second, is_negative & present, is_known)

    return jax.vmap(draw)(bits_PN, jnp.arange(1, pairs + 1))


def _other_text(bits_2: Array, beside: Text, wanted: Array) -> tuple[Array, Array]:
    """Where sentences from a random one of a random document begin in a row, and the size of ``wanted`` tokens of them.

    The last sentence is whole; there is at least one, unless the row is empty.
    """
    documents = jnp.maximum(jnp.max(beside.segment_ids), 1).astype(jnp.uint32)
    inside_M = beside.segment_ids == 1 + (bits_2[0] % documents).astype(jnp.int32)
    size, begin = jnp.sum(inside_M), jnp.argmax(inside_M)
    sentences = 1 + jnp.max(jnp.where(inside_M, beside.sentence_ids, 0))
    chosen = (bits_2[1] % sentences.astype(jnp.uint32)).astype(jnp.int32)
    before = jnp.sum(inside_M & (beside.sentence_ids < chosen))
    end = jnp.clip(before + jnp.maximum(wanted, 1), 1, jnp.maximum(size, 1))
    final = beside.sentence_ids[begin + end - 1]
    return begin + before, jnp.sum(inside_M & (beside.sentence_ids <= final)) - before


def assemble(pairs: Pairs, tokens_M: Array, beside_M: Array, length: int, cls: int, sep: int, pad: int) -> Assembled:
    """Lay out the pairs of a row: [CLS] A [SEP] B [SEP], one after the other, then padding.

    Args:
      pairs: the decisions.
      tokens_M: [M] i32, the row.
      beside_M: [M] i32, the row beside it.
      length: L, of the row that is made; at least M + 3 P.
      cls, sep, pad: token ids.

    >>> import jax.numpy as jnp
    >>> one = Pairs(*(jnp.array([value]) for value in (True, 3, 1, 0, 3, True, True)))  # A is token 3, B tokens 0 to 2
    >>> row = assemble(one, jnp.array([5, 6, 7, 8]), jnp.array([0] * 4), length=9, cls=1, sep=2, pad=0)
    >>> row.tokens.tolist(), row.sides.tolist()
    ([1, 8, 2, 5, 6, 7, 2, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0, 0])
    """
    sizes_P = jnp.where(pairs.present, pairs.first_size + pairs.second_size + 3, 0)
    ends_P = jnp.cumsum(sizes_P)
    slots_L = jnp.arange(length, dtype=jnp.int32)
    present_L = slots_L < ends_P[-1]
    pair_L = jnp.minimum(jnp.sum(ends_P[None, :] <= slots_L[:, None], axis=1), sizes_P.shape[0] - 1)
    place_L = jnp.where(present_L, slots_L - (ends_P - sizes_P)[pair_L], 0)
    second_begins_L = pairs.first_size[pair_L] + 2  # the place of B's first token
    in_second_L = place_L >= second_begins_L
    source_L = jnp.where(
        in_second_L, pairs.second[pair_L] + place_L - second_begins_L, pairs.first[pair_L] + place_L - 1
    )
    source_L = jnp.clip(source_L, 0, 2 * tokens_M.shape[0] - 1)
    is_sep_L = (place_L == second_begins_L - 1) | (place_L == second_begins_L + pairs.second_size[pair_L])
    text_L = jnp.concatenate([tokens_M, beside_M])[source_L]
    tokens_L = jnp.where(place_L == 0, cls, jnp.where(is_sep_L, sep, text_L))
    return Assembled(
        source_L,
        jnp.where(present_L, tokens_L, pad),
        jnp.where(present_L, pair_L + 1, 0).astype(jnp.int32),
        place_L,
        (present_L & in_second_L).astype(jnp.int32),
        jnp.where(pairs.present, ends_P - sizes_P, 0).astype(jnp.int32),
    )
