"""Causal masking: write a document with gaps, then what the gaps hide (CM3, Aghajanyan et al. 2022, arXiv:2201.07520;
InCoder, Fried et al. 2022, arXiv:2204.05999).

    left [MASK:0] middle [MASK:1] right   [MASK:0] span [EOM]  [MASK:1] span [EOM]   [EOS]

    loss = mean over t of -log p(y[t+1] | y[..t])       but no loss on a [MASK:i] that stands for a gap

A share ``rate`` of the documents of every row (of their pieces, where a row cuts them) is changed so, the others stay
as they are. A changed one has n ~ Poisson(1), n >= 1, gaps; the 2 n cuts are uniform over the text, which is the law
of n spans with two uniform ends each, redrawn until no two overlap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.corruption.choose import draw_ranks, uniform
from jaxpt.corruption.pieces import Pieces, before, describe_pieces, lay
from jaxpt.corruption.rows import row_keys
from jaxpt.corruption.spans import draw_lengths
from jaxpt.models.config import TransformerConfig
from jaxpt.models.patterns import causal
from jaxpt.models.presets import gpt2
from jaxpt.objectives.causal_lm import next_tokens
from jaxpt.objectives.infilling import (
    CONTEXT,
    INFILL,
    PLAIN,
    infilling_lm,
    require_sentinels,
    room_for_sentinels,
)
from jaxpt.objectives.parts import check, check_length, without_dropout
from jaxpt.types import Array, Batch, Example, Key, Objective, Packing, RowSpec, Snapshot, Vocab


@dataclass(frozen=True)
class CausalMasking:
    """Next-token prediction over documents with spans moved to their end."""

    decoder: TransformerConfig = field(default_factory=lambda: gpt2("small"))
    """The Transformer; ``tie_embeddings`` says whether the output layer is the embedding table."""
    packing: Packing = "concatenate"
    """How documents share a row."""
    rate: float = 0.5
    """Share of the documents that gets gaps."""
    mean: float = 1.0
    """Mean of the Poisson law of the gaps per document, before 0 is cut off."""
    spans: int = 3
    """The most gaps in a document; one sentinel each and one for [EOM]. CM3 allows 16, InCoder 256; at mean 1 more
    than 3 come in 3 of 100 documents."""
    spans_per_row: int = 4
    """The most gaps in a row: each takes three slots for sentinels, which rows keep free. Documents come in random
    order; the first that does not fit and those after it stay as they are."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be, without [EOS] or enough sentinels."""
        name = "causal_masking"
        check(0 <= self.rate <= 1, f"{name}: rate is a share in [0, 1], not {self.rate}")
        check(self.mean > 0, f"{name}: mean is a number of gaps above 0, not {self.mean}")
        check(
            1 <= self.spans <= self.spans_per_row,
            f"{name}: spans={self.spans} of a document must be at least 1 and fit spans_per_row={self.spans_per_row}",
        )
        end = vocab.require("eos", name)
        *masks, eom = require_sentinels(vocab, self.spans + 1, f"{name} with spans={self.spans}")
        law = truncated_poisson(self.mean, self.spans)
        reserve = 3 * self.spans_per_row

        def corrupt_row(key: Key, tokens_L: Array, segment_ids_L: Array, positions_L: Array):
            pieces = describe_pieces(tokens_L, segment_ids_L, end)
            gaps = draw_gaps(key, pieces, self.rate, law, self.spans_per_row)
            length = tokens_L.shape[0] + reserve
            return move_spans(tokens_L, segment_ids_L, positions_L, pieces, gaps, masks, eom, vocab.pad, length)

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            check_length(self.decoder, batch.tokens.shape[1] + reserve, name)
            rows = (row_keys(key, batch.row_ids), batch.tokens, batch.segment_ids, batch.positions)
            moved = jax.vmap(corrupt_row)(*rows)
            targets_RL, weights_RL = next_tokens(moved.tokens, moved.segment_ids)
            inputs = {
                "tokens": moved.tokens,
                "segment_ids": moved.segment_ids,
                "positions": moved.positions,
                "pattern": causal(moved.segment_ids, moved.positions),
                "targets": targets_RL,
                "kinds": jnp.roll(moved.kinds, -1, axis=1),
            }
            weights_RL *= ~jnp.roll(moved.is_gap, -1, axis=1)
            return Example(inputs, batch.row_ids, weights={"lm": weights_RL})

        raw_length = room_for_sentinels(reserve, f"{name} with spans_per_row={self.spans_per_row}")
        rows = RowSpec(self.packing, suffix=(end,), raw_length=raw_length)
        return infilling_lm(self.decoder, vocab, rows, corrupt)

    def for_evaluation(self) -> CausalMasking:
        """No dropout; as many documents get gaps, and ``plain_nll`` compares with ``causal_lm``."""
        return replace(self, decoder=without_dropout(self.decoder))


# ------------------------------------------------------------------------------------------- draw


class Gaps(NamedTuple):
    """The spans of a row that are moved, in the order of the row; no two overlap."""

    segment_ids: Array  # [K] i32: the piece that the span belongs to, 0 = unused
    starts: Array  # [K] i32: its first place in the piece
    stops: Array  # [K] i32: the place behind it; a span may be empty


def truncated_poisson(mean: float, most: int) -> np.ndarray:
    """Return P(n = 1 .. most) of a Poisson law without its 0 and without what lies above ``most``.

    >>> truncated_poisson(1.0, 16).round(3)[:3].tolist()
    [0.582, 0.291, 0.097]
    """
    law = np.array([mean**n / math.factorial(n) for n in range(1, most + 1)])
    return law / law.sum()


def draw_gaps(key: Key, pieces: Pieces, rate: float, law: np.ndarray, room: int) -> Gaps:
    """Decide which pieces get gaps, how many, and where: two cuts per gap, each uniform on {0 .. n}.

    Args:
      key: a key.
      pieces: of one row; those without text stay as they are.
      rate: probability that a piece gets gaps.
      law: probabilities of 1, 2, ... gaps.
      room: the most gaps of the row, K.
    """
    piece_key, cut_key = jax.random.split(key)
    coins_S, counts_S, order_S = jax.random.bits(piece_key, (3, pieces.sizes.shape[0]), jnp.uint32)
    chosen_S = (pieces.sizes > 0) & (uniform(coins_S) < rate)
    counts_S = jnp.where(chosen_S, draw_lengths(counts_S, law), 0)
    ranks_S = draw_ranks(order_S, chosen_S)
    through_S = jnp.cumsum(jnp.zeros_like(counts_S).at[ranks_S].set(counts_S, unique_indices=True))[ranks_S]
    counts_S = jnp.where(through_S <= room, counts_S, 0)
    segment_ids_K, _ = lay(counts_S, room)
    # Sorted within their piece, the cuts are pairs; unused ones belong to no piece and come last.
    pieces_C = jnp.repeat(jnp.where(segment_ids_K > 0, segment_ids_K, pieces.sizes.shape[0]), 2)
    sizes_C = jnp.repeat(pieces.sizes[segment_ids_K], 2)
    cuts_C = (jax.random.bits(cut_key, (2 * room,), jnp.uint32) % (sizes_C + 1).astype(jnp.uint32)).astype(jnp.int32)
    _, cuts_C = jax.lax.sort((pieces_C, cuts_C), num_keys=2)
    return Gaps(segment_ids_K, cuts_C[0::2], cuts_C[1::2])


# ------------------------------------------------------------------------------------------- apply


class Moved(NamedTuple):
    """A row whose spans are moved."""

    tokens: Array  # [J] i32
    segment_ids: Array  # [J] i32
    positions: Array  # [J] i32
    kinds: Array  # [J] i32: PLAIN, CONTEXT or INFILL (a span and its [EOM])
    is_gap: Array  # [J] bool: a sentinel that stands for a gap


def move_spans(
    tokens_L: Array,
    segment_ids_L: Array,
    positions_L: Array,
    pieces: Pieces,
    gaps: Gaps,
    masks: list[int],
    eom: int,
    pad: int,
    length: int,
) -> Moved:
    """Put a sentinel in the place of each span, and behind the text of its piece: sentinel, span, end of the span.

    Args:
      tokens_L, segment_ids_L, positions_L: [L] i32.
      pieces: of this row.
      gaps: the decisions.
      masks: the sentinels of the first, second, ... gap of a piece.
      eom: what ends a span.
      pad: what fills the row.
      length: slots of the new row; what does not fit is cut.

    >>> import jax.numpy as jnp
    >>> row = jnp.array([11, 12, 13, 14, 15, 3]), jnp.ones(6, int), jnp.arange(6)
    >>> gaps = Gaps(jnp.array([1, 1]), jnp.array([1, 4]), jnp.array([3, 5]))
    >>> move_spans(*row, describe_pieces(*row[:2], end=3), gaps, [-1, -2], -9, 0, 12).tokens.tolist()
    [11, -1, 14, -2, -1, 12, 13, -9, -2, 15, -9, 3]
    """
    segment_ids_K, used_K = gaps.segment_ids, gaps.segment_ids > 0
    sizes_K = jnp.where(used_K, gaps.stops - gaps.starts, 0)
    nothing_S = jnp.zeros_like(pieces.sizes)
    counts_S = nothing_S.at[segment_ids_K].add(used_K.astype(jnp.int32))
    texts_S = pieces.sizes - nothing_S.at[segment_ids_K].add(sizes_K) + counts_S  # with a sentinel for each gap
    lengths_S = pieces.sizes + pieces.ends + 3 * counts_S
    begins_S = before(lengths_S)

    # Where each gap's sentinels go. Numbers and sizes of the gaps before it count within its own piece.
    firsts_K = before(counts_S)[segment_ids_K]
    number_K = jnp.arange(segment_ids_K.shape[0]) - firsts_K
    hidden_before_K = before(sizes_K) - before(sizes_K)[firsts_K]
    begins_K = begins_S[segment_ids_K]
    in_text_K = begins_K + gaps.starts - hidden_before_K + number_K
    behind_K = begins_K + texts_S[segment_ids_K] + hidden_before_K + 2 * number_K

    # Where each token goes.
    own_LK = (segment_ids_L[:, None] == segment_ids_K) & used_K
    inside_LK = own_LK & (gaps.starts <= positions_L[:, None]) & (positions_L[:, None] < gaps.stops)
    passed_LK = own_LK & (gaps.stops <= positions_L[:, None])
    inside_L = inside_LK.any(1)
    in_text_L = begins_S[segment_ids_L] + positions_L - jnp.sum(passed_LK * (sizes_K - 1), axis=1)
    in_span_L = positions_L + jnp.sum(inside_LK * (behind_K + 1 - gaps.starts), axis=1)
    at_end_L = positions_L >= pieces.sizes[segment_ids_L]
    last_L = (begins_S + lengths_S)[segment_ids_L] - 1
    to_L = jnp.where(at_end_L, last_L, jnp.where(inside_L, in_span_L, in_text_L))
    to_L = jnp.where(segment_ids_L > 0, to_L, length)

    def put(row_J: Array, at: Array, values: Array | int, used: Array | bool = True) -> Array:
        return row_J.at[jnp.where(used, at, length)].set(values, mode="drop")

    masks_K = jnp.asarray(masks, jnp.int32)[number_K % len(masks)]
    segment_ids_J, positions_J = lay(lengths_S, length)
    tokens_J = put(jnp.full(length, pad, jnp.int32), to_L, tokens_L)
    tokens_J = put(put(tokens_J, in_text_K, masks_K, used_K), behind_K, masks_K, used_K)
    tokens_J = put(tokens_J, behind_K + 1 + sizes_K, eom, used_K)
    kinds_J = jnp.where(counts_S[segment_ids_J] > 0, CONTEXT, PLAIN)
    kinds_J = put(put(kinds_J, to_L, INFILL, inside_L), behind_K + 1 + sizes_K, INFILL, used_K)
    is_gap_J = put(jnp.zeros(length, bool), in_text_K, values=True, used=used_K)
    return Moved(tokens_J, segment_ids_J, positions_J, kinds_J, is_gap_J)
