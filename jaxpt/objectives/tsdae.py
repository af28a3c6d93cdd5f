"""Denoising through one vector: write a text again from the vector of what is left of it (TSDAE, Wang et al. 2021,
arXiv:2104.06979).

    loss = mean over t of -log p(x[t+1] | x[..t], s),   s = the vector of x without most of its words

The decoder is the encoder with another attention pattern, causal, and one sublayer more in each layer: attention to
what the encoder gives. That is ONE vector, so its weight is 1 whatever is asked:

    cross-attention(h[t]) = W_o (W_v s)     for every t

Queries and keys change nothing and get no gradient, and so they are no parameters here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from jaxpt.corruption.choose import draw_kept
from jaxpt.corruption.pieces import gather
from jaxpt.corruption.rows import describe, row_keys, unit_ids
from jaxpt.losses.cross_entropy import CrossEntropy, linear_cross_entropy
from jaxpt.losses.token_metrics import ratio, token_metrics, token_sums, token_tables
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import Pooling, mlm_head
from jaxpt.models.patterns import causal, cross
from jaxpt.models.presets import bert
from jaxpt.models.sharing import cross_attention_of, with_cross_attention
from jaxpt.models.transformer import embedding_table, transformer
from jaxpt.objectives.causal_lm import next_tokens
from jaxpt.objectives.parts import check, initializer_of, specs_of, without_dropout
from jaxpt.objectives.text_vectors import (
    Texts,
    collapse_alarm,
    document_of,
    embedder,
    enclose,
    rows_of_texts,
    split_keys,
    text_encoder,
    vector_metrics,
    vector_sums,
)
from jaxpt.types import Array, Batch, Example, Key, Objective, Out, Params, Snapshot, Sums, View, Vocab


@dataclass(frozen=True)
class TSDAE:
    """Vectors of texts from which the texts can be written, although most words were not read."""

    encoder: TransformerConfig = field(default_factory=lambda: bert("base"))
    """The Transformer that reads; the one that writes has the same settings."""
    pooling: Pooling = "first"
    """What the vector of a text is made of: the state of the "first" token, [CLS], or of the "last", or the "mean"."""
    delete_ratio: float = 0.6
    """Share of the words that is left out, each by a coin of its own; one word always stays."""
    tied: bool = True
    """The decoder has the encoder's parameters, all but those of the attention to the vector."""
    gap: bool = False
    """Also measure what a text loses by the vector of another one, which decodes twice; evaluation does."""
    alarm: float = 0.02
    """``spread`` of the vectors under which they count as collapsed: 1 all over the sphere, 0 all the same."""
    alarm_after: int = 500
    """Steps before which a network need not tell texts apart."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be, and without [CLS] or [SEP]."""
        check(0 <= self.delete_ratio <= 1, f"tsdae: delete_ratio is a share in [0, 1], not {self.delete_ratio}")
        cls, sep = (vocab.require(name, "tsdae") for name in ("cls", "sep"))
        encoder, tables = text_encoder(self.encoder, vocab, self.pooling, mlp=False), token_tables(vocab)
        decoder = transformer(self.encoder, vocab.size, cross_attention="vector")
        head, body = mlm_head(self.encoder, vocab.size), "trunk" if self.tied else "decoder"
        networks = encoder.networks | {"cross": cross_attention_of(decoder), "head": head}
        networks[body] = transformer(self.encoder, vocab.size)  # all of the decoder but "cross"

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            whole = document_of(batch)

            def damage(row_key: Key, tokens_L: Array, segment_ids_L: Array) -> Texts:
                kept_L = draw_words_kept(row_key, tokens_L, segment_ids_L, self.delete_ratio, vocab)
                places_L, left_L, _ = gather(kept_L, segment_ids_L, tokens_L.shape[0])
                return Texts(tokens_L[places_L], left_L)

            damaged = jax.vmap(damage)(row_keys(key, batch.row_ids), *whole)
            whole, damaged = (enclose(texts, cls, sep, vocab.pad) for texts in (whole, damaged))
            targets_RL, weights_RL = next_tokens(*whole)
            inputs = {**damaged._asdict(), "targets": targets_RL}
            inputs |= {f"decoder_{name}": array for name, array in whole._asdict().items()}
            return Example(inputs, batch.row_ids, {"lm": weights_RL})

        def read(inputs: dict[str, Array]) -> tuple[Texts, View]:
            damaged = Texts(*(inputs[name] for name in Texts._fields))
            whole = Texts(*(inputs[f"decoder_{name}"] for name in Texts._fields))
            told = whole.segment_ids, whole.positions
            return damaged, View(whole.tokens, *told, causal(*told))

        def write(params: Params, vectors_RE: Array, inputs: dict[str, Array], keys: Array | None) -> CrossEntropy:
            text, one = read(inputs)[1], jnp.ones((len(vectors_RE), 1), jnp.int32)
            sight = cross(text.segment_ids, text.positions, one, one - 1)
            hidden_RLD = decoder.apply(
                with_cross_attention(params[body], params["cross"]), text.tokens, text.pattern, text.positions,
                keys=keys, context=vectors_RE[:, None].astype(self.encoder.dtype), context_pattern=sight,
            )  # fmt: skip
            readout = head.apply(params["head"], hidden_RLD, embedding_table(params[body]))
            return linear_cross_entropy(readout, inputs["targets"])

        def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
            params, inputs, weights_RL = snapshot.params, example.inputs, example.weights["lm"]
            keys_R2 = split_keys(keys, 2)
            vectors_RE = encoder(params, read(inputs)[0], keys_R2[:, 0])
            result = write(params, vectors_RE, inputs, keys_R2[:, 1])
            sums = token_sums(result, inputs["targets"], weights_RL, tables)
            valid_R = (weights_RL.sum(1) > 0).astype(jnp.float32)
            sums |= vector_sums(vectors_RE, valid_R)
            sums["armed"] = valid_R.sum() * (snapshot.step >= self.alarm_after)
            features = {}
            if self.gap:  # without dropout, as what it is compared with
                calm = without_dropout(self.encoder) == self.encoder
                nll_RL = (result if calm else write(params, vectors_RE, inputs, None)).nll
                features = {"vectors": vectors_RE, "nll": jnp.sum(nll_RL * weights_RL, axis=1)}
            return Out({"lm": result.loss}, sums, jax.lax.stop_gradient(features))

        def couple(snapshot: Snapshot, features: dict[str, Array], example: Example):
            params, weights_RL = jax.lax.stop_gradient(snapshot.params), example.weights["lm"]
            size_R = weights_RL.sum(1)
            # of the row before, where both rows have a text
            others_RE = jnp.roll(features["vectors"], 1, axis=0)
            both_R = (size_R > 0) & (jnp.roll(size_R, 1) > 0) & (len(size_R) > 1)
            nll_R = jnp.sum(write(params, others_RE, example.inputs, None).nll * weights_RL, axis=1)
            return {}, {
                "gap": jnp.sum(jnp.where(both_R, nll_R - features["nll"], 0.0)),
                "gap_tokens": jnp.sum(jnp.where(both_R, size_R, 0.0)),
            }

        def summary(sums: Sums) -> dict[str, Array]:
            of = sums.stats
            told = token_metrics(of, likelihood=False) | vector_metrics(of)
            told |= {"gap": ratio(of["gap"], of["gap_tokens"])} if self.gap else {}
            return told | collapse_alarm(told, of["armed"], self.alarm)

        def views(snapshot: Snapshot, example: Example) -> dict[str, View]:
            damaged, text = read(example.inputs)
            asked = {"targets": example.inputs["targets"], "weights": example.weights["lm"]}
            return {"encoder": damaged.view(), "decoder": text._replace(**asked)}

        return Objective(
            rows=rows_of_texts(1),
            specs=specs_of(networks),
            init=initializer_of(networks),
            corrupt=corrupt,
            loss=loss,
            scale={"lm": 1.0},
            couple=couple if self.gap else None,
            summary=summary,
            views=views,
            embed=embedder(encoder, vocab),
        )

    def for_evaluation(self) -> TSDAE:
        """No dropout; the same damage."""
        return replace(self, encoder=without_dropout(self.encoder), gap=True)


def draw_words_kept(key: Key, tokens_L: Array, segment_ids_L: Array, delete_ratio: float, vocab: Vocab) -> Array:
    """Draw which tokens of a text are read, [L] bool: whole words, at least one.

    Args:
      key: a key.
      tokens_L, segment_ids_L: [L] i32, of a text without [CLS] and [SEP].
      delete_ratio: the probability that a word is left out.
      vocab: which says where words start.
    """
    row = describe(tokens_L, segment_ids_L, jnp.zeros_like(tokens_L), vocab)
    bits_L = jax.random.bits(key, tokens_L.shape, jnp.uint32)
    return row.present & draw_kept(bits_L, unit_ids(row.word_starts), row.candidates, delete_ratio)
