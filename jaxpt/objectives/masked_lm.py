"""Masked language modelling: predict hidden tokens from both sides (BERT, Devlin et al. 2019, arXiv:1810.04805).

    loss = mean over the selected tokens t of -log p(x[t] | corrupted x)

A share ``rate`` of the tokens is selected anew each time a row is served; a selected token becomes [MASK]
(``mask``), a random token (``random``) or stays (the rest), and is predicted in every case. The vocabulary
projection runs on the selected positions only. The other recipes are settings; docs/objectives.md lists them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpt.corruption.boundaries import ends_of_spans
from jaxpt.corruption.choose import draw_count, draw_subset
from jaxpt.corruption.compact import compact
from jaxpt.corruption.replace import draw_replacement
from jaxpt.corruption.replace import replace as replace_tokens
from jaxpt.corruption.rows import describe, ordinary_ids, row_keys, starts_of, unit_ids
from jaxpt.corruption.selection import (
    FixedCount,
    Informative,
    InverseFrequency,
    Mixed,
    Selection,
    exact_room,
    fields_of,
)
from jaxpt.losses.cross_entropy import linear_cross_entropy, z_loss
from jaxpt.losses.token_metrics import token_metrics, token_sums, token_tables
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import boundary_head, lm_head, mlm_head
from jaxpt.models.patterns import bidirectional
from jaxpt.models.presets import bert
from jaxpt.models.transformer import embedding_table, transformer
from jaxpt.objectives.parts import at, check, check_length, initializer_of, linear, specs_of, without_dropout
from jaxpt.objectives.scores import token_scores
from jaxpt.types import (
    Array,
    Batch,
    Example,
    Key,
    Objective,
    Out,
    Packing,
    Readout,
    RowSpec,
    Snapshot,
    Sums,
    View,
    Vocab,
)


@dataclass(frozen=True)
class SpanBoundary:
    """SpanBERT's second prediction of each token of a span: from the states just outside the span and its place.

    A term "sbo" of its own (Joshi et al. 2020, arXiv:1907.10529). Spans at the edge of a text have no such states.
    """

    scale: float = 1.0
    """Weight of the term."""
    places: int = 20
    """Tokens of a span that are predicted, the first ones."""
    place_width: int = 200
    """Width of the embedding of the place in the span."""


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
    """Which tokens: ``Independent``, ``FixedCount``, ``WholeWord``, ``Spans``, ``InverseFrequency`` or
    ``Informative``."""
    prediction_rate: float | None = None
    """Share of the tokens that is in the loss, at most ``rate``: a random part of the selected ones; None = all of
    them. The share that is hidden is ``rate * (mask + random)``."""
    mask: float = 0.8
    """Share of the selected tokens that becomes [MASK]."""
    random: float = 0.1
    """Share of the selected tokens that becomes a random ordinary token; the rest stays as it is."""
    decide_per: Literal["token", "word", "span"] = "token"
    """What shares the choice between mask, random and stay: BERT a token, fairseq's whole words a word,
    SpanBERT a span (a run of selected tokens)."""
    boundary: SpanBoundary | None = None
    """SpanBERT's boundary objective beside the usual one."""
    z_loss: float = 0.0
    """Scale of the term (log Z)^2."""
    label_smoothing: float = 0.0
    """eps of the target (1 - eps) onehot + eps / V."""
    predict_from: Literal["same", "previous"] = "same"
    """The place that predicts a token: its own, or the one before it (GPT-BERT), as ``causal_lm`` predicts, with
    ``causal_lm``'s head, so that the two can share trunk and head."""
    evaluation_rate: float = 0.15
    """Share in evaluation, whatever the share in training, so that runs compare."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be and missing special tokens."""
        self._check()
        rows = RowSpec(
            packing=self.packing,
            prefix=(vocab.require("cls", "masked_lm"),),
            suffix=(vocab.require("sep", "masked_lm"),),
            fields=fields_of(self.selection),
        )
        vocab.require("mask", "masked_lm")
        encoder = transformer(self.encoder, vocab.size)
        head = (mlm_head if self.predict_from == "same" else lm_head)(self.encoder, vocab.size)
        networks, scale = {"trunk": encoder, "head": head}, {"mlm": 1.0}
        if self.z_loss:
            scale["z_loss"] = self.z_loss
        if self.boundary:
            sizes = {"places": self.boundary.places, "place_width": self.boundary.place_width}
            networks["boundary"] = boundary_head(self.encoder, vocab.size, **sizes)
            scale["sbo"] = self.boundary.scale
        tables = token_tables(vocab)

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            check_length(self.encoder, batch.tokens.shape[1], "masked_lm")
            scores_RL = None
            if isinstance(self.selection, Informative):
                scores_RL = score(self.selection, snapshot, batch, jax.random.fold_in(key, 1))
            inputs, weights = mask_rows(self, vocab, batch, key, snapshot.step, scores_RL)
            inputs |= {"segment_ids": batch.segment_ids, "positions": batch.positions}
            weights |= {"z_loss": weights["mlm"]} if self.z_loss else {}
            return Example(inputs, batch.row_ids, weights)

        def score(selection: Informative, snapshot: Snapshot, batch: Batch, key: Key) -> Array:
            params, segments, positions = snapshot.params, batch.segment_ids, batch.positions

            def predict(tokens_RL: Array, places_RK: Array) -> Readout:
                places_RK = jnp.maximum(places_RK - 1, 0) if self.predict_from == "previous" else places_RK
                hidden_RLD = encoder.apply(params["trunk"], tokens_RL, bidirectional(segments, positions), positions)
                return head.apply(params["head"], at(hidden_RLD, places_RK), embedding_table(params["trunk"]))

            return token_scores(selection, predict, vocab, batch, key)

        def read(inputs: dict[str, Array]) -> View:
            segments, positions = inputs["segment_ids"], inputs["positions"]
            return View(inputs["tokens"], segments, positions, bidirectional(segments, positions))

        def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
            inputs, params = example.inputs, snapshot.params
            text = read(inputs)
            hidden_RLD = encoder.apply(params["trunk"], text.tokens, text.pattern, text.positions, keys=keys)
            table = embedding_table(params["trunk"])
            readout = head.apply(params["head"], at(hidden_RLD, inputs["target_positions"]), table)
            result = linear_cross_entropy(readout, inputs["targets"], self.label_smoothing)
            losses = {"mlm": result.loss * inputs.get("importance", 1.0)}
            if self.z_loss:
                losses["z_loss"] = z_loss(result.log_normalizer)
            if self.boundary:
                ends = at(hidden_RLD, inputs["left"]), at(hidden_RLD, inputs["right"])
                readout = networks["boundary"].apply(params["boundary"], *ends, inputs["place"], table)
                losses["sbo"] = linear_cross_entropy(readout, inputs["targets"], self.label_smoothing).loss
            return Out(losses, token_sums(result, inputs["targets"], example.weights["mlm"], tables))

        def summary(sums: Sums) -> dict[str, Array]:
            return token_metrics(sums.stats, likelihood=False)

        def views(snapshot: Snapshot, example: Example) -> dict[str, View]:
            inputs = example.inputs
            asked = {name: inputs[name] for name in ("targets", "target_positions")}
            return {"text": read(inputs)._replace(**asked, weights=example.weights["mlm"])}

        init = initializer_of(networks)
        return Objective(rows, specs_of(networks), init, corrupt, loss, scale, summary=summary, views=views)

    def for_evaluation(self) -> MaskedLM:
        """The evaluation rate, all selected tokens in the loss, no dropout, no smoothing, no z-loss.

        The same selection and replacement; but what looks for hard tokens, or mixes rules, becomes ``FixedCount()``.
        """
        other = isinstance(self.selection, InverseFrequency | Informative | Mixed)
        return replace(
            self,
            encoder=without_dropout(self.encoder),
            selection=FixedCount() if other else self.selection,
            rate=self.evaluation_rate,
            final_rate=None,
            prediction_rate=None,
            z_loss=0.0,
            label_smoothing=0.0,
        )

    def _check(self) -> None:
        for name in ("rate", "final_rate", "prediction_rate", "mask", "random", "evaluation_rate"):
            value = getattr(self, name)
            check(value is None or 0 <= value <= 1, f"masked_lm: {name} is a share in [0, 1], not {value}")
        check(self.mask + self.random <= 1, f"masked_lm: mask + random = {self.mask + self.random} is more than 1")
        check(
            self.final_rate is None or self.rate_steps > 0,
            "masked_lm: final_rate needs rate_steps, the number of steps from rate to final_rate",
        )
        check(
            (self.prediction_rate or 0) <= min(self.rate, self.rate if self.final_rate is None else self.final_rate),
            f"masked_lm: prediction_rate {self.prediction_rate} is more than is selected: to predict tokens that are "
            f"not hidden, select them by rate and lower mask + random, the share of the selected ones that is hidden",
        )
        check(self.z_loss >= 0, f"masked_lm: z_loss is a scale and cannot be negative, not {self.z_loss}")
        check(0 <= self.label_smoothing < 1, f"masked_lm: label_smoothing is in [0, 1), not {self.label_smoothing}")


def mask_rows(
    config: MaskedLM, vocab: Vocab, batch: Batch, key: Key, step: Array, scores_RL: Array | None = None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Hide tokens of every row and say what is to be predicted where.

    Args:
      config: how; its ``encoder`` and ``packing`` are not looked at.
      vocab: of the tokens.
      batch: rows of any origin: tokens, segment_ids, sentence_ids, row_ids, and what ``fields_of(config.selection)``
        names in extras.
      key: of this step and this use.
      step: [] i32, for the schedule of the rate.
      scores_RL: [R, L] f32, for ``Informative``.

    Returns:
      inputs: {"tokens": [R, L] i32; "targets": [R, K] i32; "target_positions": [R, K] i32, the place that predicts
      each}, with "importance" [R, K] f32, and "left", "right", "place" [R, K] i32, where the configuration asks for
      them. weights: {"mlm": [R, K] f32}, with "sbo" likewise.
    """
    selection, length = config.selection, batch.tokens.shape[1]
    rate = linear(config.rate, config.final_rate, config.rate_steps)(step)
    room = max(1, selection.room(max(config.rate, config.final_rate or 0.0), length))
    asked = room if config.prediction_rate is None else min(room, max(1, exact_room(config.prediction_rate, length)))
    mask_id, ids_M = vocab.require("mask", "masked_lm"), ordinary_ids(vocab)

    def mask_row(
        row_key: Key, tokens_L: Array, segments_L: Array, sentences_L: Array, phrases_L: Any, scores_L: Any
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        selection_key, replacement_key, subset_key = jax.random.split(row_key, 3)
        row = describe(tokens_L, segments_L, sentences_L, vocab, phrases_L)._replace(scores=scores_L)
        selected_L = selection.draw(selection_key, rate, row, room)
        units_L = {
            "token": jnp.arange(length),
            "word": unit_ids(row.word_starts),
            "span": unit_ids(starts_of(selected_L)),
        }[config.decide_per]
        decisions = draw_replacement(replacement_key, units_L, config.mask, config.random, ids_M)

        asked_L = selected_L
        if config.prediction_rate is not None:
            bits = jax.random.bits(subset_key, (1 + length,), jnp.uint32)
            expected = jnp.float32(config.prediction_rate) * jnp.sum(row.candidates)
            asked_L = draw_subset(bits[1:], selected_L, draw_count(bits[0], expected, "unbiased"))
        places_K, used_K = compact(asked_L, asked)
        inputs = {
            "tokens": replace_tokens(tokens_L, selected_L, decisions, mask_id),
            "targets": tokens_L[places_K],
            "target_positions": places_K,
        }
        weights = {"mlm": used_K}
        if config.predict_from == "previous":
            before_K = jnp.maximum(places_K - 1, 0)
            inputs["target_positions"] = before_K
            weights["mlm"] &= (places_K > 0) & (segments_L[before_K] == segments_L[places_K])
        if isinstance(selection, Informative) and selection.unbiased:
            inputs["importance"] = selection.importance(selection_key, rate, row, room)[places_K]
        if config.boundary:
            ends = ends_of_spans(selected_L, row.candidates, segments_L)
            inputs |= {name: getattr(ends, name)[places_K] for name in ("left", "right")}
            inputs["place"] = jnp.minimum(ends.place[places_K], config.boundary.places - 1)
            weights["sbo"] = used_K & ends.known[places_K] & (ends.place[places_K] < config.boundary.places)
        return inputs, {term: weight.astype(jnp.float32) for term, weight in weights.items()}

    phrases_RL = batch.extras.get("phrase_starts")
    arrays = batch.tokens, batch.segment_ids, batch.sentence_ids, phrases_RL, scores_RL
    return jax.vmap(mask_row)(row_keys(key, batch.row_ids), *arrays)
