"""Masked diffusion: hide any share of a text and predict it (MDLM, Sahoo et al. 2024, arXiv:2406.07524; LLaDA, 2025).

    loss = mean over all tokens i of  E[w(t) [i hidden] -log p(x[i] | what is left)]  >=  -log p(x) per token

A share t ~ U(0, 1) of each row becomes [MASK] and w(t) = 1/t, so that the loss bounds the negative log-likelihood of
the text: it equals that of an autoregressive model averaged over all orders of writing. A network learns to fill in
any number of gaps, and so to write. With ``block`` it writes from left to right by blocks, each by diffusion
(Arriola et al. 2025, arXiv:2503.09573): the row is read twice, [noisy ; clean].
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from jaxpt.corruption.choose import ranks_within, uniform
from jaxpt.corruption.rows import row_keys, starts_of, unit_ids
from jaxpt.losses.cross_entropy import linear_cross_entropy
from jaxpt.losses.token_metrics import ratio, token_metrics, token_sums, token_tables
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import lm_head
from jaxpt.models.patterns import bidirectional, block_diffusion
from jaxpt.models.presets import gpt2
from jaxpt.models.transformer import embedding_table, transformer
from jaxpt.objectives.parts import check, check_length, initializer_of, specs_of, without_dropout
from jaxpt.types import Array, Batch, Example, Key, Objective, Out, Packing, RowSpec, Snapshot, Sums, View, Vocab

Noise: TypeAlias = Literal["mdlm", "llada", "fixed_count"]

GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: multiples of it, mod 2**32, are spread as evenly as any can be


@dataclass(frozen=True)
class MaskedDiffusion:
    """Prediction of a hidden part of the text, of any size."""

    encoder: TransformerConfig = field(default_factory=lambda: gpt2("small"))
    """The Transformer; it is not told how much is hidden."""
    packing: Packing = "concatenate"
    """How documents share a row: "concatenate", "best_fit" or "one_document"."""
    bos: bool = False
    """Put [BOS] before each document (it is read, never hidden)."""
    noise: Noise = "mdlm"
    """What is hidden at t: each token with probability (1 - floor) t, weight 1/t ("mdlm"); with probability t, weight
    1/t ("llada"); or exactly k of n tokens, k uniform on 1 .. n, weight n/k ("fixed_count", of the least variance)."""
    floor: float = 1e-3
    """The least t, so that no weight is beyond 1 / floor ("mdlm", "llada")."""
    predict_mask: bool = False
    """Let the network give probability to [MASK], as LLaDA's does; otherwise its logit is -inf."""
    short_rate: float = 0.0
    """Share of the rows that are cut to a length uniform on 1 .. L (LLaDA: 0.01)."""
    block: int | None = None
    """Tokens of a block that is written at once, after all blocks before it; None = the whole text."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be and missing special tokens."""
        name = "masked_diffusion"
        check(0 < self.floor < 1, f"{name}: floor is a share in (0, 1), not {self.floor}")
        check(0 <= self.short_rate <= 1, f"{name}: short_rate is a share in [0, 1], not {self.short_rate}")
        check(self.block is None or self.block >= 1, f"{name}: block is a number of tokens, not {self.block}")
        mask_id = vocab.require("mask", name)
        rows = RowSpec(
            packing=self.packing,
            prefix=(vocab.require("bos", f"{name} with bos=True"),) if self.bos else (),
            suffix=(vocab.require("eos", name),),
        )
        given = jnp.array([-1 if token is None else token for token in (vocab.bos, vocab.cls, mask_id)])
        barred_V = jnp.zeros(vocab.size).at[mask_id].set(0.0 if self.predict_mask else -jnp.inf)
        encoder, head = transformer(self.encoder, vocab.size), lm_head(self.encoder, vocab.size)
        networks = {"trunk": encoder, "head": head}
        tables = token_tables(vocab)

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            length = batch.tokens.shape[1]
            check_length(self.encoder, length * (1 if self.block is None else 2), name)
            times_key, rows_key = jax.random.split(key)
            shift = jax.random.bits(times_key, (), jnp.uint32)

            def hide_row(row_key: Key, row_id: Array, tokens_L: Array, segments_L: Array, positions_L: Array):
                cut_bits_L, bits_L = jax.random.bits(row_key, (2, length), jnp.uint32)
                segments_L = cut(cut_bits_L, segments_L, self.short_rate)
                hideable_L = (segments_L > 0) & ~jnp.isin(tokens_L, given)
                starts_L, parts = jnp.arange(length) == 0, 1
                if self.block is not None:
                    starts_L = starts_of(segments_L) | (positions_L % self.block == 0)
                    parts = length  # blocks begin anew in each document, so that a row may have this many
                units_L = unit_ids(starts_L)
                times_L = even_times(shift, row_id * parts + units_L.astype(jnp.uint32))
                weights_L = hide(self.noise, self.floor, bits_L, times_L, starts_L, hideable_L)
                inputs = {
                    "tokens": jnp.where(weights_L > 0, mask_id, tokens_L),
                    "segment_ids": segments_L,
                    "targets": jnp.where(hideable_L, tokens_L, vocab.pad),
                    "hideable": hideable_L,
                }
                return inputs, weights_L, jnp.sum(hideable_L, dtype=jnp.float32)

            arrays = batch.row_ids, batch.tokens, batch.segment_ids, batch.positions
            inputs, weights_RL, counts_R = jax.vmap(hide_row)(row_keys(rows_key, batch.row_ids), *arrays)
            inputs |= {"positions": batch.positions} | ({} if self.block is None else {"clean": batch.tokens})
            return Example(inputs, batch.row_ids, {"diffusion": weights_RL}, {"diffusion": counts_R})

        def read(inputs: dict[str, Array]) -> View:
            tokens, segments, positions = inputs["tokens"], inputs["segment_ids"], inputs["positions"]
            if self.block is None:
                return View(tokens, segments, positions, bidirectional(segments, positions))
            pattern = block_diffusion(segments, positions, self.block)
            both = jnp.concatenate([tokens, inputs["clean"]], axis=1)
            return View(both, pattern.query_segments, pattern.query_positions, pattern)

        def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
            inputs, params = example.inputs, snapshot.params
            text, targets_RL = read(inputs), inputs["targets"]
            hidden_RLD = encoder.apply(params["trunk"], text.tokens, text.pattern, text.positions, keys=keys)
            readout = head.apply(params["head"], hidden_RLD[:, : targets_RL.shape[1]], embedding_table(params["trunk"]))
            readout = readout._replace(bias=barred_V if readout.bias is None else readout.bias + barred_V)
            result = linear_cross_entropy(readout, targets_RL)
            weights_RL, counts_R = example.weights["diffusion"], example.counts["diffusion"]
            counted_RL = inputs["hideable"] * (counts_R > 0)[:, None]  # filler rows have count 0
            hidden_RL = (weights_RL > 0).astype(jnp.float32)
            stats = token_sums(result, targets_RL, counted_RL.astype(jnp.float32), tables) | {
                "nll": jnp.sum(result.nll * weights_RL),
                "correct": jnp.sum(result.correct * hidden_RL),
                "hidden": jnp.sum(hidden_RL),
            }
            return Out({"diffusion": result.loss}, stats)

        def summary(sums: Sums) -> dict[str, Array]:
            stats = sums.stats
            of_hidden = {"accuracy": ratio(stats["correct"], stats["hidden"])}
            return (
                token_metrics(stats, likelihood=True) | of_hidden | {"hidden": ratio(stats["hidden"], stats["tokens"])}
            )

        def views(snapshot: Snapshot, example: Example) -> dict[str, View]:
            text, targets = read(example.inputs), example.inputs["targets"]
            return {"text": text._replace(targets=targets, weights=example.weights["diffusion"])}

        init = initializer_of(networks)
        scale = {"diffusion": 1.0}
        return Objective(rows, specs_of(networks), init, corrupt, loss, scale, summary=summary, views=views)

    def for_evaluation(self) -> MaskedDiffusion:
        """No dropout, no short rows, and the noise of the least variance: the same bound, whatever the training's."""
        return replace(self, encoder=without_dropout(self.encoder), noise="fixed_count", short_rate=0.0)


def even_times(shift: Array, numbers: Array) -> Array:
    """Return times in [0, 1), each uniform and all together spread evenly: (shift + number / golden ratio) mod 1.

    So the batch holds every amount of noise at every step, and a row's time depends on its number alone, not on how
    many others there are. (MDLM's (u + i) / B does; of any N numbers in a row none here is 2 / N from the next.)

    Args:
      shift: [] u32, random, one per step.
      numbers: [...] u32.

    >>> even_times(jnp.uint32(0), jnp.arange(4, dtype=jnp.uint32)).tolist()  # doctest: +ELLIPSIS
    [0.0, 0.61803..., 0.23606..., 0.85410...]
    """
    return uniform(shift + numbers.astype(jnp.uint32) * jnp.uint32(GOLDEN))


def cut(bits_L: Array, segments_L: Array, rate: float) -> Array:
    """Turn what stands behind a random place into padding, in a share ``rate`` of the rows.

    Args:
      bits_L: [L] u32, random.
      segments_L: [L] i32.
      rate: of the rows.
    """
    if rate == 0:
        return segments_L
    length = segments_L.shape[0]
    kept = jnp.where(uniform(bits_L[0]) < rate, 1 + bits_L[1] % length, length)
    return jnp.where(jnp.arange(length) < kept, segments_L, 0)


def hide(noise: Noise, floor: float, bits_L: Array, times_L: Array, starts_L: Array, hideable_L: Array) -> Array:
    """Choose what is hidden of each unit (a row, or a block of it) and return the weights: [L] f32, 0 where it stays.

    Args:
      noise, floor: see ``MaskedDiffusion``.
      bits_L: [L] u32, random.
      times_L: [L] f32 in [0, 1), the same within a unit.
      starts_L: [L] bool, the first token of every unit.
      hideable_L: [L] bool.

    >>> bits, starts = jnp.array([3, 1, 2, 9, 0], jnp.uint32), jnp.array([True, False, False, True, False])
    >>> hide("fixed_count", 1e-3, bits, jnp.array([0.5, 0.5, 0.5, 0.2, 0.2]), starts, jnp.arange(5) < 4).tolist()
    [0.0, 1.5, 1.5, 1.0, 0.0]
    """
    if noise == "fixed_count":
        units_L = unit_ids(starts_L)
        sizes_L = jnp.zeros_like(units_L).at[units_L].add(hideable_L.astype(jnp.int32))[units_L]
        counts_L = jnp.minimum(1 + jnp.floor(times_L * sizes_L).astype(jnp.int32), sizes_L)
        hidden_L = hideable_L & (ranks_within(bits_L, hideable_L, units_L) < counts_L)
        weights_L = sizes_L / jnp.maximum(counts_L, 1)
    else:
        times_L = floor + (1 - floor) * times_L
        hidden_L = hideable_L & (uniform(bits_L) < (times_L if noise == "llada" else (1 - floor) * times_L))
        weights_L = 1 / times_L
    return jnp.where(hidden_L, weights_L, 0.0)
