"""Edits of a text: tokens left out, replaced or put in (easy data augmentation, Wei & Zou 2019, arXiv:1901.11196).

A text is a row of its own without [CLS] and [SEP]; special tokens and padding are never touched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.corruption.choose import draw_kept, uniform
from jaxpt.corruption.compact import compact
from jaxpt.corruption.denoise import Insertions, Layout, draw_insertions, insert, lay_documents
from jaxpt.corruption.rows import Row, ordinary_ids, smoothed_shares
from jaxpt.types import Array, Key, Vocab


class Edits(NamedTuple):
    """The decisions about one text."""

    kept: Array  # [L] bool
    replacements: Array  # [L] i32: what a token becomes, -1 = it stays
    layout: Layout  # of the new row
    insertions: Insertions  # [J]


@dataclass(frozen=True)
class Damage:
    """How a text is damaged.

    Raises:
      ValueError: no shares, or none above 0.
    """

    operators: Literal["one", "all"] = "one"
    """What damages a text: "one" of the three, each equally likely, or "all", in the order in which they stand here."""
    deletion: float = 0.1
    """Share of the tokens that is left out, each by a coin of its own; one token always stays."""
    replacement: float = 0.1
    """Share of the tokens that becomes another token, each by a coin of its own."""
    insertion: float = 0.1
    """Tokens that are put in, as a share of those of the text, rounded down; what is then too long for a row is cut."""
    replacement_power: float = 0.75
    """What a token becomes is drawn in proportion to the frequency of tokens to this power."""
    insertion_source: Literal["uniform", "unigram", "text"] = "text"
    """What is put in: any token, a token by its frequency, or one of the text's own."""

    def __post_init__(self) -> None:
        """Refuse what is no share, and no damage."""
        for name in ("deletion", "replacement", "insertion"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"damage: {name} is a share in [0, 1], not {getattr(self, name)}")
        if not self.deletion + self.replacement + self.insertion:
            raise ValueError("damage: nothing is done to the texts: set deletion, replacement or insertion")

    def draw(self, key: Key, row: Row, vocab: Vocab) -> Edits:
        """Decide what becomes of a text: deletion, then replacement of what is left, then insertion.

        Args:
          key: a key.
          row: one text, from the first place on.
          vocab: of the tokens.
        """
        assert row.tokens is not None
        length, is_text_L = row.tokens.shape[0], row.candidates
        longest = length + math.ceil(self.insertion * length)
        key, insert_key = jax.random.split(key)
        bits = jax.random.bits(key, (1 + 4 * longest,), jnp.uint32)
        keep_bits_J, replace_bits_J, id_bits_J, inserted_bits_J = bits[1:].reshape(4, longest)

        shares = np.array([self.deletion, self.replacement, self.insertion])
        rates = jnp.asarray(shares, jnp.float32)
        if self.operators == "one":
            used = jnp.asarray(np.flatnonzero(shares))
            rates = jnp.where(jnp.arange(3) == used[bits[0] % used.shape[0]], rates, 0.0)

        kept_L = row.present & draw_kept(keep_bits_J[:length], jnp.arange(length), is_text_L, rates[0])
        is_replaced_L = is_text_L & (uniform(replace_bits_J[:length]) < rates[1])
        others_L = draw_words(id_bits_J[:length], word_steps(vocab, self.replacement_power), row.tokens)
        # 2.9999998 is 3 and a rounding error
        count = jnp.floor(rates[2] * (1 + 1e-6) * jnp.sum(kept_L & is_text_L)).astype(jnp.int32)
        inserts_S = jnp.zeros(length + 1, jnp.int32).at[1].set(count)
        layout, inserts_S = lay_documents(is_text_L, row.present.astype(jnp.int32), kept_L, inserts_S, longest)
        insertions = draw_insertions(insert_key, layout, inserts_S, 1.0, ordinary_ids(vocab), vocab.pad)
        if self.insertion_source == "unigram":
            insertions = insertions._replace(tokens=draw_words(inserted_bits_J, word_steps(vocab, 1.0)))
        elif self.insertion_source == "text":
            places_L, used_L = compact(is_text_L, length)
            sources_J = places_L[inserted_bits_J % jnp.maximum(jnp.sum(used_L), 1)]
            insertions = insertions._replace(tokens=row.tokens[sources_J])
        return Edits(kept_L, jnp.where(is_replaced_L, others_L, -1), layout, insertions)


def apply_edits(tokens_L: Array, edits: Edits, pad: int) -> tuple[Array, Array]:
    """Return the damaged text, [L] i32, and 1 where it is, [L] i32; what does not fit is cut.

    >>> layout = Layout(jnp.array([1, 1, 1, 1, 0, 0]), jnp.arange(6), jnp.zeros(2, int), jnp.array([0, 4]))
    >>> insertions = Insertions(jnp.array([False, True, False, False, False, False]), jnp.full(6, 9))
    >>> edits = Edits(jnp.array([True, False, True, True]), jnp.array([-1, -1, 7, -1]), layout, insertions)
    >>> [array.tolist() for array in apply_edits(jnp.array([3, 4, 5, 6]), edits, pad=0)]
    [[3, 9, 7, 6], [1, 1, 1, 1]]
    """
    tokens_L = jnp.where(edits.replacements < 0, tokens_L, edits.replacements)
    tokens_J = insert(tokens_L, edits.kept, edits.layout, edits.insertions, pad)
    length = tokens_L.shape[0]
    return tokens_J[:length], edits.layout.segment_ids[:length]


def word_steps(vocab: Vocab, power: float) -> np.ndarray:
    """Return whole numbers [V] in proportion to share^power, 1 or more, of a sum below 2^24; special tokens have 0."""
    assert np.sum(~vocab.is_special) > 1, "a vocabulary of one word"
    weights = np.where(vocab.is_special, 0.0, smoothed_shares(vocab) ** power)
    steps = np.maximum(np.floor(weights / weights.sum() * 2**22), 1)
    return np.where(vocab.is_special, 0, steps).astype(np.int32)


def draw_words(bits_N: Array, steps_V: np.ndarray, other_than_N: Array | None = None) -> Array:
    """Draw tokens, each in proportion to its steps.

    Args:
      bits_N: [N] u32, random.
      steps_V: [V] i32, of ``word_steps``.
      other_than_N: [N] i32, a token for each that it cannot be.

    Returns:
      [N] i32.

    >>> bits, steps = jnp.array([0, 2**31, 2**32 - 1], jnp.uint32), np.array([0, 2, 0, 1, 1])
    >>> draw_words(bits, steps, jnp.array([1, 3, 4])).tolist()
    [3, 1, 3]
    """
    ends_V = np.cumsum(steps_V).astype(np.int32)
    if other_than_N is None:
        left_out_N = start_N = jnp.zeros_like(bits_N, jnp.int32)
    else:
        left_out_N = jnp.asarray(steps_V, jnp.int32)[other_than_N]
        start_N = jnp.asarray(ends_V)[other_than_N] - left_out_N
    room_N = ends_V[-1] - left_out_N
    place_N = jnp.minimum((uniform(bits_N) * room_N).astype(jnp.int32), room_N - 1)  # a product may be rounded up
    place_N += jnp.where(place_N >= start_N, left_out_N, 0)
    return jnp.searchsorted(jnp.asarray(ends_V), place_N, side="right", method="scan_unrolled").astype(jnp.int32)
