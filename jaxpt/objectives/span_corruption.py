"""Span corruption: write what is missing from a text (T5, Raffel et al. 2020, arXiv:1910.10683).

    text      Thank you for inviting me to your party last week
    inputs    Thank you <0> me to your party <1> [EOS]
    targets   <0> for inviting <1> last week [EOS]

    loss = mean over t of -log p(targets[t] | targets[..t-1], inputs)        + z_loss * mean of (log Z)^2

Spans of a share of the tokens are hidden. In the inputs a sentinel stands for each of them, in the targets one for
what was left between them. An encoder reads the inputs and a decoder says the targets, or one decoder reads both in a
row. UL2 (Tay et al. 2022, arXiv:2205.05131) mixes such denoisers, each on its own rows, and tells by a mode token
before the inputs which one it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.corruption.collapse import Side, collapse, follow, text_sizes
from jaxpt.corruption.pieces import before
from jaxpt.corruption.rows import row_keys
from jaxpt.corruption.span_plan import Denoiser, Layout, Lengths, plan, plan_of_rows
from jaxpt.corruption.spans import draw_alternating
from jaxpt.models.config import TransformerConfig
from jaxpt.models.encoder_decoder import EncoderDecoderConfig
from jaxpt.models.patterns import prefix
from jaxpt.models.presets import t5
from jaxpt.objectives import parts
from jaxpt.objectives.causal_lm import next_tokens
from jaxpt.objectives.infilling import language_model
from jaxpt.objectives.parts import check, check_length
from jaxpt.objectives.sequence_to_sequence import sequence_to_sequence, sides, without_dropout
from jaxpt.types import (
    Array,
    Batch,
    Example,
    Key,
    Objective,
    Packing,
    RowKind,
    RowSpec,
    Snapshot,
    Vocab,
)

NAME = "span_corruption"


@dataclass(frozen=True)
class SpanCorruption:
    """Prediction of hidden spans, by an encoder and a decoder or by a decoder alone."""

    network: EncoderDecoderConfig | TransformerConfig = field(default_factory=lambda: t5("base"))
    """An encoder that reads the inputs and a decoder that says the targets; or one decoder that reads the inputs from
    both sides and goes on with the targets."""
    denoisers: tuple[Denoiser, ...] = (Denoiser(),)
    """What is hidden; several divide the rows of every batch, each with as much text as fills the model's length."""
    modes: tuple[str, ...] = ("NLU", "S2S", "NLG")
    """Names of the mode tokens: the first is the tokenizer's last sentinel, the second the one before it, and so on."""
    packing: Packing = "concatenate"
    """How documents share a row."""
    documents: int = 4
    """Texts of a row: each document (or piece of one) is corrupted by itself and sees no other; rows keep slots free
    for this many, and the last takes in all further documents. 1 = T5: a row is one text, whatever stands in it."""
    roll: bool = False
    """Shift the spans of each text round by a random number of tokens, so that every token is hidden equally often;
    else the first is never hidden and the last always, and up to 30 tokens have one span, at the end. The one span
    of a denoiser without ``mean`` stays there."""
    z_loss: float = 0.0
    """Scale of the term (log Z)^2; T5 uses 1e-4."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be and missing special tokens."""
        check_settings(self)
        end, modes = vocab.require("eos", NAME), mode_tokens(self, vocab)
        reserved = reserved_sentinels(self)
        layout = Layout(self.denoisers, self.documents, self.roll, one_row=isinstance(self.network, TransformerConfig))

        def raw_length(kind: int) -> Callable[[int], int]:
            return lambda length: enough_sentinels(plan(layout, length), layout, reserved, vocab).tokens[kind]

        kinds = tuple(RowKind(denoiser.share, raw_length(k)) for k, denoiser in enumerate(self.denoisers))
        rows = RowSpec(self.packing, raw_length=kinds[0].raw_length, kinds=kinds if len(kinds) > 1 else ())
        write = functools.partial(
            collapse, count=self.documents, sentinels=np.array(vocab.sentinels, np.int32), end=end, pad=vocab.pad
        )

        def both_sides(batch: Batch, key: Key) -> tuple[Side, Side, Lengths]:
            lengths = enough_sentinels(plan_of_rows(layout, batch.tokens.shape[1]), layout, reserved, vocab)
            rolled = jnp.array([layout.shifts(denoiser) for denoiser in self.denoisers])

            def corrupt_row(row_key: Key, kind: Array, tokens_L: Array, segment_ids_L: Array) -> tuple[Side, Side]:
                texts_L = texts_of(segment_ids_L, jnp.array(lengths.tokens)[kind], self.documents)
                sizes_S = text_sizes(texts_L, self.documents)
                noise_S, spans_S = (jnp.array(table)[kind, sizes_S] for table in (lengths.noise, lengths.spans))
                hidden_L = draw_hidden(row_key, texts_L, sizes_S, noise_S, spans_S, roll=rolled[kind])
                inputs = write(tokens_L, texts_L, hidden_L, size=lengths.inputs, front=jnp.array(modes)[kind])
                return inputs, write(tokens_L, texts_L, ~hidden_L, size=lengths.targets)

            each = (row_keys(key, batch.row_ids), kinds_of(rows, batch), batch.tokens, batch.segment_ids)
            return *jax.vmap(corrupt_row)(*each), lengths

        def corrupt_for_two(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            inputs, targets, _ = both_sides(batch, key)
            weights = {"lm": (targets.segment_ids > 0).astype(jnp.float32)}
            return Example(sides(inputs[:3], *targets[:3], start=vocab.pad), batch.row_ids, weights)

        def corrupt_for_one(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            inputs, targets, lengths = both_sides(batch, key)
            assert isinstance(self.network, TransformerConfig)
            check_length(self.network, lengths.inputs, NAME)
            row, is_input_RL = jax.vmap(functools.partial(follow, size=lengths.inputs, pad=vocab.pad))(inputs, targets)
            targets_RL, weights_RL = next_tokens(row.tokens, row.segment_ids)
            made = {
                "tokens": row.tokens,
                "segment_ids": row.segment_ids,
                "positions": row.positions,
                "pattern": prefix(row.segment_ids, row.positions, is_input_RL),
                "targets": targets_RL,
            }
            return Example(made, batch.row_ids, {"lm": weights_RL * ~jnp.roll(is_input_RL, -1, axis=1)})

        if isinstance(self.network, EncoderDecoderConfig):
            return sequence_to_sequence(self.network, vocab, rows, corrupt_for_two, NAME, z_loss_scale=self.z_loss)
        return language_model(self.network, vocab, rows, corrupt_for_one, z_loss_scale=self.z_loss)

    def for_evaluation(self) -> SpanCorruption:
        """The first denoiser alone, without dropout and z-loss, so that runs compare."""
        if isinstance(self.network, EncoderDecoderConfig):
            network = without_dropout(self.network)
        else:
            network = parts.without_dropout(self.network)
        return replace(self, network=network, denoisers=self.denoisers[:1], z_loss=0.0)


def check_settings(config: SpanCorruption) -> None:
    """Raise ValueError for settings that cannot be."""
    check(bool(config.denoisers), f"{NAME}: denoisers is empty: name at least one")
    check(config.documents >= 1, f"{NAME}: documents is {config.documents}, but a row is at least 1 text")
    check(config.z_loss >= 0, f"{NAME}: z_loss is a scale and cannot be negative, not {config.z_loss}")
    for each in config.denoisers:
        check(0 < each.rate < 1, f"{NAME}: rate of a denoiser is a share in (0, 1), not {each.rate}")
        check(
            each.mean is None or each.mean >= 1, f"{NAME}: mean of a denoiser is {each.mean}: 1 token or more, or None"
        )
        check(each.share >= 1, f"{NAME}: share of a denoiser is {each.share}: it must be at least 1")
        check(
            each.mode is None or each.mode in config.modes,
            f"{NAME}: mode of a denoiser is {each.mode!r}, which is none of modes={config.modes}: add it there",
        )
    check(len(set(config.modes)) == len(config.modes), f"{NAME}: modes={config.modes} names one twice")


def mode_tokens(config: SpanCorruption, vocab: Vocab) -> tuple[int, ...]:
    """Return the token before each denoiser's inputs, -1 = none: the first mode is the last sentinel, and so on.

    A name is the same token in every configuration, so that denoisers can be parts of a mixture.

    >>> from jaxpt.corruption.span_plan import UL2
    >>> vocab = Vocab(9, 0, sentinels=(8, 7, 6, 5, 4, 3))
    >>> mode_tokens(SpanCorruption(denoisers=UL2), vocab), mode_tokens(SpanCorruption(denoisers=UL2[-1:]), vocab)
    ((3, 3, 4, 5, 5, 5, 5), (5,))
    """
    count = reserved_sentinels(config)
    check(
        count < len(vocab.sentinels),
        f"{NAME}: {count} modes and at least one span need sentinel tokens and this tokenizer has "
        f"{len(vocab.sentinels)}: build the data with more, `jaxpt data build --sentinels N`",
    )
    tokens = {None: -1} | dict(zip(config.modes, vocab.sentinels[::-1], strict=False))
    return tuple(tokens[each.mode] for each in config.denoisers)


def reserved_sentinels(config: SpanCorruption) -> int:
    """Return how many sentinels are modes: those of all ``modes``, as soon as one is used."""
    return len(config.modes) if any(each.mode is not None for each in config.denoisers) else 0


def enough_sentinels(lengths: Lengths, layout: Layout, reserved: int, vocab: Vocab) -> Lengths:
    """Return the lengths; raises ValueError where a text may have more spans than the tokenizer has sentinels."""
    kinds = zip(layout.denoisers, lengths.spans, lengths.tokens, strict=True)
    spans = max(int(table[own]) + layout.shifts(denoiser) for denoiser, table, own in kinds)
    needed = spans + reserved
    check(
        needed <= len(vocab.sentinels),
        f"{NAME}: rows of {lengths.inputs} tokens need {needed} sentinel tokens, {spans} of them for spans, and this "
        f"tokenizer has {len(vocab.sentinels)}: build the data with `jaxpt data build --sentinels {needed}`, "
        f"raise the mean length of spans, or shorten the rows (--seq-len)",
    )
    return lengths


# ------------------------------------------------------------------------------------------- draw


def kinds_of(rows: RowSpec, batch: Batch) -> Array:
    """Return which denoiser each row of a batch belongs to: [R] i32."""
    stops = np.array([own.stop for own in rows.kind_ranges(batch.tokens.shape[0])[:-1]], np.uint32)
    return jnp.sum(batch.row_ids[:, None] >= stops[None], axis=1, dtype=jnp.int32)


def texts_of(segment_ids_L: Array, room: Array, documents: int) -> Array:
    """Number the texts of a row from 1: the last takes all further documents in; beyond ``room`` is padding."""
    inside_L = jnp.arange(segment_ids_L.shape[0]) < room
    return jnp.where(inside_L, jnp.minimum(segment_ids_L, documents), 0)


def draw_hidden(
    key: Key, texts_L: Array, sizes_S: Array, noise_S: Array, spans_S: Array, *, roll: Array | bool = False
) -> Array:
    """Hide spans of every text of a row, by T5's law.

    Args:
      key: a key.
      texts_L: [L] i32: 1, 2, ... from the start of the row; 0 = padding.
      sizes_S: [S] i32, tokens of each text.
      noise_S, spans_S: [S] i32, tokens to hide of each, in so many spans.
      roll: [] bool, shift the spans of each text round.

    Returns:
      [L] bool.
    """
    length, texts = texts_L.shape[0], sizes_S.shape[0]
    bits = jax.random.bits(key, (2 * length + texts,), jnp.uint32)
    hidden_L = draw_alternating(bits[: 2 * length].reshape(2, length), sizes_S, noise_S, spans_S)
    starts_L, sizes_L = before(sizes_S)[texts_L], jnp.maximum(sizes_S, 1)[texts_L]
    shifts_S = (bits[2 * length :] % jnp.maximum(sizes_S, 1).astype(jnp.uint32)).astype(jnp.int32)
    places_L = jnp.arange(length) - starts_L - shifts_S[texts_L] * roll
    return hidden_L[starts_L + places_L % sizes_L] & (texts_L > 0)
