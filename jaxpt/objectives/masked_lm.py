"""Masked language modelling: predict hidden tokens from both sides (BERT, Devlin et al. 2019, arXiv:1810.04805).

    loss = mean over the selected tokens t of -log p(x[t] | corrupted x)

A share ``rate`` of the tokens is selected anew each time a row is served; a selected token becomes [MASK]
(``mask``), a random token (``random``) or stays (the rest), and is predicted in every case. The vocabulary
projection runs on the selected positions only. The other recipes are settings; docs/objectives.md lists them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp

from jaxpt.corruption.compact import compact
from jaxpt.corruption.replace import draw_replacement
from jaxpt.corruption.replace import replace as replace_tokens
from jaxpt.corruption.rows import describe, ordinary_ids, row_keys, starts_of, unit_ids
from jaxpt.corruption.selection import FixedCount, Selection
from jaxpt.losses.cross_entropy import linear_cross_entropy
from jaxpt.losses.token_metrics import token_metrics, token_sums, token_tables
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import mlm_head
from jaxpt.models.patterns import bidirectional
from jaxpt.models.presets import bert
from jaxpt.models.transformer import embedding_table, transformer
from jaxpt.objectives.parts import at, check, check_length, initializer_of, linear, specs_of, without_dropout
from jaxpt.types import Array, Batch, Example, Key, Objective, Out, Packing, RowSpec, Snapshot, Sums, Vocab


@dataclass(frozen=True)
class MaskedLM:
    """Prediction of hidden tokens."""

    encoder: TransformerConfig = field(default_factory=lambda: bert("base"))
    """The Transformer."""
    packing: Packing = "best_fit"
    """How documents share a row: "concatenate", "best_fit" or "one_document"."""
    rate: float = 0.15
    """Share of the tokens that is selected; at the start, where ``final_rate`` is set."""
    final_rate: float | None = None
    """Share after ``rate_steps`` steps, reached linearly; None keeps ``rate``."""
    rate_steps: int = 0
    """Steps from ``rate`` to ``final_rate``."""
    selection: Selection = field(default_factory=FixedCount)
    """Which tokens: ``Independent``, ``FixedCount``, ``WholeWord`` or ``Spans``."""
    mask: float = 0.8
    """Share of the selected tokens that becomes [MASK]."""
    random: float = 0.1
    """Share of the selected tokens that becomes a random ordinary token; the rest stays as it is."""
    decide_per: Literal["token", "word", "span"] = "token"
    """What shares the choice between mask, random and stay: BERT a token, fairseq's whole words a word,
    SpanBERT a span (a run of selected tokens)."""
    label_smoothing: float = 0.0
    """eps of the target (1 - eps) onehot + eps / V."""
    evaluation_rate: float = 0.15
    """Share in evaluation, whatever the share in training, so that runs compare."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be and missing special tokens."""
        self._check()
        mask_id = vocab.require("mask", "masked_lm")
        rows = RowSpec(
            packing=self.packing,
            prefix=(vocab.require("cls", "masked_lm"),),
            suffix=(vocab.require("sep", "masked_lm"),),
        )
        encoder, head = transformer(self.encoder, vocab.size), mlm_head(self.encoder, vocab.size)
        networks = {"trunk": encoder, "head": head}
        tables, ids_M = token_tables(vocab), ordinary_ids(vocab)
        rate_at = linear(self.rate, self.final_rate, self.rate_steps)
        highest_rate = max(self.rate, self.final_rate or 0.0)

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            check_length(self.encoder, batch.tokens.shape[1], "masked_lm")
            room = max(1, self.selection.room(highest_rate, batch.tokens.shape[1]))
            rate = rate_at(snapshot.step)

            def corrupt_row(row_key: Key, tokens_L: Array, segment_ids_L: Array, sentence_ids_L: Array):
                selection_key, replacement_key = jax.random.split(row_key)
                row = describe(tokens_L, segment_ids_L, sentence_ids_L, vocab)
                selected_L = self.selection.draw(selection_key, rate, row, room)
                units_L = {
                    "token": jnp.arange(tokens_L.shape[0]),
                    "word": unit_ids(row.word_starts),
                    "span": unit_ids(starts_of(selected_L)),
                }[self.decide_per]
                decisions = draw_replacement(replacement_key, units_L, self.mask, self.random, ids_M)
                positions_K, used_K = compact(selected_L, room)
                inputs_L = replace_tokens(tokens_L, selected_L, decisions, mask_id)
                return inputs_L, positions_K, tokens_L[positions_K], used_K.astype(jnp.float32)

            inputs_RL, positions_RK, targets_RK, weights_RK = jax.vmap(corrupt_row)(
                row_keys(key, batch.row_ids), batch.tokens, batch.segment_ids, batch.sentence_ids
            )
            inputs = {
                "tokens": inputs_RL,
                "segment_ids": batch.segment_ids,
                "positions": batch.positions,
                "target_positions": positions_RK,
                "targets": targets_RK,
            }
            return Example(inputs, batch.row_ids, weights={"mlm": weights_RK})

        def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
            inputs, params = example.inputs, snapshot.params
            pattern = bidirectional(inputs["segment_ids"], inputs["positions"])
            hidden_RLD = encoder.apply(params["trunk"], inputs["tokens"], pattern, inputs["positions"], keys=keys)
            hidden_RKD = at(hidden_RLD, inputs["target_positions"])
            readout = head.apply(params["head"], hidden_RKD, embedding_table(params["trunk"]))
            result = linear_cross_entropy(readout, inputs["targets"], self.label_smoothing)
            return Out({"mlm": result.loss}, token_sums(result, inputs["targets"], example.weights["mlm"], tables))

        def summary(sums: Sums) -> dict[str, Array]:
            return token_metrics(sums.stats, likelihood=False)

        return Objective(
            rows, specs_of(networks), initializer_of(networks), corrupt, loss, {"mlm": 1.0}, summary=summary
        )

    def for_evaluation(self) -> MaskedLM:
        """The evaluation rate, no dropout, no smoothing; the same selection and replacement."""
        return replace(
            self,
            encoder=without_dropout(self.encoder),
            rate=self.evaluation_rate,
            final_rate=None,
            label_smoothing=0.0,
        )

    def _check(self) -> None:
        for name in ("rate", "final_rate", "mask", "random", "evaluation_rate"):
            value = getattr(self, name)
            check(value is None or 0 <= value <= 1, f"masked_lm: {name} is a share in [0, 1], not {value}")
        check(self.mask + self.random <= 1, f"masked_lm: mask + random = {self.mask + self.random} is more than 1")
        check(
            self.final_rate is None or self.rate_steps > 0,
            "masked_lm: final_rate needs rate_steps, the number of steps from rate to final_rate",
        )
        check(0 <= self.label_smoothing < 1, f"masked_lm: label_smoothing is in [0, 1), not {self.label_smoothing}")
