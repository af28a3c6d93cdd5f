"""Pairs: what the two sides read, what has no room, and that a target sees its own source only."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import packed_batch, tiny, tiny_vocab

from jaxpt.corruption.rows import row_keys
from jaxpt.data.tokenizer import byte_tokenizer
from jaxpt.objectives import Denoising, Seq2Seq
from jaxpt.objectives.sequence_to_sequence import shift_right
from jaxpt.show.look import text_row
from jaxpt.step import make_example
from jaxpt.types import Batch, Example, RowSpec, Snapshot, Sums

VOCAB = tiny_vocab()
EOS, PAD = VOCAB.require("eos", "-"), VOCAB.pad


def corrupted(config: Seq2Seq, batch: Batch) -> Example:
    objective = config.build(VOCAB)
    return jax.device_get(objective.corrupt(Snapshot({}, {}, jnp.int32(0)), batch, jax.random.key(0)))


def row(tokens: list[int], segments: list[int], sentences: list[int]) -> Batch:
    arrays = [np.array([values], np.int32) for values in (tokens, segments, segments, sentences)]
    return Batch(*arrays, np.zeros(1, np.uint32), np.zeros(1, np.int32), np.ones(1, np.float32))


# two pairs: 10 11 12 -> 20 21, and 13 -> 22; a source without a target; padding
ROW = row([10, 11, 12, 20, 21, 13, 22, 14, 0], [1, 1, 1, 1, 1, 2, 2, 3, 0], [0, 0, 0, 1, 1, 0, 1, 0, 0])


def test_both_sides_by_hand():
    example = corrupted(Seq2Seq(), ROW)
    inputs = {name: array[0].tolist() for name, array in example.inputs.items()}
    assert inputs["tokens"] == [10, 11, 12, EOS, 13, EOS, PAD, PAD, PAD]
    assert inputs["segment_ids"] == [1, 1, 1, 1, 2, 2, 0, 0, 0]
    assert inputs["positions"] == [0, 1, 2, 3, 0, 1, 0, 0, 0]
    assert inputs["targets"] == [20, 21, EOS, 22, EOS, PAD, PAD, PAD, PAD]
    assert inputs["decoder_tokens"][:5] == [EOS, 20, 21, EOS, 22]
    assert inputs["decoder_segment_ids"] == [1, 1, 1, 2, 2, 0, 0, 0, 0]
    assert inputs["decoder_positions"] == [0, 1, 2, 0, 1, 0, 0, 0, 0]
    assert example.weights["lm"][0].tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert (inputs["pairs"], inputs["left_out"]) == (2, 0)


def test_further_texts_are_not_read():
    """Room for more texts of an example: whatever follows the target changes nothing."""
    more = row([10, 11, 20, 30, 31, 12, 21, 0, 0], [1, 1, 1, 1, 1, 2, 2, 0, 0], [0, 0, 1, 2, 2, 0, 1, 0, 0])
    inputs = corrupted(Seq2Seq(), more).inputs
    assert inputs["tokens"][0].tolist()[:5] == [10, 11, EOS, 12, EOS]
    assert inputs["targets"][0].tolist()[:5] == [20, EOS, 21, EOS, PAD]


def test_pairs_that_have_no_room_are_left_out_and_counted():
    tight = Seq2Seq(source_share=5 / 9, target_share=5 / 9)
    example = corrupted(tight, ROW)
    assert example.inputs["tokens"].tolist() == [[10, 11, 12, EOS, PAD]]
    assert example.inputs["targets"].tolist() == [[20, 21, EOS, PAD, PAD]]
    assert example.inputs["left_out"].tolist() == [1]
    summary = tight.build(VOCAB).summary
    assert summary is not None
    stats = dict.fromkeys(("tokens", "nll", "correct", "unigram_nll", "special", "bytes"), jnp.ones(()))
    assert float(summary(Sums({}, {}, stats | {"pairs": jnp.ones(()), "left_out": jnp.ones(())}))["left_out"]) == 0.5


def test_rows_of_pairs_are_as_long_as_the_shares_allow():
    rows = Seq2Seq(source_share=0.6, target_share=0.3).build(VOCAB).rows
    raw = rows.tokens(512)
    assert raw == 853 and rows.texts == 2
    batch = packed_batch(rows, VOCAB, 512, 2)
    inputs = corrupted(Seq2Seq(source_share=0.6, target_share=0.3), batch).inputs
    assert inputs["tokens"].shape[1] == 512 and inputs["targets"].shape[1] == 256


def test_a_decoder_reads_the_token_before():
    targets, segments = jnp.array([[7, 8, 9, 5]]), jnp.array([[1, 1, 2, 0]])
    assert shift_right(targets, segments, 2).tolist() == [[2, 7, 2, 2]]


@pytest.mark.parametrize("side", ["tokens", "decoder_tokens"])
def test_a_target_sees_its_own_source_and_its_own_past(side: str):
    """The gradient of one token's loss in every embedded token: exactly 0 outside of what it may see."""
    objective = dataclasses.replace(tiny(Seq2Seq()), label_smoothing=0.0).for_evaluation().build(VOCAB)
    snapshot = Snapshot(objective.init(jax.random.key(0)), {}, jnp.int32(0))
    example = make_example(objective, snapshot, ROW, jax.random.key(0))

    @jax.jit
    def losses(tokens: jax.Array) -> jax.Array:
        changed = example._replace(inputs=example.inputs | {side: tokens})
        return objective.loss(snapshot, changed, row_keys(jax.random.key(1), changed.row_ids)).losses["lm"][0]

    tokens = jnp.asarray(example.inputs[side])
    base = np.asarray(losses(tokens))
    moved = np.stack([np.asarray(losses(tokens.at[0, at].set(40))) != base for at in range(9)])  # [changed, loss]
    segments, ours = example.inputs["segment_ids"][0], example.inputs["decoder_segment_ids"][0]
    for at in range(9):
        for place in np.flatnonzero(np.asarray(ours)):
            if side == "tokens":
                allowed = bool(segments[at] == ours[place])
            else:
                allowed = bool((ours[at] == ours[place]) & (at <= place))
            assert moved[at, place] == allowed, (at, place)


def test_denoising_and_pairs_share_their_networks():
    """What one was trained with, the other can begin from."""
    ours, theirs = (jax.eval_shape(tiny(c).build(VOCAB).init, jax.random.key(0)) for c in (Seq2Seq(), Denoising()))
    assert jax.tree.map(lambda leaf: leaf.shape, ours) == jax.tree.map(lambda leaf: leaf.shape, theirs)
    assert set(ours) == {"trunk", "head"}


def test_a_person_sees_a_pair_of_their_own_texts():
    tokenizer = byte_tokenizer()
    rows = RowSpec("best_fit", suffix=(), texts=2)
    batch = text_row(["Hi. Ho.", "Da", "x", "y"], tokenizer, rows, 16, 0, 0)
    assert batch.sentence_ids[0].tolist() == [0] * 7 + [1] * 2 + [0, 1] + [0] * 5
    assert batch.segment_ids[0].tolist() == [1] * 9 + [2] * 2 + [0] * 5
    with pytest.raises(ValueError, match="--text SOURCE --text TARGET"):
        text_row(["alone"], tokenizer, rows, 16, 0, 0)


@pytest.mark.parametrize(
    "change", [{"source_share": 0.0}, {"target_share": 1.5}, {"packing": "concatenate"}, {"packing": "stream"}]
)
def test_impossible_settings(change: dict):
    with pytest.raises(ValueError, match=f"seq2seq: {next(iter(change))}"):
        Seq2Seq(**change).build(VOCAB)
