"""Contrastive predictive coding: tell what follows a text from other text (CPC, van den Oord et al. 2018,
arXiv:1807.03748).

    loss = mean over t, k of -log (exp f_k(z[t+k], c[t]) / sum over candidates j of exp f_k(z[j], c[t]))

    f_k(z, c) = z^T W_k c,   k = 1 .. K

A document is cut into segments; z[t] is the vector of segment t, read alone, and c[t] what a causal network makes of
z[1] .. z[t]. With N candidates, ln N - loss is at most the information that c[t] has of z[t+k], in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from jaxpt.losses.contrastive import Contrast, info_nce
from jaxpt.losses.token_metrics import ratio
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import Pooling, predictions, projection
from jaxpt.models.patterns import causal
from jaxpt.models.presets import bert
from jaxpt.models.transformer import transformer
from jaxpt.objectives.parts import check, initializer_of, specs_of, without_dropout
from jaxpt.objectives.text_vectors import (
    Texts,
    collapse_alarm,
    read_texts,
    split_keys,
    text_encoder,
    vector_metrics,
    vector_sums,
)
from jaxpt.sharding import constrain_rows
from jaxpt.types import Array, Batch, Example, Key, Objective, Out, RowSpec, Snapshot, Sums, View, Vocab

Candidates: TypeAlias = Literal["all", "batch", "same_doc"]


def default_context() -> TransformerConfig:
    """Two causal layers of width 256."""
    return TransformerConfig(depth=2, width=256, heads=4, positions="rotary")


@dataclass(frozen=True)
class CPC:
    """Vectors of segments, from which those that follow can be told."""

    encoder: TransformerConfig = field(default_factory=lambda: bert("base"))
    """The Transformer that reads each segment alone."""
    context: TransformerConfig = field(default_factory=default_context)
    """The causal Transformer over the vectors of the segments; its width is theirs."""
    segments: Literal["windows", "sentences"] = "windows"
    """What a segment is: a "window" of so many tokens, or a sentence, cut to as many."""
    window: int = 32
    """Tokens of a segment, without [CLS] and [SEP]; a row has room for ``seq_len // window`` segments."""
    ahead: int = 3
    """K: the next so many segments are predicted."""
    candidates: Candidates = "all"
    """What a segment is told from: "all" segments of the batch, in the "batch" the segments at the same place of other
    documents, or in the "same_doc" those at other places."""
    first_scale: float = 0.01
    """W_k begin as N(0, first_scale^2 / width). At 1, the usual, guesses cost so much that a network without training
    may first make all vectors the same, and stay there."""
    pooling: Pooling = "mean"
    """What the vector of a segment is a projection of: the "mean" of its states, the "first", [CLS], or the "last"."""
    alarm: float = 0.02
    """``spread`` of the vectors under which they count as collapsed: 1 all over the sphere, 0 all the same."""
    alarm_after: int = 500
    """Steps before which a network need not tell segments apart."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be, and without [CLS] or [SEP]."""
        check(self.window > 0 and self.ahead > 0, "cpc: window and ahead are 1 or more")
        check(self.first_scale > 0, f"cpc: first_scale must be above 0, not {self.first_scale}: nothing learns from 0")
        for name in ("cls", "sep"):
            vocab.require(name, "cpc")
        encoder = text_encoder(self.encoder, vocab, self.pooling, mlp=False)
        width = self.context.embedding
        check(width == self.context.width, f"cpc: context has embed_width {width}: leave it at width")
        networks = {
            **encoder.networks,
            "projection": projection(self.encoder, width),
            "context": transformer(self.context, None),
            "predictions": predictions(width, self.ahead, self.first_scale),
        }

        def segments_of(batch: Batch, numbers_RL: Array, count: int) -> tuple[Texts, Array]:
            return read_texts(batch._replace(sentence_ids=numbers_RL), count, self.window + 2, vocab)

        def windows(batch: Batch) -> Array:
            return jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]) // self.window, batch.tokens.shape)

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            count = batch.tokens.shape[1] // self.window
            check(
                count > self.ahead,
                f"cpc: rows of {batch.tokens.shape[1]} tokens have room for {count} segments of {self.window}, and "
                f"{self.ahead} must follow one: raise --seq-len, or lower --objective.ahead or --objective.window",
            )
            if self.segments == "sentences":
                texts, cut_R = segments_of(batch, batch.sentence_ids, count)
            else:  # whole windows: a shorter one would be told by its length
                texts, cut_R = segments_of(batch, windows(batch), count)
                whole_RS1 = texts.segment_ids.min(-1, keepdims=True)
                texts = Texts(jnp.where(whole_RS1 > 0, texts.tokens, vocab.pad), texts.segment_ids * whole_RS1)
            present_RS = texts.present * batch.valid[:, None]
            places_SK, inside_SK = places_ahead(count, self.ahead)
            weights_RSK = present_RS[:, :, None] * present_RS[:, places_SK] * inside_SK
            documents_R = jnp.any(batch.segment_ids == 1, axis=1) * batch.valid
            short_R = documents_R * (weights_RSK.sum((1, 2)) == 0)
            inputs = {**texts._asdict(), "present": present_RS, "documents": documents_R, "short": short_R}
            inputs["cut"] = cut_R * batch.valid
            return Example(inputs, batch.row_ids, {"predictive": weights_RSK})

        def read(inputs: dict[str, Array]) -> Texts:
            return Texts(inputs["tokens"], inputs["segment_ids"])

        def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
            params, texts = snapshot.params, read(example.inputs)
            ids_RS = texts.segment_ids[..., 0]
            keys_RS = split_keys(keys, ids_RS.shape[1] + 1)
            pooled_RSD = encoder(params, texts, keys_RS[:, 1:])
            segments_RSE = networks["projection"].apply(params["projection"], pooled_RSD)
            places_RS = jnp.broadcast_to(jnp.arange(ids_RS.shape[1]), ids_RS.shape)
            pattern = causal(ids_RS, places_RS)
            context_RSE = networks["context"].apply(
                params["context"], segments_RSE, pattern, places_RS, keys=keys_RS[:, 0]
            )
            predicted_RSKE = networks["predictions"].apply(params["predictions"], context_RSE.astype(jnp.float32))
            lost = {name: example.inputs[name].sum() for name in ("documents", "short", "cut")}
            return Out({}, lost, {"segments": segments_RSE, "predicted": predicted_RSKE})

        def couple(snapshot: Snapshot, features: dict[str, Array], example: Example):
            predicted_RSKE, segments_RSE = (constrain_rows(features[name]) for name in ("predicted", "segments"))
            alone = self.candidates == "batch" and len(segments_RSE) == 1
            check(not alone, 'cpc: candidates="batch" of one row have no negatives: raise batch_size')
            present_RS, weights_RSK = example.inputs["present"], example.weights["predictive"]
            made, number = tell_apart(self.candidates, predicted_RSKE, segments_RSE, present_RS)

            def total(values: Array | float) -> Array:
                return jnp.sum(weights_RSK * values, axis=(0, 1))

            vectors_QE, present_Q = segments_RSE.reshape(-1, width), present_RS.reshape(-1)
            stats = vector_sums(vectors_QE, present_Q) | {
                "predicted": total(1.0),
                "found": total(made.correct),
                "nats": total(jax.lax.stop_gradient(made.loss)),
                "log_candidates": total(jnp.log(jnp.maximum(number, 1))),
                "armed": present_Q.sum() * (snapshot.step >= self.alarm_after),
            }
            return {"predictive": made.loss}, stats

        def summary(sums: Sums) -> dict[str, Array]:
            of, told = sums.stats, vector_metrics(sums.stats)
            told["text_accuracy"] = ratio(of["found"].sum(), of["predicted"].sum())
            told["too_short"] = ratio(of["short"], of["documents"])
            if self.segments == "sentences":
                told["cut_segments"] = ratio(of["cut"], of["vectors"])
            accuracy_K = ratio(of["found"], of["predicted"])
            log_candidates_K = ratio(of["log_candidates"], of["predicted"])
            information_K = log_candidates_K - ratio(of["nats"], of["predicted"])
            for k in range(self.ahead):
                told |= {
                    f"information/{k + 1}": information_K[k],
                    f"log_candidates/{k + 1}": log_candidates_K[k],
                    f"accuracy/{k + 1}": accuracy_K[k],
                }
            return told | collapse_alarm(told, of["armed"], self.alarm)

        def views(snapshot: Snapshot, example: Example) -> dict[str, View]:
            return {"segments": read(example.inputs).view()}

        def embed(snapshot: Snapshot, batch: Batch, text: int) -> Array:
            # the mean over the windows of a text, by their tokens: the last one may be short
            texts, _ = segments_of(batch, windows(batch), -(-batch.tokens.shape[1] // self.window))
            pooled_RSD = encoder(snapshot.params, texts)
            segments_RSE = networks["projection"].apply(snapshot.params["projection"], pooled_RSD)
            sizes_RS1 = jnp.maximum(texts.segment_ids.sum(-1, keepdims=True) - 2, 0)
            return jnp.sum(segments_RSE * sizes_RS1, axis=1) / jnp.maximum(sizes_RS1.sum(1), 1)

        return Objective(
            rows=RowSpec("one_document"),
            specs=specs_of(networks),
            init=initializer_of(networks),
            corrupt=corrupt,
            loss=loss,
            scale={"predictive": 1.0},
            couple=couple,
            summary=summary,
            views=views,
            embed=embed,
        )

    def for_evaluation(self) -> CPC:
        """No dropout."""
        return replace(self, encoder=without_dropout(self.encoder), context=without_dropout(self.context))


def places_ahead(count: int, ahead: int) -> tuple[Array, Array]:
    """Return the place of each of the next segments, [S, K] i32, the last one where there is none, and [S, K] f32.

    >>> [array.tolist() for array in places_ahead(3, 2)]
    [[[1, 2], [2, 2], [2, 2]], [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]]
    """
    places_SK = jnp.arange(count)[:, None] + jnp.arange(1, ahead + 1)
    return jnp.minimum(places_SK, count - 1), (places_SK < count).astype(jnp.float32)


def tell_apart(
    candidates: Candidates, predicted_RSKE: Array, segments_RSE: Array, present_RS: Array
) -> tuple[Contrast, Array]:
    """Return InfoNCE of each prediction, by dot product, and among how many candidates, the right one with them.

    Segments of the same words remain negatives, as the bound on the information asks.

    Args:
      candidates: which.
      predicted_RSKE: W_k c[t], at place t of each row for k = 1 .. K.
      segments_RSE: z.
      present_RS: 0 = no segment, and no candidate.

    Returns:
      [R, S, K] each; the number broadcasts. What lies beyond the row or present segments is to be weighed 0.
    """
    rows, count, ahead, width = predicted_RSKE.shape
    places_SK, _ = places_ahead(count, ahead)
    settings: dict[str, Any] = {"scale": 1.0, "similarity": "dot"}
    if candidates == "all":
        targets_RSK = jnp.arange(rows)[:, None, None] * count + places_SK
        flat = predicted_RSKE.reshape(-1, width), segments_RSE.reshape(-1, width), targets_RSK.reshape(-1)
        made = info_nce(*flat, valid_K=present_RS.reshape(-1), **settings)
        number = present_RS.sum()
    elif candidates == "same_doc":

        def in_row(predicted_SKE: Array, segments_SE: Array, present_S: Array) -> Contrast:
            targets_T = places_SK.reshape(-1)
            return info_nce(predicted_SKE.reshape(-1, width), segments_SE, targets_T, valid_K=present_S, **settings)

        made = jax.vmap(in_row)(predicted_RSKE, segments_RSE, present_RS)
        number = present_RS.sum(1)[:, None, None]
    else:

        def at_place(of_place: tuple[Array, Array, Array]) -> Contrast:
            targets_Q = jnp.repeat(jnp.arange(rows), ahead)
            return info_nce(of_place[0], of_place[1], targets_Q, valid_K=of_place[2], **settings)

        # one place after the other: its R segments, and the R K predictions of them from the places before
        steps_K = jnp.arange(ahead)
        before_SK = jnp.maximum(jnp.arange(count)[:, None] - 1 - steps_K, 0)
        asked_SQE = predicted_RSKE[:, before_SK, steps_K].swapaxes(0, 1).reshape(count, rows * ahead, width)
        found = jax.lax.map(jax.checkpoint(at_place), (asked_SQE, segments_RSE.swapaxes(0, 1), present_RS.T))
        found = (value.reshape(count, rows, ahead).swapaxes(0, 1) for value in found)
        made = Contrast(*(value_RSK[:, places_SK, steps_K] for value_RSK in found))
        number = present_RS.sum(0)[places_SK]
    return Contrast(*(value.reshape(rows, count, ahead) for value in made)), number
