"""Vectors of texts from spans of documents (DeCLUTR, Giorgi et al. 2021, arXiv:2006.03659).

    loss = mean over spans a of -log (exp(cos(a, p) / tau) / sum over the others x of exp(cos(a, x) / tau))
           + the loss of masked_lm on the anchors

A document gives some long spans, the anchors, and some shorter ones around each, its positives. p is the mean of the
vectors of an anchor's positives, and the loss is taken in both directions, each anchor and each p among all others of
the global batch; those of another anchor of the same document are the hard negatives.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpt.corruption.choose import draw_subset, uniform
from jaxpt.corruption.compact import compact
from jaxpt.corruption.rows import row_keys
from jaxpt.losses.contrastive import Contrast, info_nce
from jaxpt.losses.token_metrics import ratio, token_metrics, token_tables
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import Pooling, mlm_head
from jaxpt.models.presets import roberta
from jaxpt.objectives.masked_lm import MaskedLM
from jaxpt.objectives.masked_texts import check_masked, mask_texts, predict_tokens
from jaxpt.objectives.parts import check, initializer_of, specs_of, without_dropout
from jaxpt.objectives.text_vectors import (
    Texts,
    collapse_alarm,
    embedder,
    enclose,
    pair_metrics,
    pair_sums,
    spans,
    split_keys,
    text_encoder,
    text_numbers,
    vector_metrics,
    vector_sums,
)
from jaxpt.sharding import constrain_rows
from jaxpt.types import Array, Batch, Example, Key, Objective, Out, RowSpec, Snapshot, Sums, View, Vocab


@dataclass(frozen=True)
class DeCLUTR:
    """Vectors of spans that are like those of the text around them, beside the prediction of hidden tokens."""

    encoder: TransformerConfig = field(default_factory=lambda: roberta("base"))
    """The Transformer."""
    anchors: int = 2
    """A: long spans of each document; a row is a document of ``2 * anchors`` times the longest span."""
    positives: int = 2
    """P: shorter spans around each anchor, whose vectors are averaged."""
    shortest: int = 32
    """The fewest tokens of a span; the most are ``seq_len - 2``, as [CLS] and [SEP] stand around them."""
    temperature: float = 0.05
    """tau, by which cosines are divided."""
    pooling: Pooling = "mean"
    """What the vector of a span is made of: the "mean" of its states, the "first", [CLS], or the "last"."""
    masked: MaskedLM | None = field(default_factory=MaskedLM)
    """Masked-LM loss on the anchors, which are then read masked for both losses; its ``encoder`` and ``packing`` are
    not used. None = none."""
    alarm: float = 0.02
    """``spread`` of the vectors under which they count as collapsed: 1 all over the sphere, 0 all the same."""
    alarm_after: int = 500
    """Steps before which a network need not tell texts apart."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be and missing special tokens."""
        self._check()
        cls, sep = (vocab.require(name, "declutr") for name in ("cls", "sep"))
        encoder = text_encoder(self.encoder, vocab, self.pooling, mlp=False)
        head, tables = mlm_head(self.encoder, vocab.size), token_tables(vocab)
        networks, scale = encoder.networks, {"contrastive": 1.0}
        if self.masked:
            vocab.require("mask", "declutr")
            networks, scale = networks | {"head": head}, scale | {"mlm": 1.0}

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            longest = batch.tokens.shape[1] // (2 * self.anchors)
            check(
                longest >= self.shortest,
                f"declutr: spans of at least {self.shortest} and at most {longest} tokens: raise --seq-len, of which "
                f"[CLS] and [SEP] take two, or lower --objective.shortest",
            )
            span_key, mask_key = jax.random.split(key)
            sizes_R = jnp.sum(batch.segment_ids == 1, axis=1, dtype=jnp.int32)

            def draw(row_key: Key, size: Array) -> Spans:
                return draw_spans(row_key, size, self.anchors, self.positives, self.shortest, longest)

            drawn = jax.vmap(draw)(row_keys(span_key, batch.row_ids), sizes_R)
            texts = enclose(spans(batch.tokens, drawn.starts, drawn.sizes, longest), cls, sep, vocab.pad)
            anchors = Texts(*(array[:, : self.anchors] for array in texts))
            short_R = ((sizes_R > 0) & (drawn.sizes[:, 0] == 0)) * batch.valid
            inputs = {**texts._asdict(), "short": short_R, "documents": (sizes_R > 0) * batch.valid}
            inputs["text_numbers"] = text_numbers(batch.tokens * (batch.segment_ids == 1))
            weights = {"contrastive": anchors.present}
            if self.masked:
                hidden, weights["mlm"] = mask_texts(self.masked, vocab, anchors, batch.row_ids, mask_key, snapshot.step)
                masked_tokens = hidden.pop("masked_tokens")
                inputs |= hidden | {"tokens": texts.tokens.at[:, : self.anchors].set(masked_tokens)}
            return Example(inputs, batch.row_ids, weights)

        def read(inputs: dict[str, Array]) -> Texts:
            return Texts(inputs["tokens"], inputs["segment_ids"])

        def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
            inputs, params, texts = example.inputs, snapshot.params, read(example.inputs)
            hidden_RTLD = encoder.states(params, texts, split_keys(keys, texts.tokens.shape[1]))
            vectors_RTE = encoder.vectors(params, texts, hidden_RTLD)
            anchors_RAE, positives_RTE = jnp.split(vectors_RTE, [self.anchors], axis=1)
            width = vectors_RTE.shape[-1]
            positives_RAE = positives_RTE.reshape(-1, self.anchors, self.positives, width).mean(2)
            losses, stats = {}, {name: inputs[name].sum() for name in ("short", "documents")}
            if self.masked:
                hidden_RALD, weights_RAK = hidden_RTLD[:, : self.anchors], example.weights["mlm"]
                losses["mlm"], more = predict_tokens(head, params, hidden_RALD, inputs, weights_RAK, tables)
                stats |= more
            return Out(losses, stats, {"anchors": anchors_RAE, "positives": positives_RAE})

        def couple(snapshot: Snapshot, features: dict[str, Array], example: Example):
            weights_RA = example.weights["contrastive"]
            check(weights_RA.size > 1, "declutr: a batch of one anchor has no negatives: raise batch_size")

            def flat(array: Array) -> Array:
                return array.reshape(-1, *array.shape[2:])

            anchors_QE, positives_QE = (flat(constrain_rows(features[name])) for name in ("anchors", "positives"))
            weights_Q = flat(weights_RA)
            made = tell_apart(anchors_QE, positives_QE, weights_Q, example.inputs["text_numbers"], 1 / self.temperature)
            stats = vector_sums(anchors_QE, weights_Q) | pair_sums(anchors_QE, positives_QE, made, weights_Q)
            stats["armed"] = weights_Q.sum() * (snapshot.step >= self.alarm_after)
            return {"contrastive": made.loss.reshape(weights_RA.shape)}, stats

        def summary(sums: Sums) -> dict[str, Array]:
            of = sums.stats
            told = vector_metrics(of) | pair_metrics(of) | {"too_short": ratio(of["short"], of["documents"])}
            told |= token_metrics(of, likelihood=False) if self.masked else {}
            return told | collapse_alarm(told, of["armed"], self.alarm)

        def views(snapshot: Snapshot, example: Example) -> dict[str, View]:
            inputs, texts, count = example.inputs, read(example.inputs), self.anchors
            anchors = Texts(*(array[:, :count] for array in texts)).view()
            if self.masked:
                offsets_A1 = texts.tokens.shape[2] * jnp.arange(count)[:, None]
                asked = inputs["targets"], inputs["target_positions"] + offsets_A1, example.weights["mlm"]
                targets, places, weights = (array.reshape(len(array), -1) for array in asked)
                anchors = anchors._replace(targets=targets, target_positions=places, weights=weights)
            return {"anchors": anchors, "positives": Texts(*(array[:, count:] for array in texts)).view()}

        return Objective(
            rows=RowSpec("one_document", raw_length=lambda length: 2 * self.anchors * (length - 2)),
            specs=specs_of(networks),
            init=initializer_of(networks),
            corrupt=corrupt,
            loss=loss,
            scale=scale,
            couple=couple,
            summary=summary,
            views=views,
            embed=embedder(encoder, vocab),
        )

    def for_evaluation(self) -> DeCLUTR:
        """No dropout; the masking as ``masked_lm`` is evaluated."""
        masked = self.masked.for_evaluation() if self.masked else None
        return replace(self, encoder=without_dropout(self.encoder), masked=masked)

    def _check(self) -> None:
        for name in ("anchors", "positives", "shortest"):
            check(getattr(self, name) > 0, f"declutr: {name} is 1 or more, not {getattr(self, name)}")
        check(self.temperature > 0, f"declutr: temperature must be above 0, not {self.temperature}")
        check_masked(self.masked, "declutr")


class Spans(NamedTuple):
    """Where the spans of a row stand: A anchors, then the P positives of each; all of size 0 where there are none."""

    starts: Array  # [A + A P] i32
    sizes: Array  # [A + A P] i32


def draw_spans(key: Key, size: Array, anchors: int, positives: int, shortest: int, longest: int) -> Spans:
    """Draw anchors and the positives around each::

        tokens of an anchor     shortest + floor(Beta(4, 2) (longest - shortest))
        tokens of a positive    shortest + floor(Beta(2, 4) (longest - shortest))

    The document is divided into 2 A cells of ``longest`` tokens. Each anchor lies within a cell, anywhere; no two of
    these cells touch, and every such choice is equally likely. A positive begins anywhere from its own length before
    the anchor to the anchor's end, within the document: they may overlap, or touch.

    Args:
      key: of the row.
      size: [] i32, tokens of the document; fewer than ``2 * anchors * longest`` give no spans.
      anchors, positives: A, P.
      shortest, longest: tokens of a span.
    """
    cells, total = 2 * anchors, anchors * (1 + positives)
    bits = jax.random.bits(key, (cells + 6 * total,), jnp.uint32)
    # A of n cells that do not touch are A of n - A + 1 cells, moved apart
    chosen_C = draw_subset(bits[:cells], jnp.arange(cells) < cells - anchors + 1, anchors)
    cells_A = compact(chosen_C, anchors)[0] + jnp.arange(anchors)
    numbers_T6 = uniform(bits[cells:]).reshape(total, 6)
    # of five uniform numbers the fourth smallest is Beta(4, 2), the second is Beta(2, 4)
    sorted_T5 = jnp.sort(numbers_T6[:, :5], axis=1)
    beta_T = jnp.concatenate([sorted_T5[:anchors, 3], sorted_T5[anchors:, 1]])
    sizes_T = shortest + (beta_T * (longest - shortest)).astype(jnp.int32)
    anchors_A, positives_P = jnp.split(sizes_T, [anchors])
    places_A, places_P = jnp.split(numbers_T6[:, 5], [anchors])

    low_A = cells_A * longest
    starts_A = between(places_A, low_A, low_A + longest - anchors_A)
    own_P = jnp.repeat(jnp.arange(anchors), positives)  # the anchor of each positive
    low_P = jnp.maximum(starts_A[own_P] - positives_P, 0)
    high_P = jnp.minimum((starts_A + anchors_A)[own_P], size - positives_P)
    starts_T = jnp.concatenate([starts_A, between(places_P, low_P, high_P)])
    enough = size >= cells * longest
    return Spans(jnp.where(enough, starts_T, 0), jnp.where(enough, sizes_T, 0))


def between(numbers: Array, low: Array, high: Array) -> Array:
    """Turn uniform numbers in [0, 1) into whole ones from ``low`` to ``high``, both included.

    >>> between(jnp.array([0.0, 0.49, 0.99]), jnp.array([3, 3, 3]), jnp.array([4, 4, 4])).tolist()
    [3, 3, 4]
    """
    return low + jnp.floor(numbers * (high - low + 1)).astype(jnp.int32)


# ------------------------------------------------------------------------------------- the negatives


def tell_apart(anchors_QE: Array, positives_QE: Array, valid_Q: Array, numbers_R: Array, scale: float) -> Contrast:
    """Return NT-Xent of anchors and mean positives; those of a copy of the document in another row are no negatives.

    Args:
      anchors_QE, positives_QE: A of each row, row by row.
      valid_Q: [Q], 0 = there is none.
      numbers_R: [R] i32, the same for the same documents.
      scale: 1 / temperature.
    """
    count = len(anchors_QE)
    own_P1 = -1 - jnp.tile(jnp.arange(count), 2)[:, None]  # a vector is no negative of itself

    def of_pairs(groups_RB: Array) -> Array:
        groups_QB = jnp.repeat(groups_RB, count // len(numbers_R), axis=0)
        return jnp.concatenate([own_P1, jnp.tile(groups_QB, (2, 1))], axis=1)

    ones, others = copies(numbers_R)
    made = info_nce(
        jnp.concatenate([anchors_QE, positives_QE]),
        jnp.concatenate([positives_QE, anchors_QE]),
        jnp.arange(2 * count),
        scale=scale,
        groups=(of_pairs(ones), of_pairs(others)),
        valid_K=jnp.tile(valid_Q, 2),
    )
    return Contrast(*(value.reshape(2, count).mean(0) for value in made))


def copies(numbers_R: Array) -> tuple[Array, Array]:
    """Return groups, for ``info_nce``, that have one in common where two rows are different and hold the same document.

    Row r has, for each bit of r, a number of document, bit and value; on the other side the value is the opposite one.

    Args:
      numbers_R: [R] i32, the same for the same documents.

    Returns:
      two of [R, log2 R] i32, from 0 on.

    >>> ones, others = copies(jnp.array([7, 7, 9, 7]))
    >>> (ones[:, None, :, None] == others[None, :, None, :]).any((-2, -1)).astype(int).tolist()
    [[0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]]
    """
    rows = len(numbers_R)
    bits_B = jnp.arange(max(rows - 1, 1).bit_length())
    values_RB = (jnp.arange(rows)[:, None] >> bits_B) & 1
    first_R1 = jnp.argmax(numbers_R[:, None] == numbers_R, axis=1)[:, None]  # the document's first row
    groups_RB = 2 * (first_R1 * len(bits_B) + bits_B)
    return groups_RB + values_RB, groups_RB + 1 - values_RB
