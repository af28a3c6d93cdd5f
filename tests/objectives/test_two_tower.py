"""Two towers: which network reads which text, CLIP's and SigLIP's loss, the learned temperature and its bound."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import packed_batch, tiny_vocab

from jaxpt.corruption.rows import row_keys
from jaxpt.models.config import TransformerConfig
from jaxpt.objectives.two_tower import TwoTower
from jaxpt.optimizer import OptimizerConfig, make_optimizer
from jaxpt.step import finish, initial_state, make_eval_step, make_example, make_train_step
from jaxpt.types import Batch, Example, Snapshot, Sums

VOCAB = tiny_vocab()
FIRST = TransformerConfig(depth=1, width=16, heads=2, positions="rotary", layers="unroll")
CONFIG = TwoTower(first=FIRST, second=dataclasses.replace(FIRST, width=8), projection=12)
BATCH = packed_batch(CONFIG.build(VOCAB).rows, VOCAB, length=16)


@functools.cache
def passes(config: TwoTower):
    """(params, batch) -> (vectors [R, 2, E], sums, gradient of the loss)."""
    objective = config.build(VOCAB)
    assert objective.couple is not None

    @jax.jit
    def run(params: dict, batch: Batch):
        snapshot = Snapshot(params, {}, jnp.int32(0))
        example = make_example(objective, snapshot, batch, jax.random.key(0))

        def loss(params: dict):
            now = Snapshot(params, {}, jnp.int32(0))
            features = objective.loss(now, example, row_keys(jax.random.key(1), example.row_ids)).features
            losses, stats = objective.couple(now, features, example)
            sums = Sums({"contrastive": losses["contrastive"].sum()}, {"contrastive": jnp.float32(8)}, stats)
            return sums.losses["contrastive"] / 8, (features["vectors"], sums)

        grads, (vectors, sums) = jax.grad(loss, has_aux=True)(params)
        return vectors, sums, grads

    return lambda params, batch: jax.device_get(run(params, batch))


def alone(batch: Batch, text: int) -> Batch:
    """Rows of one text each, from the first place on, as ``embed`` takes them."""
    mine = (batch.segment_ids == 1) & (batch.sentence_ids == text)
    order = np.argsort(~mine, axis=1, kind="stable")
    moved = [np.take_along_axis(x * mine, order, axis=1)[:, :14] for x in (batch.tokens, batch.segment_ids)]
    return batch._replace(tokens=moved[0], segment_ids=moved[1], sentence_ids=np.zeros_like(moved[0]))


@functools.cache
def params(config: TwoTower = CONFIG) -> dict:
    made = jax.jit(config.build(VOCAB).init)(jax.random.key(3))
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, made)  # so that texts differ


@functools.cache
def run(config: TwoTower = CONFIG):
    vectors, sums, grads = passes(config)(params(config), BATCH)
    return np.moveaxis(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), 1, 0), sums, grads


def test_each_text_is_embedded_by_its_tower():
    objective = CONFIG.build(VOCAB)
    assert objective.embed is not None
    embed = jax.jit(objective.embed, static_argnums=2)
    for text, units in enumerate(run()[0]):
        vectors = embed(Snapshot(params(), {}, jnp.int32(0)), alone(BATCH, text), text)
        assert vectors.shape == (8, 12)
        np.testing.assert_allclose(
            vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), units, rtol=1e-4, atol=1e-5
        )


def test_softmax_from_both_sides():
    (first, second), sums, grads = run()
    logits = first @ second.T / 0.07
    want = sum(optax.softmax_cross_entropy_with_integer_labels(x, np.arange(8)).sum() for x in (logits, logits.T)) / 2
    assert sums.losses["contrastive"] == pytest.approx(float(want), rel=1e-3)
    metrics = finish(CONFIG.build(VOCAB), sums)
    assert metrics["temperature"] == pytest.approx(0.07, rel=1e-5)
    assert metrics["alignment"] == pytest.approx(np.square(first - second).sum(1).mean(), rel=1e-3)
    found = ((logits.argmax(1) == np.arange(8)).mean() + (logits.argmax(0) == np.arange(8)).mean()) / 2
    assert metrics["text_accuracy"] == pytest.approx(found)
    for name, units in (("spread", first), ("second_spread", second)):
        assert metrics[name] == pytest.approx(1 - np.square(units.mean(0)).sum(), rel=1e-3)
    assert set(grads) == {"trunk", "second_trunk", "projection", "second_projection", "similarity"}
    assert grads["similarity"]["log_scale"] != 0


def test_sigmoid_of_every_combination():
    config = dataclasses.replace(CONFIG, loss="sigmoid", initial_scale=10.0)
    (first, second), sums, grads = run(config)
    want = optax.sigmoid_binary_cross_entropy(10 * first @ second.T - 10, np.eye(8)).sum()
    assert sums.losses["contrastive"] == pytest.approx(float(want), rel=1e-3)
    metrics = finish(config.build(VOCAB), sums)
    assert metrics["bias"] == -10 and metrics["temperature"] == pytest.approx(0.1)
    assert grads["similarity"]["bias"] != 0 and "bias" not in params()["similarity"]


def test_swapped_towers_are_the_same():
    """The networks change places and so do the texts: CLIP's loss has no direction."""
    swapped = dataclasses.replace(CONFIG, first=CONFIG.second, second=CONFIG.first)
    names = {"trunk": "second_trunk", "projection": "second_projection"}
    names |= {other: name for name, other in names.items()}
    other = {names.get(name, name): tree for name, tree in params().items()}
    sides = [alone(BATCH, 1), alone(BATCH, 0)]
    width = BATCH.tokens.shape[1]
    tokens, segment_ids, sentence_ids = np.zeros((3, 8, width), np.int32)
    for row in range(8):
        texts = [side.tokens[row][side.segment_ids[row] == 1] for side in sides]
        size = sum(map(len, texts))
        tokens[row, :size], segment_ids[row, :size] = np.concatenate(texts), 1
        sentence_ids[row, len(texts[0]) : size] = 1
    batch = BATCH._replace(tokens=tokens, segment_ids=segment_ids, sentence_ids=sentence_ids)
    sums = jax.jit(make_eval_step(swapped.build(VOCAB), seed=0))(other, {}, jnp.int32(0), batch)
    assert sums.losses["contrastive"] == pytest.approx(run()[1].losses["contrastive"], rel=1e-5)


def test_collapsed_towers_cost_the_log_of_the_batch():
    """And no temperature helps: its gradient is 0."""
    same = jax.tree.map(jnp.zeros_like, params())
    same["similarity"] = params()["similarity"]
    for trunk in ("trunk", "second_trunk"):
        same[trunk]["final_norm"]["bias"] += 1.0
    for name in ("projection", "second_projection"):
        same[name]["kernel"] += 1.0
    _, sums, grads = passes(CONFIG)(same, BATCH)
    assert sums.losses["contrastive"] / 8 == pytest.approx(math.log(8), rel=1e-5)
    assert abs(grads["similarity"]["log_scale"]) < 1e-5
    metrics = finish(CONFIG.build(VOCAB), sums)
    assert metrics["spread"] < 1e-5 and metrics["alarm/collapse"] == 0, "too early for an alarm"
    late = sums._replace(stats=sums.stats | {"armed": np.float32(8)})
    assert finish(CONFIG.build(VOCAB), late)["alarm/collapse"] == 1
    spread_out = {name: value for name, value in run()[1].stats.items() if not name.startswith("second_")}
    one_sided = sums._replace(stats=late.stats | spread_out | {"armed": np.float32(8)})
    assert finish(CONFIG.build(VOCAB), one_sided)["alarm/collapse"] == 1, "the second tower alone"


def test_the_temperature_is_bounded_after_the_update():
    """A scale beyond 100 comes back to it, and in the forward pass it still has a gradient."""
    objective = CONFIG.build(VOCAB)
    assert objective.specs["similarity"]["log_scale"].role == "bias", "which does not decay"
    assert params()["similarity"]["log_scale"] == pytest.approx(2.659260, abs=1e-6)
    example = Example({}, BATCH.row_ids, {})
    hot = params() | {"similarity": {"log_scale": jnp.float32(6.0)}}
    assert objective.advance is not None
    after, carry = objective.advance(Snapshot(hot, {}, jnp.int32(0)), {}, example)
    assert after["similarity"]["log_scale"] == pytest.approx(4.605170, abs=1e-6) and carry == {}
    assert after["trunk"] is hot["trunk"]
    cool, _ = objective.advance(Snapshot(params(), {}, jnp.int32(0)), {}, example)
    assert cool["similarity"]["log_scale"] == params()["similarity"]["log_scale"]
    assert passes(CONFIG)(hot, BATCH)[2]["similarity"]["log_scale"] != 0
    assert dataclasses.replace(CONFIG, max_scale=None).build(VOCAB).advance is None


def test_a_bound_and_an_average_of_what_is_bounded_do_not_go_together():
    """Schedule-free's average is told from where gradients are taken, which the bound moves."""

    def trace(config: TwoTower):
        objective = config.build(VOCAB)
        shapes = jax.eval_shape(objective.init, jax.random.key(0))
        settings = OptimizerConfig("schedule_free", schedule="constant")
        optimizer = make_optimizer(settings, objective.specs, shapes, 10)
        state = jax.eval_shape(lambda: initial_state(objective, optimizer, objective.specs, seed=0))
        return jax.eval_shape(make_train_step(objective, optimizer, objective.specs, seed=0), state, BATCH)

    with pytest.raises(ValueError, match="choose another optimizer, or take the objective's bound away"):
        trace(CONFIG)
    trace(dataclasses.replace(CONFIG, max_scale=None))


def test_what_towers_share():
    """All, all but the projections, or nothing but the temperature."""
    one = dataclasses.replace(CONFIG, second=None)
    assert set(one.build(VOCAB).specs) == {"trunk", "projection", "similarity"}
    apart = dataclasses.replace(one, own_projections=True)
    assert set(apart.build(VOCAB).specs) == {"trunk", "projection", "second_projection", "similarity"}
    plain = dataclasses.replace(one, projection=None)
    assert set(plain.build(VOCAB).specs) == {"trunk", "similarity"}
    made = jax.eval_shape(one.build(VOCAB).init, jax.random.key(0))
    assert made["projection"]["kernel"].shape == (16, 12)


def test_what_cannot_be_is_refused():
    for changes, message in (
        ({"projection": None}, "need a projection"),
        ({"initial_scale": 200.0}, "below initial_scale"),
        ({"initial_scale": 0.0}, "initial_scale must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **changes).build(VOCAB)
