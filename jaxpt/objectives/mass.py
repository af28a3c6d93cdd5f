"""Masked sequence to sequence: write the fragment that the encoder does not see (MASS, Song et al. 2019,
arXiv:1905.02450).

    loss = mean over the tokens t of the fragment of -log p(x[t] | x[u..t-1], x without its fragment u..v)

The decoder reads the fragment shifted right, from the token before it on, at the positions that these tokens have in
the whole text; the rest of the text is no part of its row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from jaxpt.corruption.choose import uniform
from jaxpt.corruption.compact import compact
from jaxpt.corruption.replace import draw_replacement
from jaxpt.corruption.replace import replace as replace_tokens
from jaxpt.corruption.rows import ordinary_ids, row_keys
from jaxpt.models.encoder_decoder import EncoderDecoderConfig
from jaxpt.models.presets import bart
from jaxpt.objectives.parts import check, check_length
from jaxpt.objectives.sequence_to_sequence import sequence_to_sequence, sides, without_dropout
from jaxpt.types import Array, Batch, Example, Key, Objective, Packing, RowSpec, Snapshot, Vocab


@dataclass(frozen=True)
class MASS:
    """Prediction of a hidden fragment of each document, or of each block of one, by the decoder."""

    network: EncoderDecoderConfig = field(default_factory=lambda: bart("base"))
    """Encoder and decoder; the decoder's settings also hold for the output layer."""
    packing: Packing = "best_fit"
    """How documents share a row; each document, or piece of one, has its own fragment."""
    rate: float = 0.5
    """Share of a document, without its first token, that is the fragment."""
    at_start: float = 0.2
    """Share of the fragments that begin a document, behind its first token; the others stand anywhere."""
    at_end: float = 0.2
    """Share of the fragments that end a document."""
    block: int | None = None
    """Tokens, each such block of a document having a fragment of its own; None = one fragment per document."""
    mask: float = 0.8
    """Share of the fragment that becomes [MASK] in the encoder."""
    random: float = 0.1
    """Share of it that becomes a random token; the rest stays."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be, and without [BOS], [EOS] or [MASK]."""
        self._check()
        begin, end, mask_id = (vocab.require(name, "mass") for name in ("bos", "eos", "mask"))
        ids_M = ordinary_ids(vocab)

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            length = batch.tokens.shape[1]
            check_length(self.network.decoder, length, "mass, its decoder, which has the positions of the whole text")
            room = max(1, math.floor(self.rate * length))  # no more than all fragments together can have

            def corrupt_row(row_key: Key, tokens_L: Array, segment_ids_L: Array, positions_L: Array):
                place_key, replacement_key = jax.random.split(row_key)
                hidden_L = draw_fragments(
                    place_key, segment_ids_L, positions_L, self.rate, self.at_start, self.at_end, self.block
                )
                decisions = draw_replacement(replacement_key, jnp.arange(length), self.mask, self.random, ids_M)
                heard_L = replace_tokens(tokens_L, hidden_L, decisions, mask_id)
                places_K, used_K = compact(hidden_L, room)
                before_K = jnp.maximum(places_K - 1, 0)
                said = tokens_L[places_K], segment_ids_L[places_K], positions_L[before_K], tokens_L[before_K]
                return heard_L, *(
                    jnp.where(used_K, array_K, fill) for array_K, fill in zip(said, (vocab.pad, 0, 0, end), strict=True)
                )

            arrays = batch.tokens, batch.segment_ids, batch.positions
            heard_RL, *said, read_RK = jax.vmap(corrupt_row)(row_keys(key, batch.row_ids), *arrays)
            targets_RK, segment_ids_RK, positions_RK = said
            heard = heard_RL, batch.segment_ids, batch.positions
            inputs = sides(heard, targets_RK, segment_ids_RK, positions_RK, end)
            inputs |= {"decoder_tokens": read_RK}
            return Example(inputs, batch.row_ids, weights={"lm": (segment_ids_RK > 0).astype(jnp.float32)})

        return sequence_to_sequence(self.network, vocab, RowSpec(self.packing, (begin,), (end,)), corrupt, "mass")

    def for_evaluation(self) -> MASS:
        """No dropout; the same fragments."""
        return replace(self, network=without_dropout(self.network))

    def _check(self) -> None:
        for name in ("rate", "at_start", "at_end", "mask", "random"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"mass: {name} is a share in [0, 1], not {value}")
        for one, other in (("at_start", "at_end"), ("mask", "random")):
            total = getattr(self, one) + getattr(self, other)
            check(total <= 1, f"mass: {one} + {other} = {total} is more than 1")
        check(self.block is None or self.block >= 1, f"mass: block is a number of tokens, not {self.block}")


def draw_fragments(
    key: Key, segment_ids_L: Array, positions_L: Array, rate: float, at_start: float, at_end: float, block: int | None
) -> Array:
    """Choose a fragment of ``floor(rate * n)`` of the n tokens behind the first of each document, or of each block.

    Args:
      key: a key.
      segment_ids_L: [L] i32, 0 = padding.
      positions_L: [L] i32, restart in each document.
      rate: share of the tokens.
      at_start: probability that the fragment is the first tokens of the n.
      at_end: probability that it is the last ones; otherwise it stands anywhere, every place equally likely.
      block: tokens of a block; None = the whole document.

    Returns:
      [L] bool.
    """
    length = segment_ids_L.shape[0]
    index_L = jnp.arange(length, dtype=jnp.int32)
    place_L = (positions_L - 1) % block if block else positions_L - 1
    inside_L = (segment_ids_L > 0) & (positions_L > 0)
    begin_L = jnp.where(inside_L, index_L - place_L, index_L)  # the first token of this one's block
    size_L = jnp.zeros(length, jnp.int32).at[begin_L].add(inside_L.astype(jnp.int32))[begin_L]
    coins_L, bits_L = (bits[begin_L] for bits in jax.random.bits(key, (2, length), jnp.uint32))
    count_L = jnp.floor(jnp.float32(rate) * size_L + 1e-4).astype(jnp.int32)  # 0.3 of 10 is 3 and not 2
    last_L = size_L - count_L
    anywhere_L = (bits_L % jnp.maximum(last_L + 1, 1).astype(jnp.uint32)).astype(jnp.int32)
    coin_L = uniform(coins_L)
    start_L = jnp.where(coin_L < at_start, 0, jnp.where(coin_L < at_start + at_end, last_L, anywhere_L))
    return inside_L & (place_L >= start_L) & (place_L < start_L + count_L)
