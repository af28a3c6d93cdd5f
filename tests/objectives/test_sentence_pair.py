"""Sentence pairs: the whole objective, from rows of text to losses."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import packed_batch, tiny, tiny_vocab

from jaxpt.corruption.selection import Informative, WholeWord
from jaxpt.objectives.masked_lm import MaskedLM
from jaxpt.objectives.sentence_pair import SentencePair
from jaxpt.step import finish, make_eval_step, make_example
from jaxpt.types import Batch, Example, Objective, Snapshot

VOCAB = tiny_vocab()
NEXT = tiny(SentencePair(kind="next", masked=MaskedLM(selection=WholeWord(unit="phrase"))))


@functools.cache
def built(config: SentencePair = NEXT) -> tuple[Objective, dict, Batch]:
    objective = config.build(VOCAB)
    return objective, objective.init(jax.random.key(0)), packed_batch(objective.rows, VOCAB, length=48, size=16)


@functools.cache
def corruption(config: SentencePair = NEXT):
    objective = config.build(VOCAB)
    snapshot = Snapshot({}, {}, jnp.int32(0))
    return jax.jit(lambda batch, key: make_example(objective, snapshot, batch, key))


def example_of(batch: Batch, seed: int = 0) -> Example:
    return jax.device_get(corruption()(batch, jax.random.key(seed)))


def test_rows_have_the_models_length_and_ask_for_what_is_read():
    objective, _, batch = built()
    assert objective.rows.fields == ("phrase_starts", "document_ids")
    assert batch.tokens.shape == (16, 48 - 6)
    example = example_of(batch)
    assert example.inputs["tokens"].shape == (16, 48)
    assert example.weights["next"].shape == (16, 2)
    assert set(example.weights) == {"next", "mlm"}
    alone = SentencePair(packing="one_document", masked=None).build(VOCAB)
    assert alone.rows.reserve == 3 and alone.rows.fields == () and set(alone.specs) == {"trunk", "pooler", "pair"}


def test_tokens_are_hidden_in_the_assembled_pair():
    """Originals at the targets; [CLS] and [SEP] stay; a foreign text is one of the row with the next id."""
    _, _, batch = built()
    inputs = example_of(batch).inputs
    original = inputs["tokens"].copy()
    used = example_of(batch).weights["mlm"] > 0
    rows = np.nonzero(used)[0]
    original[rows, inputs["target_positions"][used]] = inputs["targets"][used]
    assert (inputs["tokens"] == VOCAB.mask).any()
    for row in range(16):
        for pair in range(2):
            inside = inputs["segment_ids"][row] == pair + 1
            assert (original[row][inside] == VOCAB.cls).tolist() == [True] + [False] * (inside.sum() - 1)
            first = original[row][inside & (inputs["token_types"][row] == 0)][1:-1].tolist()
            second = original[row][inside & (inputs["token_types"][row] == 1)][:-1].tolist()
            source = (row + 1) % 16 if inputs["is_negative"][row, pair] else row
            assert " ".join(map(str, first)) in " ".join(map(str, batch.tokens[row].tolist()))
            assert " ".join(map(str, second)) in " ".join(map(str, batch.tokens[source].tolist()))


def test_the_neighbour_follows_from_the_row_ids():
    _, _, batch = built()
    order = np.random.default_rng(0).permutation(16)
    shuffled = example_of(jax.tree.map(lambda leaf: leaf[order], batch))
    straight = example_of(batch)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[order]), shuffled, straight)


def test_a_row_of_the_same_document_weighs_nothing():
    _, _, batch = built()
    one = batch._replace(extras=batch.extras | {"document_ids": np.zeros_like(batch.tokens)})
    example = example_of(one)
    negative = example.inputs["is_negative"] > 0
    assert negative.any() and not example.weights["next"][negative].any()
    assert example.weights["next"][~negative].any()


def test_losses_at_the_start_are_those_of_theory():
    objective, params, batch = built()
    snapshot = Snapshot(params, {}, jnp.int32(0))

    @jax.jit
    def losses(example: Example):
        keys = jax.random.split(jax.random.key(1), 16)
        return objective.loss(snapshot, example, keys).losses

    example = example_of(batch)
    straight = jax.device_get(losses(example))
    weight = example.weights["next"]
    assert (straight["next"] * weight).sum() / weight.sum() == pytest.approx(math.log(2), abs=0.02)
    weight = example.weights["mlm"]
    assert (straight["mlm"] * weight).sum() / weight.sum() == pytest.approx(math.log(VOCAB.size), abs=0.2)
    # the second text has a type of its own, and each row its own loss
    inputs = example.inputs | {"token_types": np.zeros_like(example.inputs["token_types"])}
    assert (jax.device_get(losses(example._replace(inputs=inputs)))["next"] != straight["next"]).all(1).any()
    tokens = example.inputs["tokens"].copy()
    tokens[3, 1:9] = 20
    disturbed = jax.device_get(losses(example._replace(inputs=example.inputs | {"tokens": tokens})))
    assert (disturbed["next"] != straight["next"]).any(1).tolist() == [row == 3 for row in range(16)]


def test_metrics():
    objective, params, batch = built(tiny(SentencePair(masked=None)))
    sums = jax.jit(make_eval_step(objective, seed=0))(params, {}, jnp.int32(0), batch)
    metrics = finish(objective, sums)
    assert set(metrics) == {"loss/order", "order_accuracy", "order_negative"}
    assert 0 < metrics["order_negative"] < 1


def test_settings_that_cannot_be_are_refused():
    for changes, message in (
        ({"pairs": 0}, "at least 1 pair"),
        ({"short_rate": 1.5}, "short_rate is a share"),
        ({"scale": -1.0}, "cannot be negative"),
        ({"masked": MaskedLM(selection=Informative())}, "does without"),
    ):
        with pytest.raises(ValueError, match=message):
            SentencePair(**changes).build(VOCAB)
