"""Replaced-token detection: which tokens did a generator write? (ELECTRA, Clark et al. 2020, arXiv:2003.10555)

    loss = mean over selected t of -log q(x[t] | masked x)  +  scale * mean over all t of BCE(D(y)[t], y[t] != x[t])

A small generator q learns masked language modelling; at the selected tokens its own samples are written into the
text, and the discriminator D, the network that is kept, says of every token whether it was replaced. A sample that
hits the original counts as original. No gradient runs through the samples, so one sum trains both networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpt.corruption.compact import compact
from jaxpt.corruption.replace import draw_replacement
from jaxpt.corruption.replace import replace as replace_tokens
from jaxpt.corruption.rows import describe, ordinary_ids, row_keys
from jaxpt.corruption.sampling import draw_nearest, draw_token, hardest, put_tokens
from jaxpt.corruption.selection import FixedCount, Selection
from jaxpt.losses.cross_entropy import linear_cross_entropy, map_logits
from jaxpt.losses.detection import detection_metrics, detection_sums
from jaxpt.losses.token_metrics import ratio, token_metrics, token_sums, token_tables
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import detection_head, mlm_head
from jaxpt.models.patterns import bidirectional
from jaxpt.models.presets import electra, electra_generator
from jaxpt.models.sharing import Embeddings, complete, share
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
    View,
    Vocab,
)

ALIKE = ("max_length", "positions", "position_offset", "token_types", "embedding_norm", "norm", "norm_bias")


@dataclass(frozen=True)
class Sampling:
    """What is written at the selected tokens: ELECTRA's samples by default, or harder ones."""

    temperature: float = 1.0
    """Of the generator's softmax; below 1 its samples are more plausible, 0 takes its best guess."""
    final_temperature: float | None = None
    """Temperature after ``steps`` steps, reached linearly; None keeps ``temperature``."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 = all."""
    disallow_correct: bool = False
    """Never sample the original, so that every selected token is replaced."""
    candidates: int = 1
    """Samples per token, of which the discriminator finds the kept one most original (``hardest``). Each costs one
    forward pass of the discriminator."""
    confusion: float = 0.0
    """Share of the selected tokens that become a neighbour of the original in the discriminator's token table."""
    final_confusion: float | None = None
    """Share after ``steps`` steps, reached linearly; None keeps ``confusion``."""
    neighbours: int = 10
    """How many neighbours, by the cosine, one is drawn from."""
    steps: int = 0
    """Steps to the final values."""

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        for value in (self.temperature, self.final_temperature):
            check(value is None or value >= 0, f"sampling: a temperature cannot be negative, like {value}")
        for value in (self.confusion, self.final_confusion):
            check(value is None or 0 <= value <= 1, f"sampling: confusion is a share in [0, 1], not {value}")
        check(self.top_k >= 0, f"sampling: top_k is a number of tokens, 0 for all, not {self.top_k}")
        check(min(self.candidates, self.neighbours) >= 1, "sampling: candidates and neighbours are 1 or more")
        final = (self.final_temperature, self.final_confusion)
        check(final == (None, None) or self.steps > 0, "sampling: final values need steps, the steps to reach them")


@dataclass(frozen=True)
class ReplacedTokenDetection:
    """Detection of the tokens that a generator has replaced."""

    encoder: TransformerConfig = field(default_factory=lambda: electra("base"))
    """The discriminator, the network that is kept: parameters "trunk"."""
    generator: TransformerConfig = field(default_factory=lambda: electra_generator("base"))
    """The generator. Where embeddings are shared, they have the width of the discriminator's."""
    embeddings: Embeddings = "tied"
    """What the networks share: nothing; all of the embeddings but their projection (ELECTRA); or the generator's
    tables, to which the discriminator adds its own difference and sends no gradient (DeBERTaV3)."""
    packing: Packing = "best_fit"
    """How documents share a row: "concatenate", "best_fit" or "one_document"."""
    rate: float = 0.15
    """Share of the tokens that is selected."""
    selection: Selection = field(default_factory=lambda: FixedCount("nearest", minimum=1, count_special=True))
    """Which tokens: ``Independent``, ``FixedCount``, ``WholeWord`` or ``Spans``."""
    mask: float = 0.85
    """Share of the selected tokens that the generator reads as [MASK]; it reads the rest as it is."""
    sampling: Sampling = field(default_factory=Sampling)
    """What the generator writes."""
    scale: float = 50.0
    """Weight of the discriminator's loss beside the generator's."""
    with_first: bool = False
    """The detection head reads each token with the first one of its document (DeBERTaV3)."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be and missing special tokens."""
        self._check()
        name = "replaced_token_detection"
        mask_id = vocab.require("mask", name)
        rows = RowSpec(self.packing, prefix=(vocab.require("cls", name),), suffix=(vocab.require("sep", name),))
        generator_config = self._generator()
        networks = {
            "trunk": transformer(self.encoder, vocab.size),
            "detector": detection_head(self.encoder, with_first=self.with_first),
            "generator": transformer(generator_config, vocab.size),
            "generator_head": mlm_head(generator_config, vocab.size),
        }
        trunk, detector, generator, generator_head = networks.values()
        networks |= share(trunk, generator, self.embeddings)
        tables, ids_M = token_tables(vocab), ordinary_ids(vocab)
        write = writer(self.sampling, vocab)

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            length = batch.tokens.shape[1]
            for config in (self.encoder, generator_config):
                check_length(config, length, name)
            room = max(1, self.selection.room(self.rate, length))

            def corrupt_row(row_key: Key, tokens_L: Array, segment_ids_L: Array, sentence_ids_L: Array):
                selection_key, mask_key = jax.random.split(row_key)
                row = describe(tokens_L, segment_ids_L, sentence_ids_L, vocab)
                selected_L = self.selection.draw(selection_key, self.rate, row, room)
                decisions = draw_replacement(mask_key, jnp.arange(length), self.mask, 0.0, ids_M)
                positions_K, used_K = compact(selected_L, room)
                return replace_tokens(tokens_L, selected_L, decisions, mask_id), positions_K, used_K

            masked_RL, positions_RK, used_RK = jax.vmap(corrupt_row)(
                row_keys(key, batch.row_ids), batch.tokens, batch.segment_ids, batch.sentence_ids
            )
            inputs = {
                "tokens": batch.tokens,
                "masked": masked_RL,
                "segment_ids": batch.segment_ids,
                "positions": batch.positions,
                "target_positions": positions_RK,
                "used": used_RK,
            }
            weights = {"generator": used_RK, "discriminator": batch.segment_ids > 0}
            return Example(inputs, batch.row_ids, {term: w.astype(jnp.float32) for term, w in weights.items()})

        def generate(snapshot: Snapshot, example: Example, keys: Array) -> tuple[Readout, Array]:
            """What the generator says at the selected positions, and the text with its samples."""
            inputs, params = example.inputs, snapshot.params
            _, generator_params = complete(params)
            generator_keys, sample_keys = streams(keys)[:2]
            pattern = bidirectional(inputs["segment_ids"], inputs["positions"])
            hidden_RLD = generator.apply(
                generator_params, inputs["masked"], pattern, inputs["positions"], keys=generator_keys
            )
            hidden_RKD = at(hidden_RLD, inputs["target_positions"])
            readout = generator_head.apply(params["generator_head"], hidden_RKD, embedding_table(generator_params))
            frozen, silent = jax.lax.stop_gradient((params, readout))
            judge = lambda tokens_RL: detect(frozen, example, tokens_RL, None)  # noqa: E731
            table_VE = embedding_table(complete(frozen)[0])
            return readout, write(snapshot.step, silent, table_VE, inputs, sample_keys, judge)

        def detect(params: Params, example: Example, tokens_RL: Array, keys: Array | None) -> Array:
            inputs = example.inputs
            pattern = bidirectional(inputs["segment_ids"], inputs["positions"])
            hidden_RLD = trunk.apply(complete(params)[0], tokens_RL, pattern, inputs["positions"], keys=keys)
            return detector.apply(params["detector"], hidden_RLD, inputs["positions"])

        def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
            inputs, weights = example.inputs, example.weights
            readout, written_RL = generate(snapshot, example, keys)
            targets_RK = jnp.take_along_axis(inputs["tokens"], inputs["target_positions"], axis=1)
            result = linear_cross_entropy(readout, targets_RK)
            logits_RL = detect(snapshot.params, example, written_RL, streams(keys)[2])
            replaced_RL = (written_RL != inputs["tokens"]).astype(jnp.float32)
            losses = {
                "generator": result.loss,
                "discriminator": optax.sigmoid_binary_cross_entropy(logits_RL, replaced_RL),
            }
            stats = token_sums(result, targets_RK, weights["generator"], tables)
            return Out(losses, stats | detection_sums(logits_RL, replaced_RL, weights["discriminator"]))

        def summary(sums: Sums) -> dict[str, Array]:
            detection = detection_metrics(sums.stats)
            replaced = detection.pop("positive_rate")
            correct = 1 - ratio(jnp.sum(sums.stats["positives"]), sums.stats["tokens"])
            return (
                token_metrics(sums.stats, likelihood=False)
                | detection
                | {
                    "replaced": replaced,
                    "sampled_accuracy": jnp.where(sums.stats["tokens"] > 0, correct, 0),
                }
            )

        def views(snapshot: Snapshot, example: Example) -> dict[str, View]:
            inputs, weights = example.inputs, example.weights
            _, written_RL = generate(snapshot, example, row_keys(jax.random.key(0), example.row_ids))
            targets_RK = jnp.take_along_axis(inputs["tokens"], inputs["target_positions"], axis=1)
            replaced_RL = (written_RL != inputs["tokens"]).astype(jnp.int32)
            told = inputs["segment_ids"], inputs["positions"]
            pattern = bidirectional(*told)
            places = inputs["target_positions"]
            return {
                "generator": View(inputs["masked"], *told, pattern, targets_RK, places, weights["generator"]),
                "discriminator": View(
                    written_RL, *told, pattern, replaced_RL, None, weights["discriminator"], ("original", "replaced")
                ),
            }

        scale = {"generator": 1.0, "discriminator": self.scale}
        return Objective(
            rows, specs_of(networks), initializer_of(networks), corrupt, loss, scale, summary=summary, views=views
        )

    def for_evaluation(self) -> ReplacedTokenDetection:
        """No dropout; plain samples of the generator, so that runs with harder ones compare."""
        return replace(
            self,
            encoder=without_dropout(self.encoder),
            generator=without_dropout(self.generator),
            sampling=Sampling(),
        )

    def _generator(self) -> TransformerConfig:
        return (
            self.generator if self.embeddings == "none" else replace(self.generator, embed_width=self.encoder.embedding)
        )

    def _check(self) -> None:
        name = "replaced_token_detection"
        for share_name in ("rate", "mask"):
            value = getattr(self, share_name)
            check(0 <= value <= 1, f"{name}: {share_name} is a share in [0, 1], not {value}")
        check(self.generator.tie_embeddings, f"{name}: the generator's output is its token table: set tie_embeddings")
        for each in ALIKE if self.embeddings != "none" else ():
            ours, theirs = getattr(self.encoder, each), getattr(self.generator, each)
            check(
                ours == theirs,
                f'{name}: embeddings="{self.embeddings}" needs one {each}, not {ours} in the encoder and {theirs} in '
                f'the generator: make them equal or set embeddings="none"',
            )


# -------------------------------------------------------------------------------------------- sampling


def streams(keys_R: Array) -> Array:
    """Three keys of every row, [3, R]: for the generator's dropout, the samples, the discriminator's dropout."""
    return jax.vmap(jax.random.split, (0, None), 1)(keys_R, 3)


def writer(sampling: Sampling, vocab: Vocab) -> Callable[..., Array]:
    """Return ``write(step, readout, table, inputs, keys, judge) -> tokens [R, L]``: the text with samples in it.

    Special tokens are never sampled, so the discriminator never reads [MASK].
    """
    temperature_at = linear(sampling.temperature, sampling.final_temperature, sampling.steps)
    confusion_at = linear(sampling.confusion, sampling.final_confusion, sampling.steps)
    is_confused = max(sampling.confusion, sampling.final_confusion or 0.0) > 0
    special_V, ids_V = jnp.asarray(vocab.is_special), np.arange(vocab.size)

    def write(
        step: Array,
        readout: Readout,
        table_VE: Array,
        inputs: dict[str, Array],
        keys_R: Array,
        judge: Callable[[Array], Array],
    ) -> Array:
        places_RK = inputs["target_positions"]
        targets_RK = jnp.take_along_axis(inputs["tokens"], places_RK, axis=1)
        slots_RK = jnp.broadcast_to(jnp.arange(places_RK.shape[1]), places_RK.shape)

        def by_generator(key: Key, logits_V: Array, slot: Array, target: Array) -> Array:
            barred_V = special_V | ((ids_V == target) & sampling.disallow_correct)
            logits_V = jnp.where(barred_V, -jnp.inf, logits_V)
            return draw_token(jax.random.fold_in(key, slot), logits_V, temperature_at(step), sampling.top_k)

        def by_table(key: Key, cosines_V: Array, slot: Array, target: Array) -> Array:
            cosines_V = jnp.where(special_V | (ids_V == target), -jnp.inf, cosines_V)
            return draw_nearest(jax.random.fold_in(key, slot), cosines_V, sampling.neighbours)

        def mapped(one: Callable[..., Array], readout: Readout, keys_R: Array) -> Array:
            per_row = jax.vmap(one, (None, 0, 0, 0))
            return map_logits(lambda *args: jax.vmap(per_row)(keys_R, *args), readout, slots_RK, targets_RK)

        def sample(keys_R: Array) -> Array:
            first, second, third = streams(keys_R)
            samples_RK = mapped(by_generator, readout, first)
            if is_confused:
                unit_VE = table_VE / jnp.maximum(jnp.linalg.norm(table_VE, axis=-1, keepdims=True), 1e-9)
                similar_RK = mapped(by_table, Readout(unit_VE[targets_RK], unit_VE), second)
                coins_RK = jax.vmap(lambda key: jax.random.uniform(key, slots_RK.shape[1:]))(third)
                samples_RK = jnp.where(coins_RK < confusion_at(step), similar_RK, samples_RK)
            return samples_RK

        def put(samples_RK: Array) -> Array:
            return jax.vmap(put_tokens)(inputs["tokens"], places_RK, inputs["used"], samples_RK)

        if sampling.candidates == 1:
            return put(sample(keys_R))

        def candidate(number: Array) -> tuple[Array, Array]:
            samples_RK = sample(jax.vmap(jax.random.fold_in, (0, None))(keys_R, number))
            return samples_RK, jnp.take_along_axis(judge(put(samples_RK)), places_RK, axis=1)

        samples_CRK, scores_CRK = jax.lax.map(candidate, jnp.arange(sampling.candidates))
        return put(hardest(samples_CRK, scores_CRK, targets_RK))

    return write
