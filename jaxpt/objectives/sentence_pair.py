"""Sentence pairs: are these two texts a text (Devlin et al. 2019, arXiv:1810.04805; Lan et al. 2020, arXiv:1909.11942)?

    loss = mean over pairs of -log p(label | [CLS] A [SEP] B [SEP])    (+ the masked-LM loss on the same rows)

"next" (BERT's NSP): B follows A, or comes from another document. "order" (ALBERT's SOP): B follows A, or A follows B.
A document is cut at a random end of a sentence, anew each time it is served; with ``masked``, tokens are hidden in the
assembled pair, so that one forward pass serves both losses.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxpt.corruption.pairs import Assembled, Pairs, Text, assemble, draw_pairs
from jaxpt.corruption.rows import row_keys
from jaxpt.corruption.selection import Informative, fields_of
from jaxpt.losses.cross_entropy import linear_cross_entropy
from jaxpt.losses.token_metrics import ratio, token_metrics, token_sums, token_tables
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import classifier, mlm_head, pooler
from jaxpt.models.patterns import bidirectional
from jaxpt.models.presets import bert
from jaxpt.models.transformer import embedding_table, transformer
from jaxpt.objectives.masked_lm import MaskedLM, mask_rows
from jaxpt.objectives.parts import at, check, check_length, initializer_of, specs_of, without_dropout
from jaxpt.types import Array, Batch, Example, Key, Objective, Out, Packing, RowSpec, Snapshot, Sums, View, Vocab

CLASSES = {"next": ("next", "random"), "order": ("in order", "swapped")}


@dataclass(frozen=True)
class SentencePair:
    """Whether two texts belong together, perhaps beside the prediction of hidden tokens."""

    encoder: TransformerConfig = field(default_factory=lambda: bert("base"))
    """The Transformer; ``token_types=2`` tells it which text is which."""
    kind: Literal["next", "order"] = "order"
    """What is wrong with a wrong pair: "next" a foreign second text (NSP), "order" the order (SOP)."""
    masked: MaskedLM | None = None
    """Masked-LM loss on the same pairs, as BERT and ALBERT have it; its ``encoder`` and ``packing`` are not used."""
    packing: Packing = "best_fit"
    """How documents share a row: "one_document" is BERT's, one pair per row; the others make a pair of each."""
    pairs: int = 2
    """The most pairs of a row where documents share rows; further documents of a row are left out."""
    negative_rate: float = 0.5
    """Share of wrong pairs among those that can be either."""
    short_rate: float = 0.1
    """Share of pairs that aim at fewer tokens, uniform from 2 to what there is."""
    scale: float = 1.0
    """Weight of the pair loss."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be and missing special tokens."""
        self._check()
        cls, sep = (vocab.require(name, "sentence_pair") for name in ("cls", "sep"))
        count = 1 if self.packing == "one_document" else self.pairs
        fields = fields_of(self.masked.selection) if self.masked else ()
        rows = RowSpec(
            packing=self.packing,
            reserve=3 * count,
            fields=(*fields, "document_ids") if self.kind == "next" else fields,
        )
        encoder, head = transformer(self.encoder, vocab.size), mlm_head(self.encoder, vocab.size)
        networks = {"trunk": encoder, "pooler": pooler(self.encoder), "pair": classifier(self.encoder, 2)}
        scale = {self.kind: self.scale}
        if self.masked:
            vocab.require("mask", "sentence_pair")
            networks["head"] = head
            scale["mlm"] = 1.0
        tables = token_tables(vocab)

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            raw = batch.tokens.shape[1]
            length = raw + 3 * count
            check_length(self.encoder, length, "sentence_pair")
            pair_key, mask_key = jax.random.split(key)
            beside_R = next_rows(batch.row_ids)
            documents = batch.extras.get("document_ids", document_numbers(batch))
            texts = Text(batch.tokens, batch.segment_ids, batch.sentence_ids, documents)
            besides = jax.tree.map(lambda leaf: leaf[beside_R], texts) if self.kind == "next" else None

            def corrupt_row(row_key: Key, text: Text, beside: Text | None) -> tuple[Pairs, Assembled]:
                pairs = draw_pairs(row_key, text, beside, count, self.negative_rate, self.short_rate)
                other_M = text.tokens if beside is None else beside.tokens
                return pairs, assemble(pairs, text.tokens, other_M, length, cls, sep, vocab.pad)

            pairs, row = jax.vmap(corrupt_row)(row_keys(pair_key, batch.row_ids), texts, besides)
            inputs = {
                "tokens": row.tokens,
                "segment_ids": row.segment_ids,
                "positions": row.positions,
                "token_types": row.sides,
                "cls": row.cls,
                "is_negative": pairs.is_negative.astype(jnp.int32),
            }
            weights = {self.kind: pairs.is_known.astype(jnp.float32)}
            if self.masked:
                extras = {}
                if "phrase_starts" in fields:
                    starts_RM = batch.extras["phrase_starts"].astype(bool)
                    both = jnp.concatenate([starts_RM, starts_RM[beside_R]], axis=1)
                    extras["phrase_starts"] = jnp.take_along_axis(both, row.source, axis=1)
                assembled = batch._replace(
                    tokens=row.tokens, segment_ids=row.segment_ids, positions=row.positions,
                    sentence_ids=row.sides, extras=extras,
                )  # fmt: skip
                hidden, mask_weights = mask_rows(self.masked, vocab, assembled, mask_key, snapshot.step)
                inputs |= hidden
                weights |= mask_weights
            return Example(inputs, batch.row_ids, weights)

        def read(inputs: dict[str, Array]) -> View:
            segments, positions = inputs["segment_ids"], inputs["positions"]
            return View(inputs["tokens"], segments, positions, bidirectional(segments, positions))

        def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
            inputs, params, text = example.inputs, snapshot.params, read(example.inputs)
            types = inputs["token_types"] if self.encoder.token_types > 1 else None
            hidden_RLD = encoder.apply(
                params["trunk"], text.tokens, text.pattern, text.positions, token_types=types, keys=keys
            )
            pooled_RPD = networks["pooler"].apply(params["pooler"], at(hidden_RLD, inputs["cls"]))
            logits_RP2 = networks["pair"].apply(params["pair"], pooled_RPD)
            losses = {self.kind: optax.softmax_cross_entropy_with_integer_labels(logits_RP2, inputs["is_negative"])}
            weights_RP = example.weights[self.kind]
            correct_RP = jnp.argmax(logits_RP2, -1) == inputs["is_negative"]
            stats = {
                "pairs": jnp.sum(weights_RP),
                "pairs_correct": jnp.sum(correct_RP * weights_RP),
                "pairs_negative": jnp.sum(inputs["is_negative"] * weights_RP),
            }
            if self.masked:
                hidden_RKD = at(hidden_RLD, inputs["target_positions"])
                readout = head.apply(params["head"], hidden_RKD, embedding_table(params["trunk"]))
                result = linear_cross_entropy(readout, inputs["targets"], self.masked.label_smoothing)
                losses["mlm"] = result.loss
                stats |= token_sums(result, inputs["targets"], example.weights["mlm"], tables)
            return Out(losses, stats)

        def summary(sums: Sums) -> dict[str, Array]:
            stats = sums.stats
            metrics = {
                f"{self.kind}_accuracy": ratio(stats["pairs_correct"], stats["pairs"]),
                f"{self.kind}_negative": ratio(stats["pairs_negative"], stats["pairs"]),
            }
            return metrics | (token_metrics(stats, likelihood=False) if self.masked else {})

        def views(snapshot: Snapshot, example: Example) -> dict[str, View]:
            inputs, weights, text = example.inputs, example.weights, read(example.inputs)
            found = {
                "pair": text._replace(
                    targets=inputs["is_negative"],
                    target_positions=inputs["cls"],
                    weights=weights[self.kind],
                    classes=CLASSES[self.kind],
                )
            }
            if self.masked:
                asked = {name: inputs[name] for name in ("targets", "target_positions")}
                found["text"] = text._replace(**asked, weights=weights["mlm"])
            return found

        init = initializer_of(networks)
        return Objective(rows, specs_of(networks), init, corrupt, loss, scale, summary=summary, views=views)

    def for_evaluation(self) -> SentencePair:
        """No dropout, no shorter pairs; the masking as ``masked_lm`` is evaluated."""
        masked = self.masked.for_evaluation() if self.masked else None
        return replace(self, encoder=without_dropout(self.encoder), masked=masked, short_rate=0.0)

    def _check(self) -> None:
        for name in ("negative_rate", "short_rate"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"sentence_pair: {name} is a share in [0, 1], not {value}")
        check(self.pairs >= 1, f"sentence_pair: a row has at least 1 pair, not {self.pairs}")
        check(self.scale >= 0, f"sentence_pair: scale is a weight and cannot be negative, not {self.scale}")
        if self.masked:
            plain = self.masked.boundary is None and not self.masked.z_loss and self.masked.predict_from == "same"
            check(
                plain and not isinstance(self.masked.selection, Informative),
                "sentence_pair: masked does without boundary, z_loss, predict_from and the Informative selection; "
                "train them in masked_lm, and pairs beside it with multitask",
            )


def next_rows(row_ids_R: Array) -> Array:
    """Return the place of the row with the next id, of the first one for the last, for every row: [R] i32.

    >>> import jax.numpy as jnp
    >>> next_rows(jnp.array([7, 5, 6])).tolist()
    [1, 2, 0]
    """
    order_R = jnp.argsort(row_ids_R)
    return jnp.zeros_like(order_R).at[order_R].set(jnp.roll(order_R, -1))


def document_numbers(batch: Batch) -> Array:
    """Number the documents of a batch through, [B, L] i32, where the data do not say which rows share one."""
    rows, length = batch.tokens.shape
    return jnp.arange(rows)[:, None] * (length + 1) + batch.segment_ids
