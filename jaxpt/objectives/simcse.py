"""Simple contrastive learning of sentence vectors: a text is like itself under another dropout (SimCSE, Gao et al.
2021, arXiv:2104.08821).

    loss = mean over texts i of -log (exp(cos(z_i, z'_i) / tau) / sum over j of exp(cos(z_i, z'_j) / tau))

z and z' are the vectors of the same text from two passes whose dropout differs, and nothing else does; all other texts
of the global batch are the negatives.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import jax.numpy as jnp

from jaxpt.losses.contrastive import Form, in_batch, normalize
from jaxpt.losses.token_metrics import ratio
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import Pooling
from jaxpt.models.presets import bert
from jaxpt.objectives.parts import check, initializer_of, specs_of, without_dropout
from jaxpt.objectives.text_vectors import (
    Texts,
    collapse_alarm,
    enclose,
    separate,
    split_keys,
    text_encoder,
    text_numbers,
    vector_metrics,
    vector_sums,
)
from jaxpt.sharding import constrain_rows
from jaxpt.types import Array, Batch, Example, Key, Objective, Out, RowSpec, Snapshot, Sums, View, Vocab


@dataclass(frozen=True)
class SimCSE:
    """Vectors of texts that dropout does not tell apart and other texts do."""

    encoder: TransformerConfig = field(default_factory=lambda: bert("base"))
    """The Transformer; its dropout is what the two views differ by."""
    pooling: Pooling = "first"
    """What the vector of a text is made of: the state of its "first" token, [CLS], or of the "last", or the "mean"."""
    mlp: Literal["training", "always", "none"] = "training"
    """Where dense and tanh stand between that and the loss; the vectors of a model trained with "training" are those
    without."""
    temperature: float = 0.05
    """tau, by which cosines are divided."""
    form: Form = "one_way"
    """"one_way": z among all z'; "symmetric": also z' among all z; "nt_xent": each among all others of both."""
    alarm: float = 0.02
    """``spread`` of the vectors under which they count as collapsed: 1 all over the sphere, 0 all the same."""
    alarm_after: int = 500
    """Steps before which a network need not tell texts apart."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for a temperature that cannot be, and without [CLS] or [SEP]."""
        check(self.temperature > 0, f"simcse: temperature must be above 0, not {self.temperature}")
        cls, sep = (vocab.require(name, "simcse") for name in ("cls", "sep"))
        encoder = text_encoder(self.encoder, vocab, self.pooling, mlp=self.mlp != "none")

        def texts_of(batch: Batch) -> Texts:
            made, _ = separate(batch.tokens, batch.segment_ids, batch.sentence_ids, 1, batch.tokens.shape[1])
            return enclose(Texts(made.tokens[:, 0], made.segment_ids[:, 0]), cls, sep, vocab.pad)

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            texts = texts_of(batch)
            inputs = {**texts._asdict(), "text_numbers": text_numbers(texts.tokens)}
            return Example(inputs, batch.row_ids, {"contrastive": texts.present})

        def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
            both = (jnp.stack([example.inputs[name]] * 2, axis=1) for name in Texts._fields)
            vectors_R2E = encoder(snapshot.params, Texts(*both), split_keys(keys, 2))  # a mask for each view
            return Out({}, features={"vectors": vectors_R2E})

        def couple(snapshot: Snapshot, features: dict[str, Array], example: Example):
            first_RE, second_RE = (constrain_rows(features["vectors"][:, view]) for view in range(2))
            check(first_RE.shape[0] > 1, "simcse: a batch of one text has no negatives: raise batch_size")
            weights_R, numbers_R = example.weights["contrastive"], example.inputs["text_numbers"]
            made = in_batch(
                first_RE, second_RE, self.form, scale=1 / self.temperature, texts_R=numbers_R, valid_R=weights_R
            )
            texts = weights_R.sum()
            stats = vector_sums(first_RE, weights_R) | {
                "texts_found": weights_R @ made.correct,
                "texts_apart": weights_R @ jnp.sum(jnp.square(normalize(first_RE) - normalize(second_RE)), axis=-1),
                "armed": texts * (snapshot.step >= self.alarm_after),
            }
            return {"contrastive": made.loss}, stats

        def summary(sums: Sums) -> dict[str, Array]:
            of, told = sums.stats, vector_metrics(sums.stats)
            told |= {
                "text_accuracy": ratio(of["texts_found"], of["vectors"]),
                "alignment": ratio(of["texts_apart"], of["vectors"]),
            }
            return told | collapse_alarm(told, of["armed"], self.alarm)

        def views(snapshot: Snapshot, example: Example) -> dict[str, View]:
            return {"text": Texts(*(example.inputs[name] for name in Texts._fields)).view()}

        def embed(snapshot: Snapshot, batch: Batch, text: int) -> Array:
            return encoder(snapshot.params, texts_of(batch))

        return Objective(
            rows=RowSpec("one_document", reserve=2),
            specs=specs_of(encoder.networks),
            init=initializer_of(encoder.networks),
            corrupt=corrupt,
            loss=loss,
            scale={"contrastive": 1.0},
            couple=couple,
            summary=summary,
            views=views,
            embed=embed,
        )

    def for_evaluation(self) -> SimCSE:
        """No dropout, no MLP that is for training: how far other texts are apart, as the two views are the same."""
        return replace(self, encoder=without_dropout(self.encoder), mlp="none" if self.mlp == "training" else self.mlp)
