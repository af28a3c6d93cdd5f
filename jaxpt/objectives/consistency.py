"""Consistency across masked views: predict hidden tokens, and predict them alike whatever else is hidden.

    loss = mean over views v and hidden t of -log p(x[t] | view v)
         + scale * mean over pairs (v, w) and t hidden in both of D(p(. | view v), p(. | view w))[t]

Several views of each row hide the same tokens S and others besides. With ``teacher`` the first side is a moving
average of the network (Tarvainen & Valpola 2017, arXiv:1703.01780); views that hide nothing else differ by dropout
only, which is R-Drop (Liang et al. 2021, arXiv:2106.14448).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp

from jaxpt.corruption.choose import draw_count, draw_ranks
from jaxpt.corruption.compact import compact
from jaxpt.corruption.replace import draw_replacement
from jaxpt.corruption.replace import replace as replace_tokens
from jaxpt.corruption.rows import describe, ordinary_ids, row_keys
from jaxpt.corruption.selection import exact_room
from jaxpt.losses.cross_entropy import linear_cross_entropy
from jaxpt.losses.divergence import Divergence, information, information_sums, linear_divergence
from jaxpt.losses.token_metrics import token_metrics, token_sums, token_tables
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import mlm_head
from jaxpt.models.patterns import bidirectional
from jaxpt.models.presets import bert
from jaxpt.models.transformer import embedding_table, transformer
from jaxpt.objectives.parts import at, check, check_length, initializer_of, linear, specs_of, without_dropout
from jaxpt.types import (
    Array,
    Batch,
    Example,
    Key,
    Objective,
    Out,
    Packing,
    Params,
    Readout,
    RowSpec,
    Snapshot,
    Sums,
    Tree,
    View,
    Vocab,
)


@dataclass(frozen=True)
class MovingAverage:
    """A teacher whose parameters follow those of the network: teacher = decay * teacher + (1 - decay) * network."""

    decay: float = 0.999
    """Share that stays at every step; at the start, where ``final_decay`` is set."""
    final_decay: float | None = None
    """Share after ``steps`` steps, reached linearly; None keeps ``decay``."""
    steps: int = 0
    """Steps from ``decay`` to ``final_decay``."""
    dropout: bool = False
    """Apply dropout to the teacher, too."""

    def __post_init__(self) -> None:
        """Refuse what is no average."""
        for value in (self.decay, self.final_decay):
            check(value is None or 0 <= value <= 1, f"consistency: a decay is a share in [0, 1], not {value}")
        check(
            self.final_decay is None or self.steps > 0,
            "consistency: final_decay needs steps, the number of steps from decay to final_decay",
        )


@dataclass(frozen=True)
class Consistency:
    """Prediction of hidden tokens that agrees across views of a text."""

    encoder: TransformerConfig = field(default_factory=lambda: bert("base"))
    """The Transformer."""
    packing: Packing = "best_fit"
    """How documents share a row: "concatenate", "best_fit" or "one_document"."""
    views: int = 2
    """Views of each row; each is compared with the next one, the last with the first. Each costs a pass."""
    rate: float = 0.3
    """Share of the tokens that each view selects."""
    shared: float = 0.15
    """Share of the tokens that all views select, where predictions are compared; no token outside it is selected
    by two views. The same as ``rate``: views of the same input."""
    mask: float = 0.8
    """Share of the selected tokens that becomes [MASK]."""
    random: float = 0.1
    """Share of the selected tokens that becomes a random ordinary token; the rest stays as it is."""
    divergence: Divergence = "kl"
    """What is small where two predictions agree: "kl" KL(first || second), "symmetric_kl" or "js"."""
    temperature: float = 1.0
    """Of both predictions; the divergence is multiplied by its square."""
    scale: float = 1.0
    """Weight of the divergence."""
    ramp_steps: int = 0
    """Steps over which ``scale`` rises from 0."""
    stop_gradient: Literal["first", "second", "none"] = "first"
    """The side that no gradient reaches; "first" makes it the target of the other."""
    teacher: MovingAverage | None = None
    """What the first side is predicted by; None = the network itself."""
    alarm: float = 0.05
    """Nats of ``information`` under which predictions count as collapsed."""
    alarm_after: int = 2000
    """Steps before which a network need not tell tokens apart."""
    evaluation_rate: float = 0.15
    """Share in evaluation, whatever the share in training, so that runs compare."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be and missing special tokens."""
        self._check()
        rows = RowSpec(
            packing=self.packing,
            prefix=(vocab.require("cls", "consistency"),),
            suffix=(vocab.require("sep", "consistency"),),
        )
        mask_id, ids_M = vocab.require("mask", "consistency"), ordinary_ids(vocab)
        encoder, head = transformer(self.encoder, vocab.size), mlm_head(self.encoder, vocab.size)
        networks = {"trunk": encoder, "head": head}
        tables = token_tables(vocab)
        # both directions of a symmetric divergence without a target are one
        one_way = self.views == 2 and self.divergence != "kl" and self.stop_gradient == "none" and not self.teacher
        pairs = 1 if one_way else self.views

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            length = batch.tokens.shape[1]
            check_length(self.encoder, length, "consistency")
            room, more = max(1, exact_room(self.shared, length)), exact_room(self.rate - self.shared, length)

            def hide_row(row_key: Key, tokens_L: Array, segments_L: Array, sentences_L: Array):
                selection_key, replacement_key = jax.random.split(row_key)
                row = describe(tokens_L, segments_L, sentences_L, vocab)
                bits = jax.random.bits(selection_key, (1 + length,), jnp.uint32)
                size = jnp.sum(row.candidates)
                # the same bits round both, so that shared and extra tokens add up to the rate
                count = jnp.minimum(draw_count(bits[0], self.shared * size, "unbiased"), room)
                extra = jnp.minimum(draw_count(bits[0], self.rate * size, "unbiased") - count, more)
                shared_L, extras_VL = split_views(bits[1:], row.candidates, count, extra, self.views)
                decisions = draw_replacement(replacement_key, jnp.arange(length), self.mask, self.random, ids_M)

                def one(extra_L: Array) -> tuple[dict[str, Array], Array]:
                    places, used = zip(compact(shared_L, room), compact(extra_L, more), strict=True)
                    places_K = jnp.concatenate(places)  # the shared ones first
                    tokens = replace_tokens(tokens_L, shared_L | extra_L, decisions, mask_id)
                    inputs = {"tokens": tokens, "targets": tokens_L[places_K], "target_positions": places_K}
                    return inputs, jnp.concatenate(used)

                return jax.vmap(one)(extras_VL)

            arrays = batch.tokens, batch.segment_ids, batch.sentence_ids
            inputs, used_RVK = jax.vmap(hide_row)(row_keys(key, batch.row_ids), *arrays)
            inputs |= {"segment_ids": batch.segment_ids, "positions": batch.positions}
            weights = {"mlm": used_RVK, "consistency": used_RVK[:, :pairs, :room]}
            return Example(inputs, batch.row_ids, {term: w.astype(jnp.float32) for term, w in weights.items()})

        def predict(params: Params, inputs: dict[str, Array], places_RVK: Array, keys_RV: Array | None) -> Readout:
            """What every view says at these places: hidden [R, V * K, E]."""
            rows, length = inputs["segment_ids"].shape
            segments, positions = (
                jnp.repeat(inputs[name], self.views, axis=0) for name in ("segment_ids", "positions")
            )
            keys = None if keys_RV is None else keys_RV.reshape(-1)
            tokens = inputs["tokens"].reshape(-1, length)
            hidden = encoder.apply(params["trunk"], tokens, bidirectional(segments, positions), positions, keys=keys)
            asked = at(hidden, places_RVK.reshape(-1, places_RVK.shape[-1]))
            return head.apply(
                params["head"], asked.reshape(rows, -1, asked.shape[-1]), embedding_table(params["trunk"])
            )

        def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
            inputs, weights = example.inputs, example.weights
            shape, compared = weights["mlm"].shape, weights["consistency"].shape
            keys_RV = jax.vmap(lambda key: jax.random.split(key, 2 * self.views))(keys)
            readout = predict(snapshot.params, inputs, inputs["target_positions"], keys_RV[:, : self.views])
            targets = inputs["targets"].reshape(shape[0], -1)
            result = linear_cross_entropy(readout, targets)

            def sides(readout: Readout, turn: int) -> Readout:
                hidden_RVKE = readout.hidden.reshape(shape[0], self.views, -1, readout.hidden.shape[-1])
                hidden_RVKE = jnp.roll(hidden_RVKE[:, :, : compared[2]], -turn, axis=1)[:, :pairs]
                return readout._replace(hidden=hidden_RVKE.reshape(shape[0], -1, hidden_RVKE.shape[-1]))

            first, second = sides(readout, 0), sides(readout, 1)
            if self.teacher:
                teacher_keys = keys_RV[:, self.views :] if self.teacher.dropout else None
                places = inputs["target_positions"][..., : compared[2]]
                first = sides(predict(snapshot.carry["teacher"], inputs, places, teacher_keys), 0)
            first = jax.lax.stop_gradient(first) if self.teacher or self.stop_gradient == "first" else first
            second = jax.lax.stop_gradient(second) if self.stop_gradient == "second" else second
            apart = linear_divergence(self.divergence, first, second, self.temperature)
            losses = {"mlm": result.loss.reshape(shape), "consistency": apart.reshape(compared)}
            stats = token_sums(result, targets, weights["mlm"].reshape(targets.shape), tables)
            watched = information_sums(second, weights["consistency"].reshape(shape[0], -1))
            armed = watched["watched"] * (snapshot.step >= self.alarm_after)
            return Out(losses, stats | watched | {"armed": armed})

        def summary(sums: Sums) -> dict[str, Array]:
            told = information(sums.stats)
            collapsed = (sums.stats["armed"] > 0) & (told["information"] < self.alarm)
            alarm = {"alarm/collapse": collapsed.astype(jnp.float32)}
            return token_metrics(sums.stats, likelihood=False) | told | alarm

        def start(params: Params, key: Key) -> Tree:
            return {"teacher": jax.tree.map(jnp.copy, params)}

        def advance(snapshot: Snapshot, features: dict[str, Array], example: Example) -> tuple[Params, Tree]:
            assert self.teacher
            decay = linear(self.teacher.decay, self.teacher.final_decay, self.teacher.steps)(snapshot.step)
            old, new = snapshot.carry["teacher"], snapshot.params
            return new, {"teacher": jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new)}

        def views(snapshot: Snapshot, example: Example) -> dict[str, View]:
            inputs, shown = example.inputs, {}
            told = inputs["segment_ids"], inputs["positions"]
            for v in range(self.views):
                text, targets, places = (inputs[name][:, v] for name in ("tokens", "targets", "target_positions"))
                weights = example.weights["mlm"][:, v]
                shown[f"view_{v + 1}"] = View(text, *told, bidirectional(*told), targets, places, weights)
            return shown

        return Objective(
            rows=rows,
            specs=specs_of(networks),
            init=initializer_of(networks),
            corrupt=corrupt,
            loss=loss,
            scale={
                "mlm": 1.0,
                "consistency": linear(0.0, self.scale, self.ramp_steps) if self.ramp_steps else self.scale,
            },
            start=start if self.teacher else None,
            advance=advance if self.teacher else None,
            summary=summary,
            views=views,
        )

    def for_evaluation(self) -> Consistency:
        """The evaluation rate, no dropout, no schedule, no teacher: how far the network's own views are apart."""
        return replace(
            self,
            encoder=without_dropout(self.encoder),
            rate=self.evaluation_rate,
            shared=min(self.evaluation_rate, self.evaluation_rate * (self.shared / self.rate)),  # whatever the rounding
            ramp_steps=0,
            teacher=None,
        )

    def _check(self) -> None:
        for name in ("rate", "shared", "mask", "random", "evaluation_rate"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"consistency: {name} is a share in [0, 1], not {value}")
        check(self.views >= 2, f"consistency: views is a number of views, at least 2, not {self.views}")
        check(
            0 < self.shared <= self.rate,
            f"consistency: shared is a part of what each view selects, in (0, {self.rate}], not {self.shared}",
        )
        each = self.shared / self.rate
        for name in ("rate", "evaluation_rate"):  # evaluation keeps the proportion of shared and rate
            taken = getattr(self, name) * (each + self.views * (1 - each))
            check(
                taken <= 1 + 1e-6,
                f"consistency: at {name}, {self.views} views take shared + views * ({name} - shared) = {taken:.3g} of "
                f"the tokens: lower {name} or raise shared",
            )
        check(self.mask + self.random <= 1, f"consistency: mask + random = {self.mask + self.random} is more than 1")
        check(self.temperature > 0, f"consistency: temperature must be above 0, not {self.temperature}")
        check(min(self.scale, self.ramp_steps) >= 0, "consistency: scale and ramp_steps cannot be negative")
        check(
            self.teacher is None or self.stop_gradient != "second",
            'consistency: a teacher has no gradient, and with stop_gradient="second" no side has: set it to "first"',
        )


def split_views(bits_L: Array, candidates_L: Array, shared: Array, extra: Array, views: int) -> tuple[Array, Array]:
    """Choose tokens that all views select and, disjoint from them and from each other, the extra ones of each view.

    Args:
      bits_L: [L] u32, random.
      candidates_L: [L] bool.
      shared, extra: [] i32, how many.
      views: V.

    Returns:
      shared_L ([L] bool) and extras_VL ([V, L] bool).

    >>> shared, extras = split_views(jnp.array([5, 1, 4, 2, 3], jnp.uint32), jnp.ones(5, bool), 1, 2, 2)
    >>> shared.astype(int).tolist(), extras.astype(int).tolist()
    ([0, 1, 0, 0, 0], [[0, 0, 0, 1, 1], [1, 0, 1, 0, 0]])
    """
    ranks_L = draw_ranks(bits_L, candidates_L)
    begins_V1 = shared + extra * jnp.arange(views)[:, None]
    extras_VL = candidates_L & (ranks_L >= begins_V1) & (ranks_L < begins_V1 + extra)
    return candidates_L & (ranks_L < shared), extras_VL
