"""Simple contrastive learning of sentence vectors: a text is like itself under another dropout (SimCSE, Gao et al.
2021, arXiv:2104.08821).

    loss = mean over texts i of -log (exp(cos(z_i, z'_i) / tau) / sum over j of exp(cos(z_i, z'_j) / tau))

z and z' are the vectors of the same text from two passes whose dropout differs, and nothing else does; all other texts
of the global batch are the negatives.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.losses.contrastive import Form, in_batch, normalize
from jaxpt.losses.token_metrics import ratio
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import Pooling, pool, pooler
from jaxpt.models.patterns import bidirectional
from jaxpt.models.presets import bert
from jaxpt.models.transformer import transformer
from jaxpt.objectives.parts import check, check_length, initializer_of, specs_of, without_dropout
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

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for a temperature that cannot be, and without [CLS] or [SEP]."""
        check(self.temperature > 0, f"simcse: temperature must be above 0, not {self.temperature}")
        cls, sep = (vocab.require(name, "simcse") for name in ("cls", "sep"))
        encoder = transformer(self.encoder, vocab.size)
        networks = {"trunk": encoder} | ({} if self.mlp == "none" else {"mlp": pooler(self.encoder)})

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            check_length(self.encoder, batch.tokens.shape[1] + 2, "simcse")
            tokens_RL, segment_ids_RL = enclose(batch.tokens, batch.segment_ids, cls, sep, vocab.pad)
            positions_RL = jnp.cumsum(segment_ids_RL, axis=1) - segment_ids_RL
            inputs = {"tokens": tokens_RL, "segment_ids": segment_ids_RL, "positions": positions_RL}
            inputs |= {"text_numbers": text_numbers(tokens_RL)}
            return Example(inputs, batch.row_ids, {"contrastive": segment_ids_RL[:, 0].astype(jnp.float32)})

        def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
            names = ("tokens", "segment_ids", "positions")
            tokens, segment_ids, positions = (jnp.repeat(example.inputs[name], 2, axis=0) for name in names)
            keys_2R = jax.vmap(lambda key: jax.random.split(key, 2))(keys).reshape(-1)  # a mask for each view
            pattern = bidirectional(segment_ids, positions)
            hidden = encoder.apply(snapshot.params["trunk"], tokens, pattern, positions, keys=keys_2R)
            vectors = pool(self.pooling, hidden, segment_ids)
            if self.mlp != "none":
                vectors = networks["mlp"].apply(snapshot.params["mlp"], vectors)
            return Out({}, features={"vectors": vectors.astype(jnp.float32).reshape(len(keys), 2, -1)})

        def couple(snapshot: Snapshot, features: dict[str, Array], example: Example):
            first_RE, second_RE = (constrain_rows(features["vectors"][:, view]) for view in range(2))
            rows = first_RE.shape[0]
            check(rows > 1, "simcse: a batch of one text has no negatives: raise batch_size")
            weights_R, numbers_R = example.weights["contrastive"], example.inputs["text_numbers"]
            made = in_batch(
                first_RE, second_RE, self.form, scale=1 / self.temperature, texts_R=numbers_R, valid_R=weights_R
            )
            units_RE, others_RE = normalize(first_RE), normalize(second_RE)
            texts, total_E = weights_R.sum(), weights_R @ units_RE
            stats = {
                "texts": texts,
                "texts_found": weights_R @ made.correct,
                "texts_apart": weights_R @ jnp.sum(jnp.square(units_RE - others_RE), axis=-1),
                "text_pairs": texts * (texts - 1),
                "text_cosines": total_E @ total_E - texts,  # of every text with every other
            }
            return {"contrastive": made.loss}, stats

        def summary(sums: Sums) -> dict[str, Array]:
            of = sums.stats
            return {
                "text_accuracy": ratio(of["texts_found"], of["texts"]),
                "alignment": ratio(of["texts_apart"], of["texts"]),
                "cosine_of_others": ratio(of["text_cosines"], of["text_pairs"]),
            }

        def views(snapshot: Snapshot, example: Example) -> dict[str, View]:
            told = example.inputs["segment_ids"], example.inputs["positions"]
            return {"text": View(example.inputs["tokens"], *told, bidirectional(*told))}

        return Objective(
            rows=RowSpec("one_document", reserve=2),
            specs=specs_of(networks),
            init=initializer_of(networks),
            corrupt=corrupt,
            loss=loss,
            scale={"contrastive": 1.0},
            couple=couple,
            summary=summary,
            views=views,
        )

    def for_evaluation(self) -> SimCSE:
        """No dropout, no MLP that is for training: how far other texts are apart, as the two views are the same."""
        return replace(self, encoder=without_dropout(self.encoder), mlp="none" if self.mlp == "training" else self.mlp)


def enclose(tokens_RL: Array, segment_ids_RL: Array, cls: int, sep: int, pad: int) -> tuple[Array, Array]:
    """Put [CLS] before the text of each row and [SEP] behind it.

    Args:
      tokens_RL: [R, L] i32, one text per row from its first place on.
      segment_ids_RL: [R, L] i32, 0 = padding.
      cls, sep, pad: ids.

    Returns:
      tokens and segment ids (1 or 0), [R, L + 2]; a row without a text stays empty.

    >>> tokens, segment_ids = enclose(jnp.array([[7, 8, 0], [0, 0, 0]]), jnp.array([[1, 1, 0], [0, 0, 0]]), 4, 5, 0)
    >>> tokens.tolist(), segment_ids.tolist()
    ([[4, 7, 8, 5, 0], [0, 0, 0, 0, 0]], [[1, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    """
    size_R1 = jnp.sum(segment_ids_RL > 0, axis=1, keepdims=True)
    place_L = jnp.arange(tokens_RL.shape[1] + 2)
    inside = (size_R1 > 0) & (place_L <= size_R1 + 1)
    tokens = jnp.pad(tokens_RL, ((0, 0), (1, 1)))
    tokens = jnp.where(place_L == 0, cls, jnp.where(place_L == size_R1 + 1, sep, tokens))
    return jnp.where(inside, tokens, pad), inside.astype(jnp.int32)


def text_numbers(tokens_RL: Array) -> Array:
    """Return a number from 0 on, [R] i32, for each row's tokens [R, L]: the same for the same, of 2^31 for others.

    >>> numbers = text_numbers(jnp.array([[4, 7, 8], [4, 8, 7], [4, 7, 8]]))
    >>> bool(numbers[0] == numbers[2]), bool(numbers[0] == numbers[1])
    (True, False)
    """
    factors_L = np.cumprod(np.full(tokens_RL.shape[1], 0x9E3779B1, np.uint32), dtype=np.uint32)
    sums_R = jnp.sum(tokens_RL.astype(jnp.uint32) * factors_L, axis=1, dtype=jnp.uint32)
    return (sums_R >> 1).astype(jnp.int32)
