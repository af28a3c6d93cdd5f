"""Permutation language modelling: predict tokens in a random order (XLNet, Yang et al. 2019, arXiv:1906.08237).

    loss = mean over the targets t of -log p(x[t] | the tokens before t in the order)

The targets are a share of the tokens; what is no target stands first in the order, all at once, so that every target
sees it. A place that sees its own token cannot predict it, so the stack reads [content ; queries]: all tokens, and for
each target a [MASK] at its position that sees what the token at that position sees, without the token itself. No token
sees a query. This is the same computation as XLNet's two streams, with any attention and without a layer of its own.

With a memory, what every layer read of the last tokens of a row is kept, without gradient, for the next row of the
same lane of the batch, whose tokens look at it where the document goes on (Transformer-XL, Dai et al. 2019,
arXiv:1901.02860).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.corruption.choose import ranks_within
from jaxpt.corruption.compact import compact
from jaxpt.corruption.rows import describe, row_keys
from jaxpt.corruption.selection import Informative, Selection, Spans, fields_of
from jaxpt.losses.cross_entropy import linear_cross_entropy
from jaxpt.losses.token_metrics import token_metrics, token_sums, token_tables
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import lm_head
from jaxpt.models.presets import xlnet
from jaxpt.models.transformer import embedding_table, transformer
from jaxpt.objectives.memory import forgotten, join, key_places, recall, remembered
from jaxpt.objectives.parts import check, check_length, initializer_of, specs_of, without_dropout
from jaxpt.types import (
    Array,
    AttentionPattern,
    Batch,
    Example,
    Key,
    Objective,
    Out,
    Packing,
    Params,
    RowSpec,
    Snapshot,
    Sums,
    Tree,
    View,
    Vocab,
)

UNSEEN = np.iinfo(np.int32).max  # the rank of a key that nothing sees


@dataclass(frozen=True)
class PermutationLM:
    """Prediction of some tokens in a random order of all of them."""

    encoder: TransformerConfig = field(default_factory=lambda: xlnet("base"))
    """The Transformer."""
    packing: Packing = "concatenate"
    """How documents share a row."""
    rate: float = 1 / 6
    """Share of the tokens that is predicted."""
    selection: Selection = field(default_factory=lambda: Spans(lengths=(60, 30, 20, 15, 12), unit="word"))
    """Which tokens: by default n-grams of 1 to 5 words, how frequent in proportion to 1/n."""
    stretches: int = 2
    """Parts of a row with an order of their own; a token sees all earlier parts of its document and no later one.
    XLNet's are two: the text that its memory is made of, and the rest."""
    block: int | None = None
    """Tokens that are permuted among themselves; the blocks of a part follow each other. None = a whole part."""
    memory: int = 0
    """Tokens of the row before that each layer looks at, too; needs ``packing="stream"`` and ``rows``. XLNet: 384."""
    rows: int = 0
    """Rows of a batch, whose memories are kept from step to step; 0 = no memory."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be and missing special tokens."""
        self._check()
        separators = vocab.require("sep", "permutation_lm"), vocab.require("cls", "permutation_lm")
        mask_id = vocab.require("mask", "permutation_lm")
        encoder, head = transformer(self.encoder, vocab.size), lm_head(self.encoder, vocab.size)
        networks, tables = {"trunk": encoder, "head": head}, token_tables(vocab)

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            length = batch.tokens.shape[1]
            stretch = -(-length // self.stretches)
            room = max(1, self.selection.room(self.rate, length))
            check_length(self.encoder, length + room, f"permutation_lm, with its {room} queries")

            def draw_row(row_key: Key, tokens_L: Array, segments_L: Array, sentences_L: Array, phrases_L: Array | None):
                selection_key, order_key = jax.random.split(row_key)
                row = describe(tokens_L, segments_L, sentences_L, vocab, phrases_L)
                target_L = self.selection.draw(selection_key, self.rate, row, room)
                order_L = draw_order(jax.random.bits(order_key, (length,), jnp.uint32), self.block or stretch, stretch)
                separator_L = (tokens_L == separators[0]) | (tokens_L == separators[1])
                return *compact(target_L, room), rank(order_L, target_L | separator_L, stretch)

            arrays = batch.tokens, batch.segment_ids, batch.sentence_ids, batch.extras.get("phrase_starts")
            places_RK, used_RK, ranks_RL = jax.vmap(draw_row)(row_keys(key, batch.row_ids), *arrays)
            at = lambda array_RL: jnp.take_along_axis(array_RL, places_RK, axis=1)  # noqa: E731
            inputs = {
                "tokens": join(batch.tokens, jnp.full_like(places_RK, mask_id)),
                "positions": join(batch.positions, at(batch.positions)),
                "pattern": pattern_of(batch.segment_ids, batch.positions, ranks_RL, places_RK, used_RK),
                "targets": at(batch.tokens),
            }
            if self.memory:
                too_long = f"permutation_lm: a memory of {self.memory} tokens of rows of {length}: lower memory"
                check(self.memory <= length, too_long)
                inputs |= recall(self.memory, inputs["pattern"], snapshot, batch)
            return Example(inputs, batch.row_ids, weights={"plm": used_RK.astype(jnp.float32)})

        def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
            inputs, params = example.inputs, snapshot.params
            arrays = inputs["tokens"], inputs["pattern"], inputs["positions"]
            length = inputs["tokens"].shape[1] - inputs["targets"].shape[1]
            if self.memory:
                last = {"memory": inputs["memory"].swapaxes(0, 1), "return_inputs": slice(length - self.memory, length)}
                hidden_RJD, read_NRMD = encoder.apply(params["trunk"], *arrays, keys=keys, **last)
                features = {"memory": read_NRMD.swapaxes(0, 1)}
            else:
                hidden_RJD, features = encoder.apply(params["trunk"], *arrays, keys=keys), {}
            readout = head.apply(params["head"], hidden_RJD[:, length:], embedding_table(params["trunk"]))
            result = linear_cross_entropy(readout, inputs["targets"])
            sums = token_sums(result, inputs["targets"], example.weights["plm"], tables)
            return Out({"plm": result.loss}, sums, features)

        def start(params: Params, key: Key) -> Tree:
            return forgotten(self.encoder, self.rows, self.memory)

        def advance(snapshot: Snapshot, features: dict[str, Array], example: Example) -> tuple[Params, Tree]:
            size = example.row_ids.shape[0]
            check(size == self.rows, f"permutation_lm: rows={self.rows}, and the batch has {size}: set rows to {size}")
            return snapshot.params, remembered(features["memory"], example.inputs["documents"], snapshot.step)

        def summary(sums: Sums) -> dict[str, Array]:
            return token_metrics(sums.stats, likelihood=False)

        def views(snapshot: Snapshot, example: Example) -> dict[str, View]:
            inputs, weights_RK = example.inputs, example.weights["plm"]
            tokens_RJ = inputs["tokens"]
            pattern = key_places(inputs["pattern"], slice(self.memory, None))  # of the row alone
            first = tokens_RJ.shape[1] - weights_RK.shape[1]
            places_RK = jnp.broadcast_to(first + jnp.arange(weights_RK.shape[1]), weights_RK.shape)
            asked = inputs["targets"], places_RK, weights_RK
            return {"encoder": View(tokens_RJ, pattern.query_segments, inputs["positions"], pattern, *asked)}

        return Objective(
            rows=RowSpec(
                self.packing,
                suffix=separators,
                fields=fields_of(self.selection) + (("document_ids",) if self.memory else ()),
            ),
            specs=specs_of(networks),
            init=initializer_of(networks),
            corrupt=corrupt,
            loss=loss,
            scale={"plm": 1.0},
            start=start if self.memory else None,
            advance=advance if self.memory else None,
            summary=summary,
            views=views,
        )

    def for_evaluation(self) -> PermutationLM:
        """No dropout and no memory: held-out rows are read one by one."""
        return replace(self, encoder=without_dropout(self.encoder), memory=0, rows=0)

    def _check(self) -> None:
        check(0 < self.rate <= 1, f"permutation_lm: rate is a share in (0, 1], not {self.rate}")
        check(
            not isinstance(self.selection, Informative),
            "permutation_lm: Informative selects by a masked model's scores, of which there are none: choose another "
            "selection",
        )
        check(self.stretches >= 1, f"permutation_lm: a row has at least 1 stretch, not {self.stretches}")
        check(self.block is None or self.block >= 1, f"permutation_lm: block is at least 1 token, not {self.block}")
        check(self.memory >= 0, f"permutation_lm: memory is a number of tokens, not {self.memory}")
        check(
            not self.memory or (self.packing == "stream" and self.rows > 0),
            'permutation_lm: a memory needs rows that go on where the row before ended, and their number: set packing="'
            'stream" and rows to the batch size',
        )
        check(
            not self.memory or self.encoder.positions == "transformer_xl",
            'permutation_lm: a memory needs relative positions: set encoder.positions to "transformer_xl"',
        )


def draw_order(bits_L: Array, block: int, stretch: int) -> Array:
    """Draw the order of a row: the blocks of each stretch after each other, inside a block all orders equally likely.

    Args:
      bits_L: [L] u32, random.
      block: tokens that are permuted among themselves.
      stretch: tokens of a stretch, where blocks begin anew.

    Returns:
      [L] i32: each token's place in the order, a permutation of 0 .. L-1.

    >>> draw_order(jnp.array([5, 3, 9, 4, 1], jnp.uint32), block=2, stretch=3).tolist()
    [1, 0, 2, 4, 3]
    """
    places_L = jnp.arange(bits_L.shape[0], dtype=jnp.int32)
    begins_L = places_L - places_L % stretch % block  # of the block
    return begins_L + ranks_within(bits_L, jnp.ones_like(bits_L, bool), begins_L)


def rank(order_L: Array, ordered_L: Array, stretch: int) -> Array:
    """Turn an order into the ranks of an attention pattern.

    In each stretch the tokens outside the order come first, all with one rank, and see each other; then the ordered
    ones, each with a rank of its own. A token sees itself and what stands before it; its query has the rank below.

    Args:
      order_L: [L] i32, ``draw_order``.
      ordered_L: [L] bool: targets and separators.
      stretch: tokens of a stretch.

    Returns:
      [L] i32.

    >>> rank(jnp.array([3, 0, 5, 1, 4, 2]), jnp.array([False, True, False, True, True, True]), stretch=6).tolist()
    [0, 1, 0, 2, 5, 3]
    """
    stretch_L = jnp.arange(order_L.shape[0], dtype=jnp.int32) // stretch
    return stretch_L + jnp.where(ordered_L, order_L + 1, stretch_L * stretch)


def pattern_of(
    segments_RL: Array, positions_RL: Array, ranks_RL: Array, places_RK: Array, used_RK: Array
) -> AttentionPattern:
    """Say who sees whom in [content ; queries].

    Args:
      segments_RL, positions_RL: [R, L] i32 of the tokens.
      ranks_RL: [R, L] i32, ``rank``.
      places_RK: [R, K] i32, the places of the targets.
      used_RK: [R, K] bool; the other slots are padding.
    """
    at = lambda array_RL: jnp.take_along_axis(array_RL, places_RK, axis=1)  # noqa: E731
    segments_RJ = join(segments_RL, jnp.where(used_RK, at(segments_RL), 0))
    positions_RJ = join(positions_RL, at(positions_RL))
    query_ranks_RJ = join(ranks_RL, at(ranks_RL) - 1)
    key_ranks_RJ = join(ranks_RL, jnp.full_like(places_RK, UNSEEN))
    return AttentionPattern(segments_RJ, segments_RJ, query_ranks_RJ, key_ranks_RJ, positions_RJ, positions_RJ)
