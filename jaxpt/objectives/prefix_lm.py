"""Prefix language modelling: read the beginning from both sides, write the rest (Raffel et al. 2020, arXiv:1910.10683).

    loss = mean over the suffix, t >= p, of -log p(x[t] | x[..t-1])        p ~ uniform on {1 .. n-1} per document

One decoder; the p tokens of the prefix see each other, a token of the suffix sees the prefix and what stands before
it. So the last token of the prefix predicts the first of the suffix, and no token sees its own label. A next-token
loss on the prefix would be copying; UniLM's loss on both parts (Dong et al. 2019, arXiv:1905.03197) hides some of the
prefix's tokens and asks for them where they stand: ``prefix_mask``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from jaxpt.corruption.pieces import Pieces, describe_pieces
from jaxpt.corruption.rows import describe, row_keys
from jaxpt.corruption.selection import FixedCount
from jaxpt.losses.token_metrics import token_metrics
from jaxpt.models.config import TransformerConfig
from jaxpt.models.patterns import prefix
from jaxpt.models.presets import gpt2
from jaxpt.objectives.causal_lm import next_tokens
from jaxpt.objectives.infilling import language_model
from jaxpt.objectives.parts import check, check_length, without_dropout
from jaxpt.types import Array, Batch, Example, Key, Objective, Packing, RowSpec, Snapshot, Vocab


@dataclass(frozen=True)
class PrefixLM:
    """Prediction of the rest of a document from a beginning that is read from both sides."""

    decoder: TransformerConfig = field(default_factory=lambda: gpt2("small"))
    """The Transformer; ``tie_embeddings`` says whether the output layer is the embedding table."""
    packing: Packing = "concatenate"
    """How documents share a row; each document, or piece of one where a row cuts it, has its own prefix."""
    suffix: float = 0.5
    """Expected share of the suffix, at most 0.5: the prefix is uniform on the n - 1 lengths that leave a suffix, or,
    below 0.5, on the longest of them (T5's rule)."""
    prefix_mask: float = 0.0
    """Share of the prefix's tokens that become [MASK] and are predicted in place; 0 takes the loss on the suffix
    only, UniLM hides 0.15."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for shares that cannot be and missing special tokens."""
        check(0 < self.suffix <= 0.5, f"prefix_lm: suffix is a share in (0, 0.5], not {self.suffix}")
        check(0 <= self.prefix_mask < 1, f"prefix_lm: prefix_mask is a share in [0, 1), not {self.prefix_mask}")
        end = vocab.require("eos", "prefix_lm")
        mask_id = vocab.require("mask", "prefix_lm with prefix_mask") if self.prefix_mask else vocab.pad

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            check_length(self.decoder, batch.tokens.shape[1], "prefix_lm")

            def draw_row(
                row_key: Key, tokens_L: Array, segment_ids_L: Array, positions_L: Array, sentence_ids_L: Array
            ):
                length_key, mask_key = jax.random.split(row_key)
                lengths_S = draw_prefix(length_key, describe_pieces(tokens_L, segment_ids_L, end), self.suffix)
                left_L = lengths_S[segment_ids_L] - positions_L  # tokens of the prefix from here on
                if not self.prefix_mask:
                    return left_L > 0, jnp.zeros_like(left_L, bool)
                row = describe(tokens_L, segment_ids_L, sentence_ids_L, vocab)
                row = row._replace(candidates=row.candidates & (left_L > 1))  # the last one predicts the suffix
                return left_L > 0, FixedCount().draw(mask_key, self.prefix_mask, row, tokens_L.shape[0])

            arrays = (batch.tokens, batch.segment_ids, batch.positions, batch.sentence_ids)
            prefix_RL, hidden_RL = jax.vmap(draw_row)(row_keys(key, batch.row_ids), *arrays)
            targets_RL, inside_RL = next_tokens(batch.tokens, batch.segment_ids)
            weights_RL = inside_RL * ~jnp.roll(prefix_RL, -1, axis=1)
            inputs = {
                "tokens": jnp.where(hidden_RL, mask_id, batch.tokens),
                "segment_ids": batch.segment_ids,
                "positions": batch.positions,
                "pattern": prefix(batch.segment_ids, batch.positions, prefix_RL),
                "targets": jnp.where(hidden_RL, batch.tokens, targets_RL),
            }
            return Example(inputs, batch.row_ids, weights={"lm": weights_RL + hidden_RL})

        def metrics(sums: dict[str, Array]) -> dict[str, Array]:
            return token_metrics(sums, likelihood=not self.prefix_mask)

        rows = RowSpec(self.packing, suffix=(end,))
        return language_model(self.decoder, vocab, rows, corrupt, metrics=metrics)

    def for_evaluation(self) -> PrefixLM:
        """No dropout and nothing hidden in the prefix: the loss is of the suffix."""
        return replace(self, decoder=without_dropout(self.decoder), prefix_mask=0.0)


def draw_prefix(key: Key, pieces: Pieces, suffix: float) -> Array:
    """Draw the length of each piece's prefix, uniform on {max(1, round((1 - 2 suffix)(n - 1))) .. n - 1}.

    Args:
      key: a key.
      pieces: of one row; n is the size of the text, its end not counted.
      suffix: expected share of the suffix, at most 0.5.

    Returns:
      [S] i32, 0 where there is no text or one token only.
    """
    most_S = jnp.maximum(pieces.sizes - 1, 0)
    least_S = jnp.minimum(jnp.maximum(jnp.round((1 - 2 * suffix) * most_S).astype(jnp.int32), 1), most_S)
    bits_S = jax.random.bits(key, most_S.shape, jnp.uint32)
    return least_S + (bits_S % (most_S - least_S + 1).astype(jnp.uint32)).astype(jnp.int32)
