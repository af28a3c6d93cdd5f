"""Fill in the middle: write what stands between two texts (Bavarian et al. 2022, arXiv:2207.14255).

    [PRE] prefix [SUF] suffix [MID] middle [EOS]      PSM
    [PRE] [SUF] suffix [MID] prefix middle [EOS]      SPM         loss = mean over t of -log p(y[t+1] | y[..t])

A share ``rate`` of the documents of every row (of their pieces, where a row cuts them: the paper's context level) is
cut at two places, each uniform over 0 .. n, and rearranged to y; the others stay as they are. The two other forms
move no text: a token's rank is its place in the order prefix, suffix, middle, it sees the ranks up to its own, and
its label is the token of the next rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxpt.corruption.choose import draw_subset, uniform
from jaxpt.corruption.pieces import Pieces, describe_pieces, lay
from jaxpt.corruption.rows import row_keys
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
from jaxpt.types import (
    Array,
    AttentionPattern,
    Batch,
    Example,
    Key,
    Objective,
    Packing,
    RowSpec,
    Snapshot,
    Vocab,
)


@dataclass(frozen=True)
class FillInTheMiddle:
    """Next-token prediction over documents whose middle is moved to their end."""

    decoder: TransformerConfig = field(default_factory=lambda: gpt2("small"))
    """The Transformer; ``tie_embeddings`` says whether the output layer is the embedding table."""
    packing: Packing = "concatenate"
    """How documents share a row."""
    rate: float = 0.5
    """Share of the documents that is rearranged; the paper finds no cost of left-to-right skill up to 0.9."""
    spm: float = 0.5
    """Share of the rearranged documents that put the suffix first."""
    form: Literal["moved", "in_place", "bidirectional"] = "moved"
    """"moved" rearranges text between sentinels; "in_place" orders attention only, positions stay; "bidirectional"
    also lets prefix and suffix see each other both ways and predicts the middle only."""
    pieces: int = 4
    """Documents (or pieces) of a row that are rearranged at most, "moved" only: each takes three slots for sentinels,
    which rows keep free; where more are drawn, a random excess stays as it is."""
    middle_only: bool = False
    """Take the loss of a rearranged document on its middle and end only, not on all of it."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be, and without [EOS] or 3 sentinels."""
        name = "fill_in_the_middle"
        for share in ("rate", "spm"):
            check(0 <= getattr(self, share) <= 1, f"{name}: {share} is a share in [0, 1], not {getattr(self, share)}")
        check(self.pieces >= 1, f"{name}: pieces is {self.pieces}, but at least 1 must be rearranged")
        end = vocab.require("eos", name)
        sentinels = require_sentinels(vocab, 3, name) if self.form == "moved" else ()
        reserve = 3 * self.pieces if self.form == "moved" else 0
        gap_only = self.middle_only or self.form == "bidirectional"

        def move_row(key: Key, tokens_L: Array, segment_ids_L: Array, positions_L: Array):
            pieces = describe_pieces(tokens_L, segment_ids_L, end)
            cuts = draw_cuts(key, pieces, self.rate, self.spm, self.pieces)
            length = tokens_L.shape[0] + reserve
            row = rearrange(tokens_L, pieces, cuts, sentinels, vocab.pad, length)
            return row, jnp.roll(row.kinds, -1)

        def rank_row(key: Key, tokens_L: Array, segment_ids_L: Array, positions_L: Array):
            pieces = describe_pieces(tokens_L, segment_ids_L, end)
            cuts = draw_cuts(key, pieces, self.rate, self.spm, None)
            return rank(segment_ids_L, positions_L, pieces, cuts, self.form == "bidirectional")

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            rows = (row_keys(key, batch.row_ids), batch.tokens, batch.segment_ids, batch.positions)
            if self.form == "moved":
                moved, kinds_RL = jax.vmap(move_row)(*rows)
                tokens_RL, segment_ids_RL, positions_RL = moved.tokens, moved.segment_ids, moved.positions
                pattern = causal(segment_ids_RL, positions_RL)
                targets_RL, weights_RL = next_tokens(tokens_RL, segment_ids_RL)
            else:
                tokens_RL, segment_ids_RL, positions_RL = batch.tokens, batch.segment_ids, batch.positions
                ranks_RL, next_RL, weights_RL, kinds_RL = jax.vmap(rank_row)(*rows)
                pattern = AttentionPattern(
                    segment_ids_RL, segment_ids_RL, ranks_RL, ranks_RL, positions_RL, positions_RL
                )
                targets_RL = jnp.take_along_axis(tokens_RL, next_RL, axis=1)
            check_length(self.decoder, tokens_RL.shape[1], name)
            inputs = {
                "tokens": tokens_RL,
                "segment_ids": segment_ids_RL,
                "positions": positions_RL,
                "pattern": pattern,
                "targets": targets_RL,
                "kinds": kinds_RL,
            }
            weights_RL *= (kinds_RL != CONTEXT) if gap_only else 1
            return Example(inputs, batch.row_ids, weights={"lm": weights_RL})

        raw_length = room_for_sentinels(reserve, f"{name} with pieces={self.pieces}")
        rows = RowSpec(self.packing, suffix=(end,), raw_length=raw_length)
        return infilling_lm(self.decoder, vocab, rows, corrupt)

    def for_evaluation(self) -> FillInTheMiddle:
        """No dropout; as many documents are rearranged, and ``plain_nll`` compares with ``causal_lm``."""
        return replace(self, decoder=without_dropout(self.decoder))


# ------------------------------------------------------------------------------------------- draw


class Cuts(NamedTuple):
    """The decisions for the pieces of a row."""

    moved: Array  # [S] bool: rearranged
    suffix_first: Array  # [S] bool: SPM, else PSM
    first: Array  # [S] i32: the prefix is the text before this place
    second: Array  # [S] i32, first <= second <= size: the suffix is the text from this place on


def draw_cuts(key: Key, pieces: Pieces, rate: float, spm: float, limit: int | None) -> Cuts:
    """Decide which pieces are rearranged, how, and where they are cut: two places, each uniform on {0 .. n}.

    Both cuts agree with probability 1 / (n + 1); any part may be empty.

    Args:
      key: a key.
      pieces: of one row; those without text stay as they are.
      rate: probability that a piece is rearranged.
      spm: probability that a rearranged piece puts its suffix first.
      limit: the most pieces to rearrange, random ones where more are drawn; None = no limit.
    """
    coins_S, order_S, form_S, *cuts = jax.random.bits(key, (5, pieces.sizes.shape[0]), jnp.uint32)
    moved_S = (pieces.sizes > 0) & (uniform(coins_S) < rate)
    moved_S = moved_S if limit is None else draw_subset(order_S, moved_S, limit)
    one_S, other_S = ((bits_S % (pieces.sizes + 1).astype(jnp.uint32)).astype(jnp.int32) for bits_S in cuts)
    return Cuts(moved_S, uniform(form_S) < spm, jnp.minimum(one_S, other_S), jnp.maximum(one_S, other_S))


# ------------------------------------------------------------------------------------------- apply


class Order(NamedTuple):
    """The order in which pieces are written: their head, their suffix, the rest of the text, its end."""

    sizes: Array  # [...] i32: tokens of the text
    heads: Array  # [...] i32: the whole prefix in PSM, nothing in SPM, all of a piece that stays
    suffixes: Array  # [...] i32: tokens of the suffix; 0 of a piece that stays

    def at(self, index: Array) -> Order:
        """The orders of some pieces."""
        return Order(*(values[index] for values in self))

    def rank(self, place: Array) -> Array:
        """When the token of a place is written: 0, 1, ..."""
        cut = self.sizes - self.suffixes
        shift = jnp.where(place < cut, self.suffixes, self.heads - cut)
        return place + jnp.where((place < self.heads) | (place >= self.sizes), 0, shift)

    def place(self, rank: Array) -> Array:
        """Where the token stands that is written at a rank; the inverse of ``rank``."""
        cut = self.sizes - self.suffixes
        shift = jnp.where(rank < self.heads + self.suffixes, cut - self.heads, -self.suffixes)
        return rank + jnp.where((rank < self.heads) | (rank >= self.sizes), 0, shift)


def order_of(pieces: Pieces, cuts: Cuts) -> Order:
    """Return the order of each piece of a row, [S].

    >>> import jax.numpy as jnp
    >>> psm = order_of(Pieces(jnp.array([8]), jnp.array([1])), Cuts(*jnp.array([[1], [0], [2], [5]])))
    >>> psm.place(jnp.arange(9)).tolist(), psm.rank(jnp.arange(9)).tolist()
    ([0, 1, 5, 6, 7, 2, 3, 4, 8], [0, 1, 5, 6, 7, 2, 3, 4, 8])
    """
    heads_S = jnp.where(cuts.moved, jnp.where(cuts.suffix_first, 0, cuts.first), pieces.sizes)
    return Order(pieces.sizes, heads_S, jnp.where(cuts.moved, pieces.sizes - cuts.second, 0))


def kinds_of(places: Array, segment_ids: Array, pieces: Pieces, cuts: Cuts) -> Array:
    """Say of tokens what they are: ``PLAIN``, ``CONTEXT``, or ``INFILL`` for the middle and the end behind it."""
    inside = (cuts.first[segment_ids] <= places) & (places < cuts.second[segment_ids])
    infill = inside | (places >= pieces.sizes[segment_ids])
    return jnp.where(cuts.moved[segment_ids], jnp.where(infill, INFILL, CONTEXT), PLAIN)


class Rearranged(NamedTuple):
    """A row whose pieces are rearranged."""

    tokens: Array  # [J] i32
    segment_ids: Array  # [J] i32
    positions: Array  # [J] i32
    kinds: Array  # [J] i32: PLAIN, CONTEXT (sentinels too) or INFILL


def rearrange(
    tokens_L: Array, pieces: Pieces, cuts: Cuts, sentinels: tuple[int, ...], pad: int, length: int
) -> Rearranged:
    """Rearrange the pieces of a row between sentinels; the end of a document stays behind it.

    Args:
      tokens_L: [L] i32.
      pieces: of this row.
      cuts: the decisions.
      sentinels: PRE, SUF, MID.
      pad: what fills the row.
      length: slots of the new row; what does not fit is cut.

    >>> import jax.numpy as jnp
    >>> cut = lambda spm: Cuts(*jnp.array([[0, 1], [0, spm], [0, 2], [0, 5]]))
    >>> pieces = Pieces(jnp.array([0, 8]), jnp.array([0, 0]))
    >>> [rearrange(jnp.arange(1, 9), pieces, cut(spm), (-1, -2, -3), 0, 12).tokens.tolist() for spm in (0, 1)]
    [[-1, 1, 2, -2, 6, 7, 8, -3, 3, 4, 5, 0], [-1, -2, 6, 7, 8, -3, 1, 2, 3, 4, 5, 0]]
    """
    segment_ids_J, positions_J = lay(pieces.sizes + pieces.ends + 3 * cuts.moved, length)
    order = order_of(pieces, cuts).at(segment_ids_J)
    suf_J = 1 + order.heads
    mid_J = suf_J + 1 + order.suffixes
    moved_J = cuts.moved[segment_ids_J]
    sentinels_before_J = 1 + (positions_J > suf_J) + (positions_J > mid_J)
    places_J = order.place(positions_J - jnp.where(moved_J, sentinels_before_J, 0))
    tokens_J = tokens_L[jnp.clip(pieces.starts[segment_ids_J] + places_J, 0, tokens_L.shape[0] - 1)]
    kinds_J = kinds_of(places_J, segment_ids_J, pieces, cuts)
    for sentinel, at_J in zip(sentinels, (0, suf_J, mid_J), strict=True):
        here_J = moved_J & (positions_J == at_J)
        tokens_J, kinds_J = jnp.where(here_J, sentinel, tokens_J), jnp.where(here_J, CONTEXT, kinds_J)
    present_J = segment_ids_J > 0
    return Rearranged(jnp.where(present_J, tokens_J, pad), segment_ids_J, positions_J, kinds_J)


def rank(
    segment_ids_L: Array, positions_L: Array, pieces: Pieces, cuts: Cuts, bidirectional: bool
) -> tuple[Array, Array, Array, Array]:
    """Order the attention of a row instead of its text.

    Args:
      segment_ids_L, positions_L: [L] i32.
      pieces: of this row.
      cuts: the decisions.
      bidirectional: all of the prefix and suffix has rank 0: it sees itself both ways, and never the middle.

    Returns:
      ranks_L ([L] i32), next_L ([L] i32, where the label of each token stands), weights_L ([L] f32: 1 where there is
      one) and kinds_L ([L] i32, of the labels).

    >>> import jax.numpy as jnp
    >>> pieces, cuts = Pieces(jnp.array([0, 4]), jnp.array([0, 1])), Cuts(*jnp.array([[0, 1], [0, 0], [0, 1], [0, 2]]))
    >>> ranks, following, weights, kinds = rank(jnp.ones(5, int), jnp.arange(5), pieces, cuts, False)
    >>> ranks.tolist(), following.tolist(), weights.astype(int).tolist(), kinds.tolist()
    ([0, 3, 1, 2, 4], [2, 4, 3, 1, 0], [1, 1, 1, 1, 0], [1, 2, 1, 2, 0])
    """
    order = order_of(pieces, cuts).at(segment_ids_L)
    ranks_L = order.rank(positions_L)
    has_label_L = ranks_L + 1 < (pieces.sizes + pieces.ends)[segment_ids_L]
    next_L = jnp.where(has_label_L, order.place(ranks_L + 1), 0)
    kinds_L = jnp.where(has_label_L, kinds_of(next_L, segment_ids_L, pieces, cuts), PLAIN)
    next_L = jnp.where(has_label_L, next_L + pieces.starts[segment_ids_L], 0)
    if bidirectional:
        context_L = kinds_of(positions_L, segment_ids_L, pieces, cuts) == CONTEXT
        ranks_L = jnp.where(context_L, 0, ranks_L + 1)
    return ranks_L, next_L, has_label_L.astype(jnp.float32), kinds_L
