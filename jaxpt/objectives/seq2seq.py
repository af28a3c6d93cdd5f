"""Supervised sequence to sequence: write a target text from a source text (Sutskever et al. 2014, arXiv:1409.3215;
Vaswani et al. 2017, arXiv:1706.03762).

    loss = mean over t of the cross-entropy of y[t] given y[..t-1] and the source,   y = the target and [EOS]

Pairs come from `jaxpt data build --fields source target` (or `--aligned FILE FILE`): the source is text 0 of an
example, the target text 1. Several pairs may share a row; each target sees its own source only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpt.corruption.pieces import before, lay
from jaxpt.losses.token_metrics import ratio
from jaxpt.models.encoder_decoder import EncoderDecoderConfig
from jaxpt.models.presets import bart
from jaxpt.objectives.parts import check
from jaxpt.objectives.sequence_to_sequence import sequence_to_sequence, sides, without_dropout
from jaxpt.types import Array, Batch, Example, Key, Objective, Out, Packing, RowSpec, Snapshot, Sums, Vocab


@dataclass(frozen=True)
class Seq2Seq:
    """Prediction of target texts from source texts."""

    network: EncoderDecoderConfig = field(default_factory=lambda: bart("base"))
    """Encoder and decoder; the decoder's settings also hold for the output layer."""
    packing: Packing = "best_fit"
    """How pairs share a row: "best_fit" or "one_document"."""
    source_share: float = 1.0
    """Slots of the encoder's row, as a share of the tokens of a row of pairs. At 1 every pair has room, and much of
    both rows is padding; 0.6 and 0.6 suit texts of like length. Pairs beyond it are left out, see the metrics."""
    target_share: float = 1.0
    """Likewise of the decoder's row."""
    label_smoothing: float = 0.1
    """eps of the target (1 - eps) onehot + eps / V."""

    def build(self, vocab: Vocab) -> Objective:
        """The pure functions; raises ValueError for settings that cannot be, and without [EOS]."""
        for name in ("source_share", "target_share"):
            value = getattr(self, name)
            check(0 < value <= 1, f"seq2seq: {name} is a share in (0, 1], not {value}")
        check(
            self.packing in ("best_fit", "one_document"),
            f'seq2seq: packing="{self.packing}" would cut pairs: choose "best_fit" or "one_document"',
        )
        end = vocab.require("eos", "seq2seq")
        widest = max(self.source_share, self.target_share)

        def corrupt(snapshot: Snapshot, batch: Batch, key: Key) -> Example:
            raw = batch.tokens.shape[1]
            lengths = [math.ceil(share * raw - 1e-6) for share in (self.source_share, self.target_share)]

            def corrupt_row(tokens_L: Array, segment_ids_L: Array, sentence_ids_L: Array):
                pairs = describe_pairs(segment_ids_L, sentence_ids_L)
                source_S, target_S, left_out = fit(pairs, *lengths)
                begin_S = before(pairs.sizes)
                heard = write(tokens_L, begin_S, source_S, lengths[0], end, vocab.pad)
                return heard, write(tokens_L, begin_S + pairs.source, target_S, lengths[1], end, vocab.pad), left_out

            heard, said, left_out_R = jax.vmap(corrupt_row)(batch.tokens, batch.segment_ids, batch.sentence_ids)
            targets_RK, segment_ids_RK, positions_RK = said
            pairs_R = jnp.sum((segment_ids_RK > 0) & (positions_RK == 0), axis=1)
            inputs = sides(heard, targets_RK, segment_ids_RK, positions_RK, end)
            inputs |= {"pairs": pairs_R * batch.valid, "left_out": left_out_R * batch.valid}
            return Example(inputs, batch.row_ids, weights={"lm": (segment_ids_RK > 0).astype(jnp.float32)})

        rows = RowSpec(self.packing, raw_length=lambda length: math.floor(length / widest + 1e-6), texts=2)
        made = sequence_to_sequence(self.network, vocab, rows, corrupt, "seq2seq", label_smoothing=self.label_smoothing)

        def loss(snapshot: Snapshot, example: Example, keys: Array) -> Out:
            out = made.loss(snapshot, example, keys)
            counts = {name: jnp.sum(example.inputs[name]) for name in ("pairs", "left_out")}
            return out._replace(stats=out.stats | counts)

        def summary(sums: Sums) -> dict[str, Array]:
            assert made.summary is not None
            left_out = sums.stats["left_out"]
            return made.summary(sums) | {"left_out": ratio(left_out, left_out + sums.stats["pairs"])}

        return made._replace(loss=loss, summary=summary)

    def for_evaluation(self) -> Seq2Seq:
        """No dropout, no smoothing: the loss is the negative log-likelihood of the targets."""
        return replace(self, network=without_dropout(self.network), label_smoothing=0.0)


class PairSizes(NamedTuple):
    """The documents of a row, by segment id; entry 0 is the padding."""

    sizes: Array  # [S] i32: all tokens
    source: Array  # [S] i32: tokens of text 0, which begins the document
    target: Array  # [S] i32: tokens of text 1, which follows it


def describe_pairs(segment_ids_L: Array, sentence_ids_L: Array) -> PairSizes:
    """Count the tokens of the texts of each document of a row.

    >>> sizes = describe_pairs(jnp.array([1, 1, 1, 2, 2, 0]), jnp.array([0, 0, 1, 0, 1, 0]))
    >>> [counts[:3].tolist() for counts in sizes]
    [[0, 3, 2], [0, 2, 1], [0, 1, 1]]
    """
    present_L = segment_ids_L > 0

    def count(marked_L: Array) -> Array:
        marked_L = (marked_L & present_L).astype(jnp.int32)
        return jnp.zeros(segment_ids_L.shape[0] + 1, jnp.int32).at[segment_ids_L].add(marked_L)

    return PairSizes(count(present_L), count(sentence_ids_L == 0), count(sentence_ids_L == 1))


def fit(pairs: PairSizes, source_room: int, target_room: int) -> tuple[Array, Array, Array]:
    """Say how many tokens of each pair are read and written: all of them, or none from the first that has no room.

    Args:
      pairs: of a row.
      source_room, target_room: slots, one of which goes to [EOS] for each pair.

    Returns:
      source_S, target_S ([S] i32, with the [EOS]; 0 of what is left out) and left_out ([] i32: pairs).

    >>> [x.tolist() for x in fit(PairSizes(*jnp.array([[0, 5, 4], [0, 3, 2], [0, 2, 2]])), 8, 5)]
    [[0, 4, 0], [0, 3, 0], 1]
    """
    is_pair_S = (pairs.source > 0) & (pairs.target > 0)
    source_S, target_S = (jnp.where(is_pair_S, tokens_S + 1, 0) for tokens_S in (pairs.source, pairs.target))
    fits_S = is_pair_S & (jnp.cumsum(source_S) <= source_room) & (jnp.cumsum(target_S) <= target_room)
    return jnp.where(fits_S, source_S, 0), jnp.where(fits_S, target_S, 0), jnp.sum(is_pair_S & ~fits_S)


def write(
    tokens_L: Array, begin_S: Array, sizes_S: Array, length: int, end: int, pad: int
) -> tuple[Array, Array, Array]:
    """Write one text of each document, and [EOS] behind it, into a row of their own.

    Args:
      tokens_L: [L] i32.
      begin_S: [S] i32, where the text begins.
      sizes_S: [S] i32, its tokens with the [EOS]; 0 = the document is left out.
      length: slots of the row, J.
      end: [EOS].
      pad: what fills the row.

    Returns:
      tokens_J, segment_ids_J and positions_J, [J] i32.

    >>> row = write(jnp.array([5, 6, 7, 8, 9]), jnp.array([0, 1, 4]), jnp.array([0, 3, 2]), 6, end=-1, pad=0)
    >>> [x.tolist() for x in row]
    [[6, 7, -1, 9, -1, 0], [1, 1, 1, 2, 2, 0], [0, 1, 2, 0, 1, 0]]
    """
    segment_ids_J, positions_J = lay(sizes_S, length)
    places_J = jnp.minimum(begin_S[segment_ids_J] + positions_J, tokens_L.shape[0] - 1)
    tokens_J = jnp.where(positions_J == sizes_S[segment_ids_J] - 1, end, tokens_L[places_J])
    return jnp.where(segment_ids_J > 0, tokens_J, pad), segment_ids_J, positions_J
