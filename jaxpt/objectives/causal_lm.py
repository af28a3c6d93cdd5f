"""Causal language modelling: predict the next token (Radford et al. 2018; Brown et al. 2020, arXiv:2005.14165).

    loss = mean over t of -log p(x[t+1] | x[..t])        + z_loss * mean of (log Z)^2

A packed row holds several documents; each token attends to its own document only. The label of a token is the
next token of the SAME document, its EOS included; the last token of a document (or of a row) predicts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax.numpy as jnp

from jaxpt.losses.cross_entropy import linear_cross_entropy, z_loss
from jaxpt.losses.token_metrics import token_metrics, token_sums, token_tables
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import lm_head
from jaxpt.models.patterns import causal
from jaxpt.models.presets import gpt2
from jaxpt.models.transformer import embedding_table, transformer
from jaxpt.objectives.parts import check, check_length, initializer_of, specs_of, without_dropout
from jaxpt.types import Array, Batch, Example, Key, Objective, Out, Packing, RowSpec, Snapshot, Sums, View, Vocab


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction."""

    decoder: TransformerConfig = field(default_factory=lambda: gpt2("small"))
    """The Transformer; ``tie_embeddings`` says whether the output layer is the embedding table."""
    packing: Packing = "concatenate"
    """How documents share a row: "concatenate" wastes no token, "best_fit" cuts fewer documents."""
    bos: bool = False
    """Put [BOS] before each document (it is read, never predicted)."""
    z_loss: float = 0.0
    """Scale of the term (log Z)^2; PaLM and T5X use 1e-4."""
    label_smoothing: float = 0.0
    """eps of the target (1 - eps) onehot + eps / V."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError where the tokenizer lacks [EOS] (or [BOS])."""
        check(self.z_loss >= 0, f"causal_lm: z_loss is a scale and cannot be negative, not {self.z_loss}")
        check(0 <= self.label_smoothing < 1, f"causal_lm: label_smoothing is in [0, 1), not {self.label_smoothing}")
        rows = RowSpec(
            packing=self.packing,
            prefix=(vocab.require("bos", "causal_lm with bos=True"),) if self.bos else (),
            suffix=(vocab.require("eos", "causal_lm"),),
        )
        decoder, head = transformer(self.decoder, vocab.size), lm_head(self.decoder, vocab.size)
        networks = {"trunk": decoder, "head": head}
        tables = token_tables(vocab)
        scale = {"lm": 1.0} | ({"z_loss": self.z_loss} if self.z_loss else {})

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            check_length(self.decoder, batch.tokens.shape[1], "causal_lm")
            targets_RL, weights_RL = next_tokens(batch.tokens, batch.segment_ids)
            inputs = {
                "tokens": batch.tokens,
                "segment_ids": batch.segment_ids,
                "positions": batch.positions,
                "targets": targets_RL,
            }
            return Example(inputs, batch.row_ids, weights=dict.fromkeys(scale, weights_RL))

        def read(inputs: dict[str, Array]) -> View:
            segments, positions = inputs["segment_ids"], inputs["positions"]
            return View(inputs["tokens"], segments, positions, causal(segments, positions))

        def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
            inputs, params = example.inputs, snapshot.params
            text = read(inputs)
            hidden_RLD = decoder.apply(params["trunk"], text.tokens, text.pattern, text.positions, keys=keys)
            readout = head.apply(params["head"], hidden_RLD, embedding_table(params["trunk"]))
            result = linear_cross_entropy(readout, inputs["targets"], self.label_smoothing)
            losses = {"lm": result.loss} | ({"z_loss": z_loss(result.log_normalizer)} if self.z_loss else {})
            return Out(losses, token_sums(result, inputs["targets"], example.weights["lm"], tables))

        def summary(sums: Sums) -> dict[str, Array]:
            return token_metrics(sums.stats, likelihood=True)

        def views(snapshot: Snapshot, example: Example) -> dict[str, View]:
            text, targets = read(example.inputs), example.inputs["targets"]
            return {"text": text._replace(targets=targets, weights=example.weights["lm"])}

        init = initializer_of(networks)
        return Objective(rows, specs_of(networks), init, corrupt, loss, scale, summary=summary, views=views)

    def for_evaluation(self) -> CausalLM:
        """No dropout, no smoothing, no auxiliary term: the loss is the negative log-likelihood."""
        return replace(self, decoder=without_dropout(self.decoder), z_loss=0.0, label_smoothing=0.0)


def next_tokens(tokens_RL: Array, segment_ids_RL: Array) -> tuple[Array, Array]:
    """Return the labels and loss weights of next-token prediction inside each segment.

    Args:
      tokens_RL: [R, L] i32.
      segment_ids_RL: [R, L] i32, 0 = padding.

    Returns:
      targets_RL ([R, L] i32, of no meaning where the weight is 0) and weights_RL ([R, L] f32).

    >>> import jax.numpy as jnp
    >>> targets, weights = next_tokens(jnp.array([[3, 8, 1, 9, 1, 0]]), jnp.array([[1, 1, 1, 2, 2, 0]]))
    >>> weights.astype(int).tolist(), (targets * weights).astype(int).tolist()
    ([[1, 1, 0, 1, 0, 0]], [[8, 1, 0, 1, 0, 0]])
    """
    targets_RL = jnp.roll(tokens_RL, -1, axis=1)
    inside_RL = (segment_ids_RL[:, 1:] == segment_ids_RL[:, :-1]) & (segment_ids_RL[:, :-1] > 0)
    return targets_RL, jnp.pad(inside_RL, ((0, 0), (0, 1))).astype(jnp.float32)
