"""Contrastive learning from damaged texts: a text is like a damaged copy of itself and unlike random other texts.

    loss = mean over texts x of -log ( exp(s(x, x+)) / (exp(s(x, x+)) + sum over k of exp(s(x, x-[k]))) )

with s(x, y) = cos(f(x), f(y)) / tau and f the vector of a text. x+ is x with some tokens left out, replaced or put in;
x-[1] .. x-[K] are drawn at random from the other documents of the global batch, anew for every x. They are damaged as
x+ is: of undamaged negatives the damage alone would tell x+, and InfoNCE asks that negatives come from the law of the
positives (van den Oord et al. 2018, arXiv:1807.03748). So they are the x+ of other rows, whose vectors are there, and
no anchor is a negative.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from jaxpt.corruption.choose import uniform
from jaxpt.corruption.edits import Damage, apply_edits
from jaxpt.corruption.rows import describe, row_keys
from jaxpt.losses.contrastive import Contrast, in_batch, info_nce, normalize
from jaxpt.losses.token_metrics import ratio
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import Pooling
from jaxpt.models.presets import bert
from jaxpt.objectives.parts import check, initializer_of, specs_of, without_dropout
from jaxpt.objectives.text_vectors import (
    Texts,
    collapse_alarm,
    document_of,
    embedder,
    enclose,
    pair_metrics,
    pair_sums,
    rows_of_texts,
    split_keys,
    text_encoder,
    text_numbers,
    vector_metrics,
    vector_sums,
)
from jaxpt.sharding import constrain_rows
from jaxpt.types import Array, Batch, Example, Key, Objective, Out, Snapshot, Sums, View, Vocab


@dataclass(frozen=True)
class ContrastiveLM:
    """Vectors of texts that survive damage; the damage is that of easy data augmentation (arXiv:1901.11196)."""

    encoder: TransformerConfig = field(default_factory=lambda: bert("base"))
    """The Transformer."""
    pooling: Pooling = "mean"
    """What the vector of a text is made of: the "mean" of its states, or the state of the "first" or "last" token."""
    negatives: int | None = 8
    """K, the random other texts of the batch that each text is told from; None = all of them."""
    temperature: float = 0.05
    """tau, by which cosines are divided."""
    damage: Damage = field(default_factory=Damage)
    """What a text and its positive differ by."""
    alarm: float = 0.02
    """``spread`` of the vectors under which they count as collapsed: 1 all over the sphere, 0 all the same."""
    alarm_after: int = 500
    """Steps before which a network need not tell texts apart."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be, and without [CLS] or [SEP]."""
        self._check()
        cls, sep = (vocab.require(name, "contrastive_lm") for name in ("cls", "sep"))
        encoder = text_encoder(self.encoder, vocab, self.pooling, mlp=False)

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            whole = document_of(batch)
            edit_keys, pick_keys = (row_keys(jax.random.fold_in(key, i), batch.row_ids) for i in range(2))

            def damage(row_key: Key, tokens_L: Array, segment_ids_L: Array) -> Texts:
                row = describe(tokens_L, segment_ids_L, jnp.zeros_like(tokens_L), vocab)
                return Texts(*apply_edits(tokens_L, self.damage.draw(row_key, row, vocab), vocab.pad))

            damaged = jax.vmap(damage)(edit_keys, *whole)
            both = jax.tree.map(lambda *sides: jnp.stack(sides, axis=1), whole, damaged)
            texts = enclose(both, cls, sep, vocab.pad)
            inputs = {**texts._asdict(), "text_numbers": text_numbers(whole.tokens)}
            if self.negatives is not None:
                others = jnp.sum(whole.present * batch.valid).astype(jnp.int32) - 1
                inputs["steps"] = jax.vmap(draw_steps, (0, None, None))(pick_keys, others, self.negatives)
            return Example(inputs, batch.row_ids, {"contrastive": whole.present})

        def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
            texts = Texts(*(example.inputs[name] for name in Texts._fields))
            vectors_R2E = encoder(snapshot.params, texts, split_keys(keys, 2))
            changed_R = jnp.any(texts.tokens[:, 0] != texts.tokens[:, 1], axis=-1)
            return Out({}, {"changed": example.weights["contrastive"] @ changed_R}, {"vectors": vectors_R2E})

        def couple(snapshot: Snapshot, features: dict[str, Array], example: Example):
            first_RE, second_RE = (constrain_rows(features["vectors"][:, view]) for view in range(2))
            check(first_RE.shape[0] > 1, "contrastive_lm: a batch of one text has no negatives: raise batch_size")
            weights_R, numbers_R = example.weights["contrastive"], example.inputs["text_numbers"]
            scale = 1 / self.temperature
            if self.negatives is None:
                made = in_batch(first_RE, second_RE, scale=scale, texts_R=numbers_R, valid_R=weights_R)
            else:
                picked_RK, is_other_RK = walk(example.row_ids, weights_R, example.inputs["steps"])
                anchors_RE, units_RE = normalize(first_RE), normalize(second_RE)  # before each is read K + 1 times

                def tell(row: Array, picked_K: Array, is_other_K: Array) -> Contrast:
                    candidates = units_RE[jnp.append(row, picked_K)]
                    counted = is_other_K & (numbers_R[picked_K] != numbers_R[row])  # a copy of the text is no other one
                    valid, first = jnp.append(True, counted), jnp.zeros(1, int)
                    return info_nce(
                        anchors_RE[row][None], candidates, first, scale=scale, similarity="dot", valid_K=valid
                    )

                made = jax.vmap(tell)(jnp.arange(len(first_RE)), picked_RK, is_other_RK)
                made = jax.tree.map(lambda leaf: leaf[:, 0], made)
            stats = vector_sums(first_RE, weights_R) | pair_sums(first_RE, second_RE, made, weights_R)
            stats["armed"] = weights_R.sum() * (snapshot.step >= self.alarm_after)
            return {"contrastive": made.loss}, stats

        def summary(sums: Sums) -> dict[str, Array]:
            of = sums.stats
            told = vector_metrics(of) | pair_metrics(of) | {"changed": ratio(of["changed"], of["pairs"])}
            return told | collapse_alarm(told, of["armed"], self.alarm)

        def views(snapshot: Snapshot, example: Example) -> dict[str, View]:
            sides = (Texts(*(example.inputs[name][:, side] for name in Texts._fields)) for side in range(2))
            return dict(zip(("text", "positive"), (texts.view() for texts in sides), strict=True))

        return Objective(
            rows=rows_of_texts(1),
            specs=specs_of(encoder.networks),
            init=initializer_of(encoder.networks),
            corrupt=corrupt,
            loss=loss,
            scale={"contrastive": 1.0},
            couple=couple,
            summary=summary,
            views=views,
            embed=embedder(encoder, vocab),
        )

    def for_evaluation(self) -> ContrastiveLM:
        """No dropout; the same damage and the same number of negatives."""
        return replace(self, encoder=without_dropout(self.encoder))

    def _check(self) -> None:
        check(self.temperature > 0, f"contrastive_lm: temperature must be above 0, not {self.temperature}")
        check(self.negatives is None or self.negatives > 0, f"contrastive_lm: {self.negatives} negatives teach nothing")


# ------------------------------------------------------------------------------------- the negatives


def draw_steps(key: Key, others: Array, count: int) -> Array:
    """Draw different numbers of 1 .. others, every set of them equally likely (Floyd; Bentley 1987).

    Args:
      key: a key.
      others: [] i32, may be 0 or less.
      count: how many, K.

    Returns:
      [K] i32; 0 where there are fewer than K.
    """
    bits_K = jax.random.bits(key, (count,), jnp.uint32)

    def draw(index: Array, drawn_K: Array) -> Array:
        last = others - count + 1 + index
        number = 1 + (uniform(bits_K[index]) * last).astype(jnp.int32)
        number = jnp.where(jnp.any(drawn_K == number), last, number)
        return drawn_K.at[index].set(jnp.where(last > 0, number, 0))

    return jax.lax.fori_loop(0, count, draw, jnp.zeros(count, jnp.int32))


def walk(row_ids_R: Array, weights_R: Array, steps_RK: Array) -> tuple[Array, Array]:
    """Go some steps from each row with a text to others, by the order of their ids and around its end.

    Args:
      row_ids_R: [R] u32.
      weights_R: [R] f32, 0 = a row without a text.
      steps_RK: [R, K] i32, of ``draw_steps``.

    Returns:
      where one arrives ([R, K] i32) and whether that is another row ([R, K] bool).

    >>> steps = jnp.array([[1, 0], [1, 2], [0, 0], [2, 3]])
    >>> rows, others = walk(jnp.array([7, 5, 6, 4]), jnp.array([1, 1, 0, 1]), steps)
    >>> rows.tolist(), others.astype(int).tolist()
    ([[3, 0], [0, 3], [3, 3], [0, 3]], [[1, 0], [1, 1], [0, 0], [1, 0]])
    """
    count = jnp.sum(weights_R > 0)
    order_R = jnp.lexsort((row_ids_R, weights_R == 0))
    place_R = jnp.argsort(order_R)
    rows_RK = order_R[(place_R[:, None] + steps_RK) % jnp.maximum(count, 1)]
    return rows_RK, (steps_RK > 0) & (steps_RK < count)
