"""Blank infilling: write what was taken out of a text, span by span (GLM, Du et al. 2022, arXiv:2103.10360).

    part A = the text with [MASK] for each span;    part B = for each span, in random order, [START] span
    loss = mean over the tokens of all spans and their [END] of -log p(x[t] | part A, the spans before, x[..t-1])

One stack reads both parts: A sees itself from both sides and never B, B sees A and what stands before it in B. A token
has two positions: where it, or the [MASK] of its span, stands in A; and 0 in A, 1, 2, ... inside a span. The
tokenizer's first sentinels are [START], [END] and, for the other two kinds of rows, [sMASK] and [gMASK].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.corruption.choose import draw_count, draw_ranks, draw_units, uniform
from jaxpt.corruption.compact import compact
from jaxpt.corruption.denoise import poisson_law
from jaxpt.corruption.pieces import lay
from jaxpt.corruption.rows import Row, describe, row_keys, starts_of, unit_ids
from jaxpt.corruption.selection import Spans
from jaxpt.losses.cross_entropy import linear_cross_entropy
from jaxpt.losses.token_metrics import token_metrics, token_sums, token_tables
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import lm_head
from jaxpt.models.patterns import prefix
from jaxpt.models.presets import glm
from jaxpt.models.transformer import embedding_table, transformer
from jaxpt.objectives.infilling import require_sentinels
from jaxpt.objectives.parts import at, check, check_length, initializer_of, specs_of, without_dropout
from jaxpt.types import Array, Batch, Example, Key, Objective, Out, Packing, RowSpec, Snapshot, Sums, View, Vocab


@dataclass(frozen=True)
class BlankInfilling:
    """Autoregressive prediction of the spans that are missing in a text."""

    decoder: TransformerConfig = field(default_factory=lambda: glm("base"))
    """The Transformer; its ``token_types`` are the rows of the second table of positions, 0 = none."""
    packing: Packing = "concatenate"
    """How documents share a row."""
    rate: float = 0.15
    """Share of the tokens that is taken out, in rows with blanks and rows without some sentences."""
    mean: float = 3.0
    """Of the Poisson law of the lengths of blanks, before the length 0 is left out."""
    sentences: float = 0.0
    """Share of the rows that lose whole sentences, [sMASK]."""
    generation: float = 0.0
    """Share of the rows that lose the end of each document, [gMASK]. The rest of the rows have blanks."""
    shortest_end: float = 0.25
    """An end has at least this share of its document, each length equally likely."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be and missing special tokens."""
        self._check()
        start, end, *others = require_sentinels(vocab, 4 if self.sentences or self.generation else 2, "blank_infilling")
        masks = vocab.require("mask", "blank_infilling"), *others
        around = vocab.require("cls", "blank_infilling"), vocab.require("eos", "blank_infilling")
        decoder, head = transformer(self.decoder, vocab.size), lm_head(self.decoder, vocab.size)
        networks, tables = {"trunk": decoder, "head": head}, token_tables(vocab)

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            width = batch.tokens.shape[1]
            spans, length = self._spans(width), self._length(width)
            check_length(self.decoder, length, "blank_infilling")
            only_blanks = not (self.sentences or self.generation)
            longest = min(width, len(self._blanks.law)) if only_blanks else width
            room = spans + (self._blanks.room(self.rate, width) if only_blanks else width)
            types = self.decoder.token_types
            check(
                types == 0 or types > longest + 1,
                f"blank_infilling: the decoder has a table of {types} positions inside spans, and spans of up to "
                f"{longest} tokens need {longest + 2}: raise token_types, or set it to 0 for no such table",
            )

            def draw_row(row_key: Key, tokens_L: Array, segments_L: Array, sentences_L: Array) -> Infilled:
                row = describe(tokens_L, segments_L, sentences_L, vocab)
                kind, gaps = draw_gaps(self, row_key, row, segments_L, sentences_L, spans)
                return rearrange(tokens_L, segments_L, gaps, (jnp.array(masks)[kind], start, end, vocab.pad), length)

            arrays = batch.tokens, batch.segment_ids, batch.sentence_ids
            made = jax.vmap(draw_row)(row_keys(key, batch.row_ids), *arrays)
            places_RK, used_RK = jax.vmap(lambda asked_J: compact(asked_J, room))(made.asked)
            inputs = {
                "tokens": made.tokens,
                "segment_ids": made.segment_ids,
                "positions": made.positions,
                "inner_positions": made.inner_positions,
                "pattern": prefix(made.segment_ids, made.positions, ~made.asked),
                "targets": jnp.take_along_axis(made.targets, places_RK, axis=1),
                "target_positions": places_RK,
            }
            return Example(inputs, batch.row_ids, weights={"lm": used_RK.astype(jnp.float32)})

        def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
            inputs, params = example.inputs, snapshot.params
            arrays = inputs["tokens"], inputs["pattern"], inputs["positions"]
            inner = {"token_types": inputs["inner_positions"]} if self.decoder.token_types else {}
            hidden_RJD = decoder.apply(params["trunk"], *arrays, keys=keys, **inner)
            hidden_RKD = at(hidden_RJD, inputs["target_positions"])
            readout = head.apply(params["head"], hidden_RKD, embedding_table(params["trunk"]))
            result = linear_cross_entropy(readout, inputs["targets"])
            return Out({"lm": result.loss}, token_sums(result, inputs["targets"], example.weights["lm"], tables))

        def summary(sums: Sums) -> dict[str, Array]:
            return token_metrics(sums.stats, likelihood=False)

        def views(snapshot: Snapshot, example: Example) -> dict[str, View]:
            names = "tokens", "segment_ids", "positions", "pattern", "targets", "target_positions"
            return {"decoder": View(*(example.inputs[name] for name in names), weights=example.weights["lm"])}

        return Objective(
            rows=RowSpec(self.packing, prefix=around[:1], suffix=around[1:], raw_length=self._raw_length),
            specs=specs_of(networks),
            init=initializer_of(networks),
            corrupt=corrupt,
            loss=loss,
            scale={"lm": 1.0},
            summary=summary,
            views=views,
        )

    def for_evaluation(self) -> BlankInfilling:
        """No dropout; the kinds of rows as in training."""
        return replace(self, decoder=without_dropout(self.decoder))

    @property
    def _blanks(self) -> Spans:
        return Spans(lengths=tuple(poisson_law(self.mean)[1:].tolist()))

    def _spans(self, width: int) -> int:
        """The most spans of a row of ``width`` raw tokens: one and three deviations above the mean of blanks."""
        law = self._blanks.law
        lengths = 1 + np.arange(len(law))
        mean = law @ lengths
        count = self.rate * width / mean
        return math.ceil(count + 3 * math.sqrt(count * (law @ lengths**2 - mean**2)) / mean) + 1

    def _length(self, width: int) -> int:
        """Slots of a row of ``width`` raw tokens, in eights; every span takes two."""
        return -(-(width + 2 * self._spans(width)) // 8) * 8

    def _raw_length(self, length: int) -> int:
        widths = [width for width in range(1, length) if self._length(width) <= length]
        check(bool(widths), f"blank_infilling: rows of {length} tokens hold no text: lengthen them (--seq-len)")
        return widths[-1]

    def _check(self) -> None:
        check(self.mean > 0, f"blank_infilling: mean is a length of blanks, above 0, not {self.mean}")
        for name in ("rate", "sentences", "generation", "shortest_end"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"blank_infilling: {name} is a share in [0, 1], not {value}")
        check(
            self.rate > 0 or not self.generation,
            "blank_infilling: rate also sets how many ends a row has room for, so with generation it is above 0",
        )
        check(
            self.sentences + self.generation <= 1,
            f"blank_infilling: sentences + generation = {self.sentences + self.generation} is more than 1",
        )


class Gaps(NamedTuple):
    """What is taken out of a row, and in which order it is written."""

    taken: Array  # [L] bool
    first: Array  # [L] bool: the first token of a span
    order: Array  # [S] i32: the place of each span in part B, a permutation


class Infilled(NamedTuple):
    """A row of both parts, and the padding behind them."""

    tokens: Array  # [J] i32
    targets: Array  # [J] i32, of no meaning where nothing is asked
    segment_ids: Array  # [J] i32
    positions: Array  # [J] i32: in part A; of a token of a span, where its [MASK] stands
    inner_positions: Array  # [J] i32: 0 in part A, 1, 2, ... in a span
    asked: Array  # [J] bool: part B


def draw_gaps(
    config: BlankInfilling, key: Key, row: Row, segment_ids_L: Array, sentence_ids_L: Array, spans: int
) -> tuple[Array, Gaps]:
    """Draw the kind of a row ([] i32: 0 blanks, 1 sentences, 2 ends) and what is taken out of it.

    Args:
      config: shares and laws.
      key: of the row.
      row: its candidates; what is none, as [UNK], stays in the text and ends a span.
      segment_ids_L, sentence_ids_L: [L] i32.
      spans: the most spans, S; the last ones stay in the text where there are more.
    """
    length = segment_ids_L.shape[0]
    blanks_key, bits_key = jax.random.split(key)
    bits = jax.random.bits(bits_key, (2 * length + spans + 4,), jnp.uint32)
    few_3, sentences_L, ends_S, order_S = jnp.split(bits, (3, 3 + length, 4 + 2 * length))
    taken_L, unit_L, kind = config._blanks.draw(blanks_key, config.rate, row, length), segment_ids_L, jnp.int32(0)
    if config.sentences or config.generation:
        chance = uniform(few_3[0])
        kind = jnp.where(chance < config.generation, 2, jnp.where(chance < config.generation + config.sentences, 1, 0))
        sentence_L = unit_ids(starts_of(segment_ids_L) | starts_of(sentence_ids_L))
        budget = draw_count(few_3[1], jnp.float32(config.rate) * jnp.sum(row.candidates), "unbiased")
        whole_L = draw_units(sentences_L, few_3[2], sentence_L, row.candidates, budget, length)
        end_L = draw_ends(ends_S, row.candidates, segment_ids_L, config.shortest_end)
        taken_L = jnp.where(kind == 0, taken_L, jnp.where(kind == 1, whole_L, end_L))
        unit_L = jnp.where(kind == 1, sentence_L, unit_L)
    goes_on_L = jnp.concatenate([jnp.zeros(1, bool), taken_L[:-1] & (unit_L[1:] == unit_L[:-1])])
    first_L = taken_L & ~goes_on_L
    number_L = unit_ids(first_L)
    fits_L = number_L < spans
    order_S = draw_ranks(order_S, jnp.arange(spans) <= number_L[-1])
    return kind, Gaps(taken_L & fits_L, first_L & fits_L, order_S)


def draw_ends(bits_S: Array, candidates_L: Array, segment_ids_L: Array, shortest: float) -> Array:
    """Take the end of each document: of n tokens the last ceil(shortest n) to n, each number equally likely.

    Args:
      bits_S: [L + 1] u32, random, for each segment.
      candidates_L: [L] bool, tokens that can be taken; the others are not counted.
      segment_ids_L: [L] i32.
      shortest: share of the document.

    Returns:
      [L] bool.
    """
    sizes_S = jnp.zeros(bits_S.shape[0], jnp.int32).at[segment_ids_L].add(candidates_L.astype(jnp.int32))
    least_S = jnp.clip(jnp.ceil(jnp.float32(shortest) * sizes_S).astype(jnp.int32), 1)
    choices_S = jnp.maximum(sizes_S - least_S + 1, 1).astype(jnp.uint32)
    ends_S = least_S + (bits_S % choices_S).astype(jnp.int32)
    left_L = jnp.cumsum(sizes_S)[segment_ids_L] - jnp.cumsum(candidates_L)  # tokens of the document behind this one
    return candidates_L & (left_L < ends_S[segment_ids_L])


def rearrange(
    tokens_L: Array, segment_ids_L: Array, gaps: Gaps, specials: tuple[Array | int, int, int, int], length: int
) -> Infilled:
    """Write a row as part A, with a mask for each gap, and part B, with what was in them.

    Args:
      tokens_L, segment_ids_L: [L] i32; segment 0 = padding.
      gaps: what is taken out.
      specials: the mask, [START], [END] and the padding.
      length: slots, J; at least the tokens and two for each span.

    Example:
      >>> taken = jnp.array([False, False, True, False, True, True])
      >>> gaps = Gaps(taken, jnp.array([False, False, True, False, True, False]), jnp.array([1, 0]))
      >>> row = rearrange(jnp.array([9, 1, 2, 3, 4, 5]), jnp.ones(6, int), gaps, (6, 7, 8, 0), 10)
      >>> row.tokens.tolist(), (row.targets * row.asked).tolist()
      ([9, 1, 6, 3, 6, 7, 4, 5, 7, 2], [0, 0, 0, 0, 0, 4, 5, 8, 2, 8])
      >>> row.positions.tolist(), row.inner_positions.tolist()
      ([0, 1, 2, 3, 4, 4, 4, 4, 2, 2], [0, 0, 0, 0, 0, 1, 2, 3, 1, 2])
    """
    mask, start, end, pad = specials
    spans = gaps.order.shape[0]
    kept_L = (segment_ids_L > 0) & (~gaps.taken | gaps.first)
    before_L = jnp.cumsum(kept_L, dtype=jnp.int32) - 1  # place in part A; of what is taken out, that of its mask
    begins_L = jax.lax.cummax(jnp.where(starts_of(segment_ids_L), before_L, 0))

    begins_S, used_S = compact(gaps.first, spans)
    sizes_S = jnp.zeros(spans, jnp.int32).at[unit_ids(gaps.first)].add(gaps.taken.astype(jnp.int32), mode="drop")
    by_order_S = jnp.zeros_like(gaps.order).at[gaps.order].set(jnp.arange(spans, dtype=jnp.int32), unique_indices=True)
    slots_S = (sizes_S + used_S)[by_order_S]
    part_A = jnp.stack([jnp.int32(0), jnp.sum(kept_L, dtype=jnp.int32)])
    part_J, inside_J = lay(jnp.concatenate([part_A, slots_S]), length)  # 0 = padding, 1 = A, then the spans

    asked_J = part_J > 1
    span_J = by_order_S[jnp.maximum(part_J - 2, 0)]
    kept_J = compact(kept_L, length)[0]
    source_J = jnp.where(asked_J, begins_S[span_J], kept_J)  # of a token of a span, the first one of the span
    inside_J = jnp.where(asked_J, inside_J, 0)
    text_J = jnp.where(gaps.first[source_J], mask, tokens_L[source_J])
    span_tokens_J = jnp.where(inside_J == 0, start, tokens_L[source_J + inside_J - 1])
    return Infilled(
        tokens=jnp.where(asked_J, span_tokens_J, jnp.where(part_J == 1, text_J, pad)).astype(jnp.int32),
        targets=jnp.where(inside_J == sizes_S[span_J], end, tokens_L[source_J + inside_J]).astype(jnp.int32),
        segment_ids=jnp.where(part_J > 0, segment_ids_L[source_J], 0),
        positions=jnp.where(part_J > 0, (before_L - begins_L)[source_J], 0),
        inner_positions=jnp.where(asked_J, inside_J + 1, 0),
        asked=asked_J,
    )
