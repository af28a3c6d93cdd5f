"""Denoising with an encoder and a decoder: write a text again from a damaged copy (BART, Lewis et al. 2020,
arXiv:1910.13461).

    loss = mean over all tokens t of -log p(x[t] | x[..t-1], damaged x)

The damage, document by document and anew each time a row is served: the sentences change their order; spans of a
Poisson number of words are hidden behind one [MASK] each; tokens are inserted; the text is turned round.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp

from jaxpt.corruption.choose import draw_count
from jaxpt.corruption.denoise import (
    EACH,
    ReplaceLength,
    draw_infilling,
    draw_insertions,
    draw_turns,
    infill,
    insert,
    lay_documents,
    poisson_law,
    turn,
)
from jaxpt.corruption.rows import describe, ordinary_ids, row_keys, starts_of
from jaxpt.corruption.sentences import draw_places, number_sentences, reorder
from jaxpt.models.encoder_decoder import EncoderDecoderConfig
from jaxpt.models.presets import bart
from jaxpt.objectives.parts import check
from jaxpt.objectives.sequence_to_sequence import sequence_to_sequence, sides, without_dropout
from jaxpt.types import Array, Batch, Example, Key, Objective, Packing, RowSpec, Snapshot, Vocab


@dataclass(frozen=True)
class Denoising:
    """Reconstruction of a text from a copy with hidden spans, in another order; the defaults are BART's."""

    network: EncoderDecoderConfig = field(default_factory=lambda: bart("base"))
    """Encoder and decoder; the decoder's settings also hold for the output layer."""
    packing: Packing = "best_fit"
    """How documents share a row; each document, or piece of one, is damaged for itself."""
    bos: bool = True
    """Put [BOS] before each document. It is read and predicted, as in BART."""
    permute: float = 1.0
    """Share of the sentences of a document that change places among themselves."""
    rate: float = 0.3
    """Share of the units that are hidden; overlaps of spans come off it."""
    poisson: float = 3.5
    """Mean number of units of a span, from a Poisson law; 0 = each hidden unit is a span of its own."""
    unit: Literal["word", "token"] = "word"
    """What the spans are made of."""
    replace_length: ReplaceLength = 1
    """What a hidden span becomes: one [MASK] (1), nothing (0), or a [MASK] for each of its tokens (-1)."""
    random: float = 0.1
    """Share of the masks that are a random token instead."""
    insert: float = 0.0
    """[MASK]s inserted between tokens, as a share of the tokens that are left."""
    rotate: float = 0.0
    """Share of the documents that are turned round, to begin at a random token."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be, and without [EOS], [MASK] or [BOS]."""
        self._check()
        end, mask_id = vocab.require("eos", "denoising"), vocab.require("mask", "denoising")
        prefix = (vocab.require("bos", "denoising with bos=True"),) if self.bos else ()
        law = poisson_law(self.poisson) if self.poisson else None
        ids_M = ordinary_ids(vocab)

        def damage(length: int, row_key: Key, tokens_L: Array, segment_ids_L: Array, sentence_ids_L: Array):
            order_key, span_key, insert_key, turn_key = jax.random.split(row_key, 4)
            row = describe(tokens_L, segment_ids_L, sentence_ids_L, vocab)
            candidates_L, starts_L = row.candidates, row.starts(self.unit) & row.candidates
            if self.permute:
                order_L = draw_order(order_key, candidates_L, segment_ids_L, sentence_ids_L, self.permute)
                tokens_L, candidates_L, starts_L = tokens_L[order_L], candidates_L[order_L], starts_L[order_L]
            spans = draw_infilling(span_key, starts_L, segment_ids_L, self.rate, law, self.random, ids_M)
            tokens_L, kept_L = infill(
                tokens_L, starts_L, candidates_L, segment_ids_L, spans, self.replace_length, mask_id
            )
            kept_S = jnp.zeros_like(spans.inserts).at[segment_ids_L].add(kept_L.astype(jnp.int32))
            inserts_S = spans.inserts + draw_count(jnp.uint32(0), jnp.float32(self.insert) * kept_S, "ceil")
            layout, inserts_S = lay_documents(candidates_L, segment_ids_L, kept_L, inserts_S, length)
            insertions = draw_insertions(insert_key, layout, inserts_S, self.random, ids_M, mask_id)
            tokens_J = insert(tokens_L, kept_L, layout, insertions, vocab.pad)
            if self.rotate:
                tokens_J = turn(tokens_J, layout, draw_turns(turn_key, layout, self.rotate))
            return tokens_J, layout.segment_ids, layout.positions

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            raw = batch.tokens.shape[1]
            length = next(n for n in itertools.count(raw) if n - self.slack(n) >= raw)
            arrays = batch.tokens, batch.segment_ids, batch.sentence_ids
            damaged = jax.vmap(functools.partial(damage, length))(row_keys(key, batch.row_ids), *arrays)
            targets_RL, segment_ids_RL, positions_RL = (
                jnp.pad(array, ((0, 0), (0, length - raw)), constant_values=fill)
                for array, fill in ((batch.tokens, vocab.pad), (batch.segment_ids, 0), (batch.positions, 0))
            )
            inputs = sides(damaged, targets_RL, segment_ids_RL, positions_RL, end)
            return Example(inputs, batch.row_ids, weights={"lm": (segment_ids_RL > 0).astype(jnp.float32)})

        rows = RowSpec(self.packing, prefix, (end,), raw_length=lambda length: length - self.slack(length))
        return sequence_to_sequence(self.network, vocab, rows, corrupt, "denoising")

    def for_evaluation(self) -> Denoising:
        """No dropout; the same damage."""
        return replace(self, network=without_dropout(self.network))

    def slack(self, length: int) -> int:
        """Slots of a row of ``length`` tokens that are kept for growth: its mean and four deviations, if above 0.

        Where every token is a unit, rate / poisson spans per token are drawn, a share e^-poisson of them insertions.
        The others leave a mask and hide what is behind it, e^(their share - rate) of the tokens being in none of them.
        (Spans of whole words hide more, and deleted spans leave less.)
        """
        growth = variance = self.insert
        if self.poisson:
            spans = self.rate / self.poisson
            inserted = spans * math.exp(-self.poisson)
            is_each = self.replace_length == EACH
            growth += inserted - (0 if is_each else 1 - math.exp(spans - inserted - self.rate))
            variance += inserted if is_each else spans / self.poisson
        return max(0, math.ceil(growth * length + 4 * math.sqrt(variance * length)))

    def _check(self) -> None:
        for name in ("permute", "rate", "random", "rotate"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"denoising: {name} is a share in [0, 1], not {value}")
        check(0 <= self.insert <= 0.5, f"denoising: insert is a share in [0, 0.5], not {self.insert}")
        check(
            self.poisson == 0 or 1 <= self.poisson <= 100, f"denoising: poisson is 0 or in [1, 100], not {self.poisson}"
        )


def draw_order(key: Key, candidates_L: Array, segment_ids_L: Array, sentence_ids_L: Array, share: float) -> Array:
    """Draw where each token comes from when sentences change places; a special first or last token stays.

    Args:
      key: a key.
      candidates_L: [L] bool, neither special nor padding.
      segment_ids_L, sentence_ids_L: [L] i32.
      share: of the sentences that are permuted.

    Returns:
      [L] i32.
    """
    first_L = starts_of(segment_ids_L)
    last_L = jnp.roll(first_L, -1).at[-1].set(True)
    places_L = draw_places(key, number_sentences(segment_ids_L, sentence_ids_L), segment_ids_L, share)
    places_L = jnp.where(~candidates_L & last_L, segment_ids_L.shape[0], places_L)
    return reorder(segment_ids_L, jnp.where(~candidates_L & first_L, -1, places_L))
