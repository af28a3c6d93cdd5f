"""Simple contrastive learning of sentence vectors: a text is like itself under another dropout, or like what is known
to be alike (SimCSE, Gao et al. 2021, arXiv:2104.08821).

    loss = mean over texts i of -log (exp(cos(z_i, z'_i) / tau) / sum over j of exp(cos(z_i, z'_j) / tau))

Unsupervised, z and z' are the vectors of the same text from two passes whose dropout differs, and nothing else does.
Of an example of several texts, z is the first one's vector and z' the second one's; the others are hard negatives,
which stand in every sum, with ``hard_bias`` on the logits of one's own. All other texts of the global batch are the
negatives. ConSERT (Yan et al. 2021, arXiv:2105.11741) is its ``views``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp

from jaxpt.corruption.rows import row_keys
from jaxpt.corruption.views import Perturbation, draw_view
from jaxpt.losses.contrastive import Form, in_batch
from jaxpt.losses.token_metrics import ratio, token_metrics, token_tables
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import mlm_head
from jaxpt.models.patterns import bidirectional
from jaxpt.models.presets import bert
from jaxpt.objectives.masked_lm import MaskedLM
from jaxpt.objectives.masked_texts import check_masked, mask_texts, predict_tokens
from jaxpt.objectives.parts import check, initializer_of, specs_of, without_dropout
from jaxpt.objectives.text_vectors import (
    TextPooling,
    Texts,
    collapse_alarm,
    embedder,
    pair_metrics,
    pair_sums,
    read_texts,
    rows_of_texts,
    split_keys,
    text_encoder,
    text_numbers,
    vector_metrics,
    vector_sums,
)
from jaxpt.sharding import constrain_rows
from jaxpt.types import Array, Batch, Example, Key, Objective, Out, Snapshot, Sums, View, Vocab

AS_IT_IS = (Perturbation(), Perturbation())


@dataclass(frozen=True)
class SimCSE:
    """Vectors of texts that dropout does not tell apart and other texts do."""

    encoder: TransformerConfig = field(default_factory=lambda: bert("base"))
    """The Transformer; its dropout is what the two views of a text differ by."""
    texts: int = 1
    """Texts of an example: 1, which is read twice; 2, an anchor and what is like it; more: their hard negatives."""
    views: tuple[Perturbation, Perturbation] = AS_IT_IS
    """What is done to the embeddings of the one text in either view (ConSERT)."""
    pooling: TextPooling = "first"
    """What the vector of a text is made of: the state of its "first" token, [CLS], or of the "last", the "mean" of all,
    or "mean_last_two", of the last two layers."""
    mlp: Literal["training", "always", "none"] = "training"
    """Where dense and tanh stand between that and the loss; the vectors of a model trained with "training" are those
    without."""
    temperature: float = 0.05
    """tau, by which cosines are divided."""
    form: Form = "one_way"
    """"one_way": z among all z'; "symmetric": also z' among all z; "nt_xent": each among all others of both."""
    hard_bias: float = 0.0
    """Added to the logits of an anchor's own hard negatives: ln 2 counts them twice (the authors' alpha)."""
    scale: float = 1.0
    """Weight of the loss."""
    masked: MaskedLM | None = None
    """Masked-LM loss on another pass over the same texts; its ``encoder`` and ``packing`` are not used."""
    masked_scale: float = 0.1
    """Weight of that loss."""
    alarm: float = 0.02
    """``spread`` of the vectors under which they count as collapsed: 1 all over the sphere, 0 all the same."""
    alarm_after: int = 500
    """Steps before which a network need not tell texts apart."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be, and without [CLS] or [SEP]."""
        self._check()
        for name in ("cls", "sep", *(["mask"] if self.masked else [])):
            vocab.require(name, "simcse")
        encoder = text_encoder(self.encoder, vocab, self.pooling, mlp=self.mlp != "none")
        head, tables = mlm_head(self.encoder, vocab.size), token_tables(vocab)
        networks = encoder.networks | ({"head": head} if self.masked else {})
        passes = max(self.texts, 2)

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            length = batch.tokens.shape[1] // self.texts + 2
            texts, cut_R = read_texts(batch, self.texts, length, vocab)
            inputs = {**texts._asdict(), "text_numbers": text_numbers(texts.tokens), "cut": cut_R}
            view_key, mask_key = (jax.random.fold_in(key, i) for i in range(2))
            inputs |= perturb(texts, row_keys(view_key, batch.row_ids))
            weights = {"contrastive": texts.present[:, :2].min(axis=1)}
            if self.masked:
                hidden, weights["mlm"] = mask_texts(self.masked, vocab, texts, batch.row_ids, mask_key, snapshot.step)
                inputs |= hidden
            return Example(inputs, batch.row_ids, weights)

        def perturb(texts: Texts, keys_R: Array) -> dict[str, Array]:
            if self.views == AS_IT_IS:
                return {}
            keys_R2, made = split_keys(keys_R, 2), []
            for number, view in enumerate(self.views):
                draw = functools.partial(draw_view, width=self.encoder.width, view=view)
                made.append(jax.vmap(draw)(keys_R2[:, number], texts.segment_ids[:, 0]))
            found = {"positions": jnp.stack([positions for positions, _ in made], axis=1)}
            if any(view.masks for view in self.views):
                found["embedding_mask"] = jnp.stack(jnp.broadcast_arrays(*(kept for _, kept in made)), axis=1)
            return found

        def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
            inputs, params = example.inputs, snapshot.params
            texts = Texts(*(inputs[name] for name in Texts._fields))
            keys_RP = split_keys(keys, passes + self.texts)
            read = Texts(*(jnp.repeat(array, 2, axis=1) for array in texts)) if self.texts == 1 else texts
            changes = [inputs.get(name) for name in ("positions", "embedding_mask")]
            vectors_RPE = encoder(params, read, keys_RP[:, :passes], *changes)  # dropout of its own for each
            losses, stats = {}, {}
            if self.masked:
                hidden = encoder.states(params, texts._replace(tokens=inputs["masked_tokens"]), keys_RP[:, passes:])
                losses["mlm"], stats = predict_tokens(head, params, hidden, inputs, example.weights["mlm"], tables)
            return Out(losses, stats, {"vectors": vectors_RPE})

        def couple(snapshot: Snapshot, features: dict[str, Array], example: Example):
            vectors_RPE, weights_R = constrain_rows(features["vectors"]), example.weights["contrastive"]
            check(len(weights_R) > 1, "simcse: a batch of one text has no negatives: raise batch_size")
            first_RE, second_RE, numbers_RT = vectors_RPE[:, 0], vectors_RPE[:, 1], example.inputs["text_numbers"]
            present_RT = example.inputs["segment_ids"][..., 0] * weights_R[:, None]
            hard = {}
            if self.texts > 2:
                hard = {"hard_RKE": vectors_RPE[:, 2:], "hard_texts_RK": numbers_RT[:, 2:]}
                hard |= {"hard_valid_RK": present_RT[:, 2:], "hard_bias": self.hard_bias}
            made = in_batch(
                first_RE, second_RE, self.form, scale=1 / self.temperature, texts_R=numbers_RT[:, :2],
                valid_R=weights_R, **hard,
            )  # fmt: skip
            stats = vector_sums(first_RE, weights_R) | pair_sums(first_RE, second_RE, made, weights_R)
            stats |= {
                "texts": present_RT.sum(),
                "texts_cut": weights_R @ example.inputs["cut"],
                "armed": weights_R.sum() * (snapshot.step >= self.alarm_after),
            }
            return {"contrastive": made.loss}, stats

        def summary(sums: Sums) -> dict[str, Array]:
            of = sums.stats
            told = vector_metrics(of) | pair_metrics(of)
            told |= {"cut_texts": ratio(of["texts_cut"], of["texts"])} if self.texts > 1 else {}
            told |= token_metrics(of, likelihood=False) if self.masked else {}
            return told | collapse_alarm(told, of["armed"], self.alarm)

        def views(snapshot: Snapshot, example: Example) -> dict[str, View]:
            inputs = example.inputs
            texts = Texts(*(inputs[name] for name in Texts._fields))
            shown = {"text" if self.texts == 1 else "texts": texts.view()}
            if "positions" in inputs:
                ids, positions = texts.segment_ids[:, 0], inputs["positions"]
                told = [{"positions": p, "pattern": bidirectional(ids, p)} for p in (positions[:, 0], positions[:, 1])]
                shown = {f"view_{v + 1}": shown["text"]._replace(**told[v]) for v in range(2)}
            if self.masked:
                asked = {name: inputs[name][:, 0] for name in ("targets", "target_positions")}
                first = Texts(inputs["masked_tokens"][:, 0], texts.segment_ids[:, 0])
                shown["masked"] = first.view()._replace(**asked, weights=example.weights["mlm"][:, 0])
            return shown

        scale = {"contrastive": self.scale} | ({"mlm": self.masked_scale} if self.masked else {})
        return Objective(
            rows=rows_of_texts(self.texts),
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

    def for_evaluation(self) -> SimCSE:
        """No dropout, no change of embeddings, no MLP that is for training: how far other texts are apart."""
        return replace(
            self,
            encoder=without_dropout(self.encoder),
            views=AS_IT_IS,
            mlp="none" if self.mlp == "training" else self.mlp,
            masked=self.masked.for_evaluation() if self.masked else None,
        )

    def _check(self) -> None:
        check(self.temperature > 0, f"simcse: temperature must be above 0, not {self.temperature}")
        check(self.texts >= 1, f"simcse: an example has at least 1 text, not {self.texts}")
        check(
            self.texts <= 2 or self.form == "one_way",
            f'simcse: hard negatives stand beside the positives of form="one_way", not of "{self.form}"',
        )
        check(
            self.texts == 1 or self.views == AS_IT_IS,
            f"simcse: views are two of one text, and an example has {self.texts}: set texts=1",
        )
        check(
            self.texts > 2 or self.hard_bias == 0,
            f"simcse: hard_bias is for hard negatives, and examples of {self.texts} have none: set texts=3 or more",
        )
        check(
            self.encoder.positions != "none" or not any(view.shuffle for view in self.views),
            'simcse: a view that shuffles positions changes nothing with positions="none": set shuffle=False',
        )
        check(min(self.scale, self.masked_scale) >= 0, "simcse: scale and masked_scale cannot be negative")
        check_masked(self.masked, "simcse")
        check(
            self.masked is None or self.pooling != "mean_last_two",
            'simcse: tokens are predicted from the last layer: with masked, set pooling="mean"',
        )
