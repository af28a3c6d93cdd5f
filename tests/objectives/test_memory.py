"""The memory of the row before: whom it shows itself to, no gradient, exact resumption, any devices."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import packed_batch, tiny, tiny_vocab

from jaxpt.objectives import PermutationLM
from jaxpt.objectives.memory import remembered
from jaxpt.optimizer import OptimizerConfig, make_optimizer
from jaxpt.sharding import MeshConfig, make_mesh, put_batch, state_shardings
from jaxpt.step import initial_state, make_example, make_train_step
from jaxpt.types import Batch, Snapshot, TrainState

VOCAB = tiny_vocab()
ROWS, LENGTH, SIZE = 8, 24, 6
CONFIG = dataclasses.replace(tiny(PermutationLM()), packing="stream", memory=SIZE, rows=ROWS).for_evaluation()
CONFIG = dataclasses.replace(CONFIG, memory=SIZE, rows=ROWS)  # no dropout, and a memory
OBJECTIVE = CONFIG.build(VOCAB)


def batch_of(step: int) -> Batch:
    """Rows whose first document is the last one of the row before, in every second row."""
    batch = packed_batch(OBJECTIVE.rows, VOCAB, LENGTH, ROWS, seed=step)
    full = batch.segment_ids.copy()
    full[full == 0] = 3  # no padding: the last document reaches the end of the row
    documents = 100 * step + 10 * np.arange(ROWS)[:, None] + full
    before = 100 * (step - 1) + 10 * np.arange(ROWS)[:, None] + 3
    documents = np.where((full == 1) & (np.arange(ROWS)[:, None] % 2 == 0), before, documents)
    tokens = np.where(batch.segment_ids == 0, 9 + (np.arange(LENGTH) * 7 + step) % 40, batch.tokens)
    places = np.arange(LENGTH) - np.array([[row.searchsorted(s) for s in row] for row in full])
    return batch._replace(
        tokens=tokens, segment_ids=full, positions=places, extras={"document_ids": documents.astype(np.int32)}
    )


@functools.cache
def parts() -> tuple:
    shapes = jax.eval_shape(OBJECTIVE.init, jax.random.key(0))
    config = OptimizerConfig(learning_rate=1e-2, schedule="constant", weight_decay=0.0)
    return shapes, make_optimizer(config, OBJECTIVE.specs, shapes, 10)


@functools.cache
def steps():
    return jax.jit(make_train_step(OBJECTIVE, parts()[1], OBJECTIVE.specs, seed=0))


def fresh() -> TrainState:
    return initial_state(OBJECTIVE, parts()[1], OBJECTIVE.specs, seed=0)


@jax.jit
def losses(state: TrainState, batch: Batch) -> tuple:
    """Losses of a batch, and the gradient with respect to what the carry holds."""
    keys = jax.random.split(jax.random.key(3), ROWS)

    def total(carry):
        snapshot = Snapshot(state.params, carry, state.step)
        example = make_example(OBJECTIVE, snapshot, batch, jax.random.key(2))
        out = OBJECTIVE.loss(snapshot, example, keys)
        return jnp.sum(out.losses["plm"] * example.weights["plm"]), (out.losses["plm"], example)

    gradient, (loss, example) = jax.grad(total, has_aux=True, allow_int=True)(state.carry)
    return loss, example, gradient


def test_a_document_remembers_its_beginning_and_no_other():
    """Changing the row before changes a row's losses in the document that goes on, and nowhere else."""
    after = steps()(fresh(), batch_of(0))[0]
    changed = batch_of(0)
    place = LENGTH - 2
    changed.tokens[:, place] = 10 + (changed.tokens[:, place] + 11) % 40
    other = steps()(fresh(), changed)[0]
    other = other._replace(params=after.params)
    loss, example, _ = losses(after, batch_of(1))
    moved, _, gradient = losses(other, batch_of(1))
    used = np.asarray(example.weights["plm"]) > 0
    differs = np.asarray(loss != moved) & used
    segments = np.asarray(example.inputs["pattern"].query_segments)[:, LENGTH:]
    goes_on = np.arange(ROWS)[:, None] % 2 == 0
    assert not differs[~goes_on & used].any()
    assert not differs[segments > 1].any()
    assert differs[(goes_on & used) & (segments == 1)].mean() > 0.9
    # nothing is learned through the memory
    hidden = gradient["rows"]["hidden"]
    assert (np.asarray(hidden) == 0).all()
    seen = np.asarray(example.inputs["pattern"].key_segments)[:, :SIZE]
    assert set(seen[0]) <= {1, -1}
    assert (seen[1::2] == -1).all()
    assert (np.asarray(example.inputs["pattern"].key_positions)[:, :SIZE] == np.arange(-SIZE, 0)).all()


def test_the_gradient_would_not_be_zero_without_the_stop():
    """The fault that the test above must find."""
    state = steps()(fresh(), batch_of(0))[0]
    _, example, _ = losses(state, batch_of(1))
    keys = jax.random.split(jax.random.key(3), ROWS)

    def total(hidden):
        inputs = example.inputs | {"memory": hidden}
        out = OBJECTIVE.loss(Snapshot(state.params, {}, state.step), example._replace(inputs=inputs), keys)
        return jnp.sum(out.losses["plm"] * example.weights["plm"])

    assert (np.asarray(jax.jit(jax.grad(total))(example.inputs["memory"])) != 0).any()


def test_the_memory_of_a_skipped_step_is_not_read():
    state = steps()(fresh(), batch_of(0))[0]
    carry = state.carry
    stale = remembered(carry["rows"]["hidden"], carry["rows"]["documents"], carry["step"] - 1)
    _, example, _ = losses(state._replace(carry=stale), batch_of(1))
    assert (np.asarray(example.inputs["pattern"].key_segments)[:, :SIZE] == -1).all()


def test_it_holds_what_the_layers_read():
    state = fresh()
    after = steps()(state, batch_of(0))[0]
    hidden = np.asarray(after.carry["rows"]["hidden"])
    assert hidden.shape == (ROWS, 2, SIZE, 16)
    table = np.asarray(state.params["trunk"]["embed"]["tokens"])
    np.testing.assert_allclose(
        hidden[:, 0], table[batch_of(0).tokens[:, -SIZE:]], rtol=1e-6
    )  # embeddings, dropped none
    np.testing.assert_array_equal(after.carry["rows"]["documents"], batch_of(0).extras["document_ids"][:, -SIZE:])
    assert int(after.carry["step"]) == 0


def test_a_run_resumes_exactly():
    state = fresh()
    for index in (0, 1):
        state, _ = steps()(state, batch_of(index))
    kept = jax.device_get(state)
    for index in (2, 3):
        state, _ = steps()(state, batch_of(index))
    resumed = jax.tree.map(jnp.asarray, kept)
    for index in (2, 3):
        resumed, _ = steps()(resumed, batch_of(index))
    chex.assert_trees_all_equal(jax.device_get(resumed), jax.device_get(state))
    forgets, _ = steps()(jax.tree.map(jnp.asarray, kept._replace(carry=fresh().carry)), batch_of(2))
    assert not np.array_equal(forgets.carry["rows"]["hidden"], state.carry["rows"]["hidden"])


def test_devices_and_microbatches_agree_with_one_device():
    state, want = steps()(steps()(fresh(), batch_of(0))[0], batch_of(1))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shapes = jax.eval_shape(fresh)
    shardings = state_shardings(shapes, OBJECTIVE.specs, parts()[0], mesh)
    assert shardings.carry["rows"]["hidden"].spec[0] == ("data", "fsdp")
    assert not any(shardings.carry["step"].spec)
    with jax.set_mesh(mesh):
        step = jax.jit(
            make_train_step(OBJECTIVE, parts()[1], OBJECTIVE.specs, seed=0, microbatches=2),
            out_shardings=(shardings, None),
        )
        spread = jax.device_put(fresh(), shardings)
        first, second = (put_batch(batch_of(index), np.arange(ROWS), ROWS, mesh) for index in (0, 1))
        spread, got = step(step(spread, first)[0], second)
    assert float(got.loss) == pytest.approx(float(want.loss), rel=1e-4)
    hidden = np.asarray(state.carry["rows"]["hidden"])
    np.testing.assert_allclose(np.asarray(spread.carry["rows"]["hidden"]), hidden, rtol=2e-2, atol=2e-2)
    np.testing.assert_array_equal(spread.carry["rows"]["documents"], state.carry["rows"]["documents"])


def test_another_number_of_rows_is_refused():
    batch = jax.tree.map(lambda leaf: leaf[:4], batch_of(0))
    with pytest.raises(ValueError, match="rows=8, and the batch has 4: set rows to 4"):
        jax.eval_shape(make_train_step(OBJECTIVE, parts()[1], OBJECTIVE.specs, seed=0), fresh(), batch)
    snapshot = Snapshot(fresh().params, fresh().carry, jnp.int32(0))
    more = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf]), batch_of(0))
    with pytest.raises(ValueError, match="a memory of 8 rows and a batch of 16"):
        jax.eval_shape(OBJECTIVE.corrupt, snapshot, more, jax.random.key(0))
    # but some rows can be looked at
    example = jax.eval_shape(OBJECTIVE.corrupt, snapshot, batch, jax.random.key(0))
    assert example.inputs["memory"].shape[0] == 4
