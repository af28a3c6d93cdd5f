"""Masked language modelling: what is hidden, what is predicted, and the gathered projection."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import packed_batch, tiny_vocab

from jaxpt.corruption.selection import FixedCount, Independent, Spans, WholeWord
from jaxpt.losses.cross_entropy import logits_of
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import mlm_head
from jaxpt.models.patterns import bidirectional
from jaxpt.models.transformer import embedding_table, transformer
from jaxpt.objectives.masked_lm import MaskedLM
from jaxpt.step import batch_gradient, finish, make_example
from jaxpt.types import Example, Snapshot, Sums

VOCAB = tiny_vocab()
ENCODER = TransformerConfig(
    depth=2, width=16, heads=2, max_length=64, norm_placement="post", embedding_norm=True, final_norm=False,
    logits_bias=True, layers="unroll",
)  # fmt: skip
CONFIG = MaskedLM(encoder=ENCODER)
ROWS = CONFIG.build(VOCAB).rows
BATCH = packed_batch(ROWS, VOCAB, length=64, size=32)
CANDIDATES = ~VOCAB.is_special[BATCH.tokens]


@functools.cache
def built(config: MaskedLM = CONFIG):
    objective = config.build(VOCAB)
    return objective, jax.jit(objective.init)(jax.random.key(0))


@functools.cache
def corruption(config: MaskedLM):
    objective = config.build(VOCAB)
    return jax.jit(lambda batch, key, step: make_example(objective, Snapshot({}, {}, step), batch, key))


def corrupted(config: MaskedLM, seed: int = 0, step: int = 0) -> Example:
    return jax.device_get(corruption(config)(BATCH, jax.random.key(seed), jnp.int32(step)))


def selected(example: Example) -> np.ndarray:
    mask = np.zeros(BATCH.tokens.shape, bool)
    for row, places, weights in zip(mask, example.inputs["target_positions"], example.weights["mlm"], strict=True):
        row[places[weights > 0]] = True
    return mask


def with_(**changes) -> MaskedLM:
    return dataclasses.replace(CONFIG, **changes)


SHARED = {
    per: with_(selection=Spans(unit="word"), rate=0.3, mask=0.5, random=0.0, decide_per=per)
    for per in ("token", "word", "span")
}
CASES = [
    CONFIG,
    with_(selection=Independent(), rate=0.4),
    with_(selection=WholeWord(), mask=0.0, random=1.0),
    *SHARED.values(),
]


@pytest.mark.parametrize("config", CASES, ids=lambda config: f"{type(config.selection).__name__}-{config.decide_per}")
def test_targets_are_the_originals_and_the_rest_is_untouched(config):
    for seed in range(4):
        example = corrupted(config, seed)
        mask, inputs = selected(example), example.inputs["tokens"]
        places, weights = example.inputs["target_positions"], example.weights["mlm"]
        assert weights.dtype == np.float32
        assert mask.sum() == weights.sum()  # no place twice
        assert mask.any()
        assert not (mask & ~CANDIDATES).any()  # neither [CLS], [SEP] nor padding
        originals = np.take_along_axis(BATCH.tokens, places, axis=1)
        assert (example.inputs["targets"] == originals)[weights > 0].all()
        assert (inputs == BATCH.tokens)[~mask].all()
        allowed = (inputs == VOCAB.mask) | ~VOCAB.is_special[inputs]
        assert allowed[mask].all()
        in_order = np.diff(np.where(weights > 0, places, 999), axis=1) >= 0
        assert in_order.all()


def test_eighty_ten_ten():
    actions = np.zeros(3)
    for seed in range(30):
        example = corrupted(CONFIG, seed)
        mask, inputs = selected(example), example.inputs["tokens"]
        hidden, same = inputs == VOCAB.mask, inputs == BATCH.tokens
        actions += [(mask & hidden).sum(), (mask & ~hidden & ~same).sum(), (mask & same).sum()]
    ordinary = (~VOCAB.is_special).sum()
    shares = np.array([0.8, 0.1 * (1 - 1 / ordinary), 0.1 * (1 + 1 / ordinary)])
    assert actions.sum() > 3000
    np.testing.assert_allclose(actions / actions.sum(), shares, atol=4 * np.sqrt(0.16 / actions.sum()))


@pytest.mark.parametrize("per", list(SHARED))
def test_who_shares_the_choice(per):
    mixed = []
    for seed in range(6):
        example = corrupted(SHARED[per], seed)
        mask, hidden = selected(example), example.inputs["tokens"] == VOCAB.mask
        assert not (hidden & ~mask).any()
        starts = {
            "token": np.ones_like(mask),
            "word": VOCAB.starts_word[BATCH.tokens] | VOCAB.is_special[np.roll(BATCH.tokens, 1, axis=1)],
            "span": mask & ~np.roll(mask, 1, axis=1),
        }
        for kind, start in starts.items():
            if kind == "word":
                start = start | (BATCH.sentence_ids != np.roll(BATCH.sentence_ids, 1, axis=1))
            unit = np.cumsum(start.ravel())[mask.ravel()]
            share = np.bincount(unit, hidden[mask])[np.unique(unit)] / np.bincount(unit)[np.unique(unit)]
            mixed.append((kind, bool(((share > 0) & (share < 1)).any())))
    found = {kind: any(value for name, value in mixed if name == kind) for kind in ("token", "word", "span")}
    whole = {"token": {"token"}, "word": {"token", "word"}, "span": {"token", "word", "span"}}[per]
    assert found == {kind: kind not in whole for kind in found}


def test_masks_change_from_step_to_step():
    first, second = corrupted(CONFIG, 0), corrupted(CONFIG, 1)
    assert (selected(first) != selected(second)).any(axis=1).mean() > 0.9


def test_the_rate_follows_its_schedule_under_one_compilation():
    config = with_(rate=0.4, final_rate=0.1, rate_steps=100, selection=FixedCount(rounding="nearest"))
    rates = {}
    for step in (0, 50, 100, 200):
        example = corrupted(config, 0, step)
        assert example.weights["mlm"].shape == (32, 26)  # room for the highest rate
        rates[step] = example.weights["mlm"].sum() / CANDIDATES.sum()
    assert rates == pytest.approx({0: 0.4, 50: 0.25, 100: 0.1, 200: 0.1}, abs=0.01)
    assert corruption(config)._cache_size() == 1


def test_rate_zero_hides_nothing_and_rate_one_hides_all():
    nothing = corrupted(with_(rate=0.0))
    assert nothing.weights["mlm"].sum() == 0
    np.testing.assert_array_equal(nothing.inputs["tokens"], BATCH.tokens)
    everything = corrupted(with_(rate=1.0, mask=1.0, random=0.0))
    np.testing.assert_array_equal(everything.inputs["tokens"], np.where(CANDIDATES, VOCAB.mask, BATCH.tokens))


def full_logits_loss(params: dict, example: Example, mask: np.ndarray) -> jax.Array:
    """The same loss by projecting every position: nothing of the objective's own ``loss`` is used."""
    inputs = example.inputs
    encoder, head = transformer(ENCODER, VOCAB.size), mlm_head(ENCODER, VOCAB.size)
    pattern = bidirectional(inputs["segment_ids"], inputs["positions"])
    hidden = encoder.apply(params["trunk"], inputs["tokens"], pattern, inputs["positions"])
    logits = logits_of(head.apply(params["head"], hidden, embedding_table(params["trunk"])))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(BATCH.tokens))
    return jnp.sum(losses * mask) / mask.sum()


def test_gathered_and_full_logits_have_the_same_loss_and_gradients():
    objective, params = built()
    params = jax.tree.map(lambda leaf: leaf + 0.02 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    example = corrupted(CONFIG)
    mask = selected(example)
    keys = jax.random.split(jax.random.key(0), 32)
    assert (example.weights["mlm"] == 0).any()  # pad slots, which all point to place 0

    @jax.jit
    def gradient_of(params: dict, example: Example):
        return batch_gradient(objective, objective.specs, Snapshot(params, {}, jnp.int32(0)), example, keys, 1)

    gathered = gradient_of(params, example)
    loss, gradient = jax.jit(jax.value_and_grad(full_logits_loss))(params, example, mask)
    np.testing.assert_allclose(gathered.losses["mlm"] / mask.sum(), loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gathered.grads, gradient)
    assert gathered.grads["head"]["bias"].any()


def test_packed_and_separate_rows_give_the_same_losses():
    """One packed row, and its documents cut out of the corrupted row, each at the start of a row of its own."""
    objective, params = built()
    packed = corrupted(CASES[1], seed=3)
    row, mask = 0, selected(packed)[0]
    room = packed.weights["mlm"].shape[1]
    inputs = {name: np.zeros((3, 64), np.int32) for name in ("tokens", "segment_ids", "positions")}
    places, targets = np.zeros((3, room), np.int32), np.zeros((3, room), np.int32)
    weights = np.zeros((3, room), np.float32)
    for document in range(3):
        where = np.flatnonzero(BATCH.segment_ids[row] == document + 1)
        inputs["tokens"][document, : len(where)] = packed.inputs["tokens"][row, where]
        inputs["segment_ids"][document, : len(where)] = 1
        inputs["positions"][document, : len(where)] = np.arange(len(where))
        inside = np.flatnonzero(mask[where])
        places[document, : len(inside)], weights[document, : len(inside)] = inside, 1
        targets[document, : len(inside)] = BATCH.tokens[row, where[inside]]
    separate = Example(
        inputs | {"target_positions": places, "targets": targets}, np.arange(3, dtype=np.uint32), {"mlm": weights}
    )
    loss = jax.jit(lambda example: objective.loss(Snapshot(params, {}, jnp.int32(0)), example, None).losses["mlm"])
    whole = np.asarray(loss(jax.tree.map(lambda leaf: jnp.asarray(leaf[:1]), packed)))[packed.weights["mlm"][:1] > 0]
    parts = np.asarray(loss(jax.tree.map(jnp.asarray, separate)))[weights > 0]
    assert len(whole) > 5
    np.testing.assert_allclose(whole, parts, rtol=1e-5)


def test_metrics_are_those_of_the_scored_positions():
    objective, params = built()
    example = corrupted(CONFIG)
    keys = jax.random.split(jax.random.key(0), 32)
    out = jax.jit(objective.loss)(Snapshot(params, {}, jnp.int32(0)), example, keys)
    weights = np.asarray(example.weights["mlm"])
    losses = {"mlm": jnp.sum(out.losses["mlm"] * weights)}
    metrics = finish(objective, Sums(losses, {"mlm": weights.sum()}, out.stats))
    assert float(metrics["nll"]) == pytest.approx(float(metrics["loss/mlm"]), rel=1e-5)
    assert float(metrics["nll"]) == pytest.approx(np.log(VOCAB.size), rel=0.05)  # a fresh model guesses
    counts = np.where(VOCAB.is_special, 0, VOCAB.unigram_counts + 1)
    probability = (counts / counts.sum())[np.asarray(example.inputs["targets"])[weights > 0]]
    assert float(metrics["unigram_loss"]) == pytest.approx(-np.log(probability).mean(), rel=1e-5)
    assert "bits_per_byte" not in metrics


def test_evaluation_settings():
    config = MaskedLM(
        encoder=dataclasses.replace(ENCODER, dropout=0.1, attention_dropout=0.1),
        rate=0.4, final_rate=0.3, rate_steps=10, selection=Spans(), label_smoothing=0.1,
    )  # fmt: skip
    assert config.for_evaluation() == MaskedLM(encoder=ENCODER, rate=0.15, rate_steps=10, selection=Spans())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 1.5}, "rate"),
        ({"mask": -0.1}, "mask"),
        ({"mask": 0.8, "random": 0.3}, r"mask \+ random"),
        ({"final_rate": 0.3}, "rate_steps"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        with_(**changes).build(VOCAB)


@pytest.mark.parametrize("token", ["mask", "cls", "sep"])
def test_a_tokenizer_without_the_special_token_is_refused(token):
    with pytest.raises(ValueError, match=rf"masked_lm needs a \[{token.upper()}\] token"):
        CONFIG.build(dataclasses.replace(VOCAB, **{token: None}))


def test_rows_longer_than_the_position_table_are_refused():
    objective = MaskedLM(encoder=dataclasses.replace(ENCODER, max_length=32)).build(VOCAB)
    with pytest.raises(ValueError, match="max_length=32"):
        objective.corrupt(Snapshot({}, {}, jnp.int32(0)), BATCH, jax.random.key(0))
