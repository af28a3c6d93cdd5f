"""The step on a small closed-form objective: reduction, microbatches, coupled terms, skipping, frozen groups."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpt.corruption.rows import row_keys
from jaxpt.optimizer import OptimizerConfig, OptimizerName, make_optimizer, trainable
from jaxpt.step import batch_gradient, initial_state, make_example, make_train_step, split_rows, watch
from jaxpt.types import FROZEN, Batch, Example, Guard, Objective, Out, ParamSpec, RowSpec, Snapshot

ROWS, LENGTH, WIDTH = 8, 6, 4


def batch(seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(1, 50, (ROWS, LENGTH)), jnp.int32)
    lengths = np.array([6, 5, 1, 4, 2, 6, 3, 6])  # unequal counts per row
    segments = jnp.asarray(np.arange(LENGTH) < lengths[:, None], jnp.int32)
    zeros = jnp.zeros((ROWS, LENGTH), jnp.int32)
    ids = jnp.arange(ROWS, dtype=jnp.uint32)
    return Batch(tokens, segments, zeros, zeros, ids, jnp.zeros(ROWS, jnp.int32), jnp.ones(ROWS, jnp.float32))


def corrupt(snapshot: Snapshot, batch: Batch, key: jax.Array) -> Example:
    """Noise per row from the row's key, so that the batch's order must not matter."""
    noise = jax.vmap(lambda k: jax.random.normal(k, (LENGTH,)))(row_keys(key, batch.row_ids))
    x = jnp.sin(batch.tokens[..., None] * jnp.arange(1.0, WIDTH + 1)) + noise[..., None]
    weights = {"fit": (batch.segment_ids != 0).astype(jnp.float32), "pull": jnp.ones(ROWS), "pair": jnp.ones(ROWS)}
    return Example({"x": x, "y": 0.5 * x.sum(-1)}, batch.row_ids, weights)


def loss(snapshot: Snapshot, example: Example, keys: jax.Array) -> Out:
    params = snapshot.params
    keep = jax.vmap(lambda k: jax.random.bernoulli(k, 0.8, (WIDTH,)))(keys)  # dropout
    feature = jnp.tanh(example.inputs["x"] @ params["w"]) * keep[:, None, :]
    error = (feature.sum(-1) + params["frozen"] - example.inputs["y"]) ** 2
    pooled = feature.mean(1)
    losses = {"fit": error, "pull": (pooled**2).sum(-1)}
    return Out(losses, {"rows": jnp.asarray(error.shape[0], jnp.float32)}, {"pooled": pooled})


def couple(snapshot: Snapshot, features: dict, example: Example) -> tuple[dict, dict]:
    """InfoNCE of each row against its neighbour, with a learned temperature."""
    z = features["pooled"]
    logits = (z @ jnp.roll(z, 1, 0).T) * jnp.exp(snapshot.params["temperature"])
    return {"pair": -jnp.diagonal(jax.nn.log_softmax(logits))}, {"pairs": jnp.asarray(float(ROWS))}


def objective(coupled: bool = True) -> Objective:
    specs = {
        "w": ParamSpec((None, None), "kernel"),
        "temperature": ParamSpec((), "norm"),
        "frozen": ParamSpec((), "bias", FROZEN),
    }

    def init(key):
        return {"w": jax.random.normal(key, (WIDTH, WIDTH)), "temperature": jnp.zeros(()), "frozen": jnp.ones(())}

    scale = {"fit": 1.0, "pull": lambda step: 0.1 + 0.0 * step, "pair": 0.7}
    summary = lambda sums: {"rows_seen": sums.stats["rows"]}  # noqa: E731
    return Objective(RowSpec(), specs, init, corrupt, loss, scale, couple if coupled else None, summary=summary)


def direct(params: dict, batch: Batch, keys: jax.Array, key: jax.Array) -> jax.Array:
    """The loss written out once more, without the step."""
    snapshot = Snapshot(params, {}, jnp.zeros((), jnp.int32))
    example = corrupt(snapshot, batch, key)
    out = loss(snapshot, example, keys)
    mask = example.weights["fit"]
    pair, _ = couple(snapshot, out.features, example)
    return (out.losses["fit"] * mask).sum() / mask.sum() + 0.1 * out.losses["pull"].mean() + 0.7 * pair["pair"].mean()


@pytest.fixture(scope="module")
def setting():
    obj = objective()
    params = obj.init(jax.random.key(1))
    snapshot = Snapshot(params, {}, jnp.zeros((), jnp.int32))
    key = jax.random.key(2)
    example = make_example(obj, snapshot, batch(), key)
    return obj, params, snapshot, key, example, row_keys(jax.random.key(3), example.row_ids)


def test_gradient_is_that_of_the_written_out_loss(setting):
    obj, params, snapshot, key, example, keys = setting
    want = jax.grad(direct)(params, batch(), keys, key)
    for microbatches in (1, 2, 4, 8):
        got = jax.jit(lambda m=microbatches: batch_gradient(obj, obj.specs, snapshot, example, keys, m))()
        assert got.grads["frozen"] is None
        np.testing.assert_allclose(got.grads["w"], want["w"], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(got.grads["temperature"], want["temperature"], rtol=2e-5, atol=1e-6)
        assert got.stats["rows"] == ROWS
        assert got.stats["pairs"] == ROWS
        assert got.features["pooled"].shape == (ROWS, WIDTH)


def test_features_of_microbatches_come_back_in_order(setting):
    obj, _, snapshot, _, example, keys = setting
    whole = batch_gradient(obj, obj.specs, snapshot, example, keys, 1).features["pooled"]
    for coupled in (True, False):
        cut = batch_gradient(objective(coupled), obj.specs, snapshot, example, keys, 4).features["pooled"]
        np.testing.assert_allclose(cut, whole, rtol=1e-5)


def test_split_rows_is_strided():
    np.testing.assert_array_equal(split_rows(jnp.arange(6), 2), [[0, 2, 4], [1, 3, 5]])


def test_filler_rows_weigh_nothing(setting):
    obj, _, snapshot, key, _, _ = setting
    example = make_example(obj, snapshot, batch()._replace(valid=jnp.array([1.0] * 7 + [0.0])), key)
    assert example.weights["fit"][7].sum() == 0
    assert example.counts["fit"][7] == 0
    assert example.counts["fit"].sum() == 27


def test_a_position_of_weight_zero_may_hold_anything(setting):
    obj, _, snapshot, _, example, keys = setting
    x = example.inputs["x"].at[2, 3].set(jnp.inf)  # row 2 has one token
    broken = example._replace(inputs=example.inputs | {"x": x}, weights=example.weights | {"pull": jnp.zeros(ROWS)})
    sums = batch_gradient(objective(False), obj.specs, snapshot, broken, keys, 1).losses
    assert np.isfinite(sums["fit"])


def make(
    spike_factor: float = 0.0, averaging: float = 0.0, coupled: bool = True, optimizer_name: OptimizerName = "adamw"
):
    obj = objective(coupled)
    shapes = jax.eval_shape(obj.init, jax.random.key(0))
    optimizer = make_optimizer(
        OptimizerConfig(optimizer_name, learning_rate=0.1, schedule="constant", weight_decay=0.0),
        obj.specs,
        shapes,
        10,
    )
    state = initial_state(obj, optimizer, obj.specs, seed=0, averaging=averaging)
    step = make_train_step(obj, optimizer, obj.specs, seed=0, spike_factor=spike_factor, averaging=averaging)
    return state, jax.jit(step)


def test_training_lowers_the_loss_and_leaves_frozen_parameters():
    state, step = make(averaging=0.9)
    keys, key = row_keys(jax.random.key(3), batch().row_ids), jax.random.key(2)
    before = direct(state.params, batch(), keys, key)
    for index in range(30):
        state, measured = step(state, batch(index % 2))
    assert direct(state.params, batch(), keys, key) < 0.9 * before
    assert state.params["frozen"] == 1.0
    assert measured.metrics["rows_seen"] == ROWS
    assert measured.tokens == 33
    assert int(state.step) == int(state.guard.applied) == 30
    # the averaged parameters lag behind, between the start and now
    assert 0 < float(jnp.abs(state.averaged["w"] - state.params["w"]).max()) < 1.0


def test_schedule_free_evaluates_its_own_average():
    state, step = make(optimizer_name="schedule_free")
    assert state.averaged is not None
    for index in range(5):
        state, _ = step(state, batch(index % 2))
    specs = objective().specs
    want = optax.contrib.schedule_free_eval_params(state.opt_state, trainable(specs, state.params))
    np.testing.assert_allclose(state.averaged["w"], want["w"], rtol=1e-6)
    assert float(jnp.abs(state.averaged["w"] - state.params["w"]).max()) > 1e-3
    assert state.averaged["frozen"] == 1.0
    assert make(optimizer_name="muon")[0].averaged is None


@pytest.mark.parametrize("name", ["adamw", "schedule_free"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(name: OptimizerName):
    state, step = make(optimizer_name=name)
    state, _ = step(state, batch())
    poisoned = state._replace(params=state.params | {"temperature": jnp.array(jnp.nan)})
    after, measured = step(poisoned, batch())
    assert not measured.ok
    chex.assert_trees_all_equal(
        (after.params, after.opt_state, after.averaged), (poisoned.params, poisoned.opt_state, poisoned.averaged)
    )
    assert int(after.step) == 2  # the data moves on
    assert (int(after.guard.applied), int(after.guard.skipped), int(after.guard.failing)) == (1, 1, 1)
    healed, measured = step(after._replace(params=state.params), batch())
    assert measured.ok
    assert (int(healed.guard.skipped), int(healed.guard.failing)) == (1, 0)


def test_a_spike_is_skipped_but_a_lasting_change_is_accepted():
    guard = Guard(jnp.float32(1.0), jnp.int32(100), jnp.int32(0), jnp.int32(0))
    ok, after = watch(guard, jnp.float32(1.0), jnp.float32(7.0), 5.0)
    assert not ok
    assert int(after.failing) == 1
    assert watch(guard, jnp.float32(1.0), jnp.float32(4.9), 5.0)[0]
    assert watch(guard, jnp.float32(1.0), jnp.float32(7.0), 0.0)[0]
    assert watch(guard._replace(applied=jnp.int32(3)), jnp.float32(1.0), jnp.float32(7.0), 5.0)[0]  # too early to tell
    for _ in range(20):
        ok, guard = watch(guard, jnp.float32(1.0), jnp.float32(7.0), 5.0)
    assert ok


def test_the_whole_step_runs_without_a_coupled_term():
    state, step = make(coupled=False)
    obj = objective(False)
    assert obj.couple is None
    state, measured = step(state, batch())
    assert set(measured.metrics) == {"loss/fit", "loss/pull", "rows_seen"}
    assert float(optax.tree.norm(state.params)) > 0
