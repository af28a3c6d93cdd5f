"""Gap sentences: write the sentences that matter most to a document and are missing from it (PEGASUS, Zhang et al.
2020, arXiv:1912.08777).

    loss = mean over t of -log p(y[t] | y[..t-1], x without y),   y = the chosen sentences, in their order, and [EOS]

A sentence matters as much as its words occur in the rest of the document: its ROUGE-1 F against all other sentences,
which the data build writes beside the tokens (`jaxpt data build --gap-scores`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp

from jaxpt.corruption.choose import ranks_within, uniform
from jaxpt.corruption.pieces import before_within, gather
from jaxpt.corruption.rows import row_keys, starts_of
from jaxpt.corruption.sentences import number_sentences
from jaxpt.models.encoder_decoder import EncoderDecoderConfig
from jaxpt.models.presets import pegasus
from jaxpt.objectives.parts import check
from jaxpt.objectives.sequence_to_sequence import sequence_to_sequence, sides, without_dropout
from jaxpt.types import Array, Batch, Example, Key, Objective, Packing, RowSpec, Snapshot, Vocab

SCORES = "gap_scores"


@dataclass(frozen=True)
class GapSentences:
    """Prediction of whole sentences that are missing from a document."""

    network: EncoderDecoderConfig = field(default_factory=lambda: pegasus("base"))
    """Encoder and decoder; the decoder's settings also hold for the output layer."""
    packing: Packing = "best_fit"
    """How documents share a row; each document, or piece of one, has its own gaps."""
    select: Literal["principal", "random", "lead"] = "principal"
    """Which sentences: those of the highest scores (of the data build), random ones, or the first ones."""
    ratio: float = 0.3
    """Share of the sentences of a document that are missing: at least one, never all."""
    lowest_ratio: float | None = None
    """With it, the share is uniform between this one and ``ratio``, anew for each document."""
    noise: float = 0.0
    """Each score is multiplied by 1 + noise * N(0, 1), so that other sentences are chosen each time."""
    intact: float = 0.1
    """Share of the chosen sentences that stay in the text; each other one becomes one [MASK]."""
    target: float = 0.5
    """Most tokens to predict, as a share of a document's; longer targets are cut, and lose their [EOS]."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be, and without [EOS] or [MASK]."""
        self._check()
        end, mask_id = vocab.require("eos", "gap_sentences"), vocab.require("mask", "gap_sentences")
        lowest = self.ratio if self.lowest_ratio is None else self.lowest_ratio
        principal = self.select == "principal"
        unknown = -1 if vocab.unk is None else vocab.unk  # special, but a word of its sentence

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            length = batch.tokens.shape[1]
            room = max(1, math.floor(self.target * length))

            def corrupt_row(row_key: Key, tokens_L: Array, segments_L: Array, sentences_L: Array, scores_L: Array):
                bits_key, noise_key = jax.random.split(row_key)
                shares = uniform(jax.random.bits(bits_key, (3, length), jnp.uint32))
                text_L = (segments_L > 0) & (~jnp.asarray(vocab.is_special)[tokens_L] | (tokens_L == unknown))
                numbers_L = number_sentences(segments_L, sentences_L)
                if self.select == "random":
                    scores_L = shares[0][numbers_L]
                elif principal:
                    scores_L *= 1 + self.noise * jax.random.normal(noise_key, (length,))[numbers_L]
                ratio_S = lowest + (self.ratio - lowest) * jnp.pad(shares[1], (0, 1))
                chosen_L = choose(scores_L, ratio_S, numbers_L, text_L, segments_L)
                is_intact_L = shares[2][numbers_L] < self.intact
                first_L = chosen_L & starts_of(jnp.where(chosen_L, numbers_L, -1))
                masked_L = chosen_L & ~is_intact_L
                places_L, heard_L, positions_L = gather((segments_L > 0) & (~masked_L | first_L), segments_L, length)
                tokens_J = jnp.where(masked_L & first_L, mask_id, tokens_L)[places_L]
                asked_L = asked(chosen_L, tokens_L == end, segments_L, self.target)
                places_K, said_K, positions_K = gather(asked_L, segments_L, room)
                heard = jnp.where(heard_L > 0, tokens_J, vocab.pad), heard_L, positions_L
                return heard, (jnp.where(said_K > 0, tokens_L[places_K], vocab.pad), said_K, positions_K)

            scores_RL = batch.extras[SCORES] if principal else -batch.sentence_ids
            arrays = batch.tokens, batch.segment_ids, batch.sentence_ids, scores_RL.astype(jnp.float32)
            heard, said = jax.vmap(corrupt_row)(row_keys(key, batch.row_ids), *arrays)
            targets_RK, segment_ids_RK, positions_RK = said
            inputs = sides(heard, targets_RK, segment_ids_RK, positions_RK, end)
            return Example(inputs, batch.row_ids, weights={"lm": (segment_ids_RK > 0).astype(jnp.float32)})

        rows = RowSpec(self.packing, suffix=(end,), fields=(SCORES,) if principal else ())
        return sequence_to_sequence(self.network, vocab, rows, corrupt, "gap_sentences")

    def for_evaluation(self) -> GapSentences:
        """No dropout, no noise, no intact sentence; the share of the sentences is ``ratio``."""
        return replace(self, network=without_dropout(self.network), lowest_ratio=None, noise=0.0, intact=0.0)

    def _check(self) -> None:
        for name in ("ratio", "intact", "target"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"gap_sentences: {name} is a share in [0, 1], not {value}")
        lowest = self.ratio if self.lowest_ratio is None else self.lowest_ratio
        check(0 <= lowest <= self.ratio, f"gap_sentences: lowest_ratio is in [0, ratio], not {lowest}")
        check(self.noise >= 0, f"gap_sentences: noise is a deviation and cannot be negative, not {self.noise}")


def choose(scores_L: Array, ratio_S: Array, numbers_L: Array, text_L: Array, segment_ids_L: Array) -> Array:
    """Choose the sentences of the highest scores of each document: floor(ratio * S), at least one and never all.

    Args:
      scores_L: [L] f32, the same for all tokens of a sentence; the first of equal ones is chosen first.
      ratio_S: [at least the number of documents + 1] f32, by segment id.
      numbers_L: [L] i32, the sentences of the row, 0, 1, ...
      text_L: [L] bool: ordinary tokens and [UNK]; a sentence without one is none.
      segment_ids_L: [L] i32, 0 = padding.

    Returns:
      [L] bool, of those tokens.

    >>> ones, scores = jnp.ones(6, int), jnp.array([0.1, 0.1, 0.5, 0.3, 0.3, 0.3])
    >>> choose(scores, jnp.full(7, 0.4), jnp.array([0, 0, 1, 2, 2, 2]), ones > 0, ones).astype(int).tolist()
    [0, 0, 1, 0, 0, 0]
    """
    length = numbers_L.shape[0]
    nothing_U = jnp.zeros(length, jnp.int32)
    segments_U = nothing_U.at[numbers_L].max(jnp.where(text_L, segment_ids_L, 0))
    scores_U = jnp.full(length, -jnp.inf, jnp.float32).at[numbers_L].max(jnp.where(text_L, scores_L, -jnp.inf))
    is_sentence_U = segments_U > 0
    ranks_U = ranks_within(-scores_U, is_sentence_U, segments_U)
    count_S = jnp.zeros(length + 1, jnp.int32).at[segments_U].add(is_sentence_U.astype(jnp.int32))
    wanted_U = jnp.floor(ratio_S[segments_U] * count_S[segments_U] + 1e-4).astype(jnp.int32)
    wanted_U = jnp.minimum(jnp.maximum(wanted_U, 1), count_S[segments_U] - 1)
    return text_L & (is_sentence_U & (ranks_U < wanted_U))[numbers_L]


def asked(chosen_L: Array, is_end_L: Array, segment_ids_L: Array, target: float) -> Array:
    """Mark what is to be predicted: the chosen sentences, and the end of a document that has one, up to a share.

    Args:
      chosen_L: [L] bool.
      is_end_L: [L] bool, the ends of documents.
      segment_ids_L: [L] i32, 0 = padding.
      target: the share of a document's tokens.

    Returns:
      [L] bool.

    >>> chosen = jnp.array([False, True, True, True, False, False])
    >>> ones, end = jnp.ones(6, int), jnp.arange(6) == 5
    >>> [asked(chosen, end, ones, share).astype(int).tolist() for share in (0.7, 0.5)]
    [[0, 1, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0]]
    """
    nothing_S = jnp.zeros(segment_ids_L.shape[0] + 1, jnp.int32)
    sizes_S = nothing_S.at[segment_ids_L].add(1)
    has_gap_S = nothing_S.at[segment_ids_L].max(chosen_L.astype(jnp.int32)) > 0
    wanted_L = (segment_ids_L > 0) & (chosen_L | (is_end_L & has_gap_S[segment_ids_L]))
    limit_S = jnp.floor(jnp.float32(target) * sizes_S + 1e-4).astype(jnp.int32)
    return wanted_L & (before_within(wanted_L.astype(jnp.int32), segment_ids_L) < limit_S[segment_ids_L])
