"""Two towers: two texts that belong together have near vectors, made by one network or by two (CLIP, Radford et al.
2021, arXiv:2103.00020; SigLIP, Zhai et al. 2023, arXiv:2303.15343).

    L_ij = s cos(x_i, y_j)                                          s = exp(t) is learned, and so is b

    softmax   loss = mean over pairs i of  -(log softmax_j(L_ij)[i] + log softmax_j(L_ji)[i]) / 2
    sigmoid   loss = mean over pairs i of  -log sigmoid(L_ii + b) - sum over j != i of log sigmoid(-L_ij - b)

All pairs of the global batch are each other's negatives.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import jax.numpy as jnp

from jaxpt.losses.contrastive import in_batch, sigmoid_pairs
from jaxpt.losses.token_metrics import ratio
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import bounded, projection, similarity
from jaxpt.models.presets import bert
from jaxpt.objectives.parts import check, initializer_of, specs_of, without_dropout
from jaxpt.objectives.text_vectors import (
    TextPooling,
    Texts,
    collapse_alarm,
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
from jaxpt.types import Array, Batch, Example, Key, Network, Objective, Out, Params, Snapshot, Sums, Tree, View, Vocab


@dataclass(frozen=True)
class TwoTower:
    """Vectors of paired texts: near each other, and far from those of other pairs."""

    first: TransformerConfig = field(default_factory=lambda: bert("base"))
    """The Transformer that reads first texts."""
    second: TransformerConfig | None = None
    """The one that reads second texts; None = one Transformer reads both."""
    pooling: TextPooling = "mean"
    """What the vector of a text is made of: the state of its "first" token, [CLS], or of the "last", the "mean" of all,
    or "mean_last_two", of the last two layers."""
    projection: int | None = 512
    """Width of the space that both are projected to, without a bias; None = the states themselves."""
    own_projections: bool = False
    """Each side has a projection of its own where one Transformer reads both; two Transformers always have two."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """"softmax": which text is the partner, from both sides (CLIP); "sigmoid": a yes or no for every two (SigLIP)."""
    initial_scale: float = 1 / 0.07
    """s at the start: 1 / 0.07 for CLIP, 10 for SigLIP."""
    initial_bias: float = -10.0
    """b at the start, of "sigmoid" only: best near -ln(batch size - 1), the log-odds of a pair."""
    max_scale: float | None = 100.0
    """To which s is put back after an update beyond it; None = no bound."""
    alarm: float = 0.02
    """``spread`` of the vectors under which they count as collapsed: 1 all over the sphere, 0 all the same."""
    alarm_after: int = 500
    """Steps before which a network need not tell texts apart."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be, and without [CLS] or [SEP]."""
        self._check()
        for name in ("cls", "sep"):
            vocab.require(name, "two_tower")
        configs = (self.first, self.second or self.first)
        encoders = [text_encoder(config, vocab, self.pooling, mlp=False) for config in configs]
        trunks = ("trunk", "second_trunk" if self.second else "trunk")
        apart = self.second is not None or self.own_projections
        projections = ("projection", "second_projection" if apart else "projection")
        networks: dict[str, Network] = dict(
            zip(trunks, (encoder.networks["trunk"] for encoder in encoders), strict=True)
        )
        if self.projection:
            made = (projection(config, self.projection) for config in configs)
            networks |= dict(zip(projections, made, strict=True))
        networks["similarity"] = similarity(self.initial_scale, self.initial_bias if self.loss == "sigmoid" else None)

        def encode(params: Params, side: int, texts: Texts, keys: Array | None = None) -> Array:
            vectors = encoders[side]({"trunk": params[trunks[side]]}, texts, keys)
            name = projections[side]
            return networks[name].apply(params[name], vectors) if self.projection else vectors

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            texts, cut_R = read_texts(batch, 2, batch.tokens.shape[1] // 2 + 2, vocab)
            inputs = {**texts._asdict(), "text_numbers": text_numbers(texts.tokens), "cut": cut_R}
            return Example(inputs, batch.row_ids, {"contrastive": texts.present.min(axis=1)})

        def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
            keys_R2, sides = split_keys(keys, 2), []
            for side in range(2):
                texts = Texts(*(example.inputs[name][:, side] for name in Texts._fields))
                sides.append(encode(snapshot.params, side, texts, keys_R2[:, side]))
            return Out({}, features={"vectors": jnp.stack(sides, axis=1)})

        def couple(snapshot: Snapshot, features: dict[str, Array], example: Example):
            first_RE, second_RE = (constrain_rows(features["vectors"][:, side]) for side in range(2))
            weights_R, inputs = example.weights["contrastive"], example.inputs
            check(len(weights_R) > 1, "two_tower: a batch of one pair has no negatives: raise batch_size")
            scale, bias = networks["similarity"].apply(snapshot.params["similarity"])
            told = {"texts_R": inputs["text_numbers"], "valid_R": weights_R}
            if self.loss == "softmax":
                made = in_batch(first_RE, second_RE, "symmetric", scale=scale, **told)
            else:
                made = sigmoid_pairs(first_RE, second_RE, scale=scale, bias=bias, **told)
            pairs = weights_R.sum()
            stats = vector_sums(first_RE, weights_R) | pair_sums(first_RE, second_RE, made, weights_R)
            stats |= {f"second_{name}": value for name, value in vector_sums(second_RE, weights_R).items()}
            stats |= {
                "temperature": pairs / scale,
                "texts_cut": jnp.sum(weights_R * inputs["cut"]),
                "armed": pairs * (snapshot.step >= self.alarm_after),
            } | ({} if bias is None else {"bias": pairs * bias})
            return {"contrastive": made.loss}, stats

        def advance(snapshot: Snapshot, features: dict[str, Array], example: Example) -> tuple[Params, Tree]:
            # a bound within the forward pass would stop the gradient of what has reached it
            params = snapshot.params
            assert self.max_scale is not None
            return params | {"similarity": bounded(params["similarity"], self.max_scale)}, snapshot.carry

        def summary(sums: Sums) -> dict[str, Array]:
            of = sums.stats
            second = {name.removeprefix("second_"): value for name, value in of.items() if name.startswith("second_")}
            sides = [vector_metrics(of), vector_metrics(second)]
            alarms = [collapse_alarm(told, of["armed"], self.alarm)["alarm/collapse"] for told in sides]
            told = sides[0] | {f"second_{name}": value for name, value in sides[1].items()} | pair_metrics(of)
            told |= {name: ratio(of[name], of["pairs"]) for name in ("temperature", "bias") if name in of}
            return told | {"cut_texts": ratio(of["texts_cut"], 2 * of["pairs"]), "alarm/collapse": jnp.maximum(*alarms)}

        def views(snapshot: Snapshot, example: Example) -> dict[str, View]:
            return {
                name: Texts(*(example.inputs[part][:, side] for part in Texts._fields)).view()
                for side, name in enumerate(("first", "second"))
            }

        def embed(snapshot: Snapshot, batch: Batch, text: int) -> Array:
            check(text in (0, 1), f"two_tower: an example has texts 0 and 1, not {text}: set --text to one of them")
            texts, _ = read_texts(batch, 1, batch.tokens.shape[1] + 2, vocab)
            return encode(snapshot.params, text, texts)[:, 0]

        return Objective(
            rows=rows_of_texts(2),
            specs=specs_of(networks),
            init=initializer_of(networks),
            corrupt=corrupt,
            loss=loss,
            scale={"contrastive": 1.0},
            couple=couple,
            advance=advance if self.max_scale else None,
            summary=summary,
            views=views,
            embed=embed,
        )

    def for_evaluation(self) -> TwoTower:
        """No dropout."""
        second = without_dropout(self.second) if self.second else None
        return replace(self, first=without_dropout(self.first), second=second)

    def _check(self) -> None:
        check(self.initial_scale > 0, f"two_tower: initial_scale must be above 0, not {self.initial_scale}")
        check(
            self.max_scale is None or self.max_scale >= self.initial_scale,
            f"two_tower: max_scale {self.max_scale} is below initial_scale {self.initial_scale}",
        )
        check(self.projection is None or self.projection > 0, "two_tower: projection is a width, or None")
        check(
            self.projection is not None or self.second is None or self.second.width == self.first.width,
            "two_tower: networks of different widths need a projection into one space",
        )
