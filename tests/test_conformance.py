"""What every objective promises, checked for every entry of OBJECTIVES; a new one is picked up by itself."""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import packed_batch, tiny, tiny_vocab, with_attention

from jaxpt.corruption.rows import row_keys
from jaxpt.objectives import OBJECTIVES
from jaxpt.optimizer import OptimizerConfig, make_optimizer, path_name, trainable
from jaxpt.sharding import MeshConfig, make_mesh, put_batch, state_shardings
from jaxpt.step import Gradient, batch_gradient, finish, initial_state, make_eval_step, make_example, make_train_step
from jaxpt.types import Batch, Example, Objective, ObjectiveConfig, Out, Snapshot, Sums

VOCAB = tiny_vocab()
LENGTH = 24


class Probe(NamedTuple):
    example: Example
    out: Out
    gradient: Gradient


class Case(NamedTuple):
    name: str
    config: ObjectiveConfig
    objective: Objective
    params: dict
    batch: Batch
    probe: object  # jitted (params, batch, key) -> Probe, one compilation for all tests of the objective


@functools.cache
def case(name: str) -> Case:
    config = with_attention(tiny(OBJECTIVES[name]()), "dense")  # which all forms are compared with
    objective = config.build(VOCAB)
    params = objective.init(jax.random.key(0))
    carry = objective.start(params, jax.random.key(1)) if objective.start else {}

    @jax.jit
    def probe(params: dict, batch: Batch, key: jax.Array) -> Probe:
        snapshot = Snapshot(params, carry, jnp.zeros((), jnp.int32))
        example = make_example(objective, snapshot, batch, key)
        keys = row_keys(jax.random.fold_in(key, 1), example.row_ids)
        out = objective.loss(snapshot, example, keys)
        return Probe(example, out, batch_gradient(objective, objective.specs, snapshot, example, keys, 1))

    return Case(name, config, objective, params, packed_batch(objective.rows, VOCAB, LENGTH), probe)


def probe_of(this: Case, batch: Batch | None = None, seed: int = 5) -> Probe:
    return jax.device_get(this.probe(this.params, this.batch if batch is None else batch, jax.random.key(seed)))


@pytest.fixture(params=OBJECTIVES)
def this(request: pytest.FixtureRequest) -> Case:
    return case(request.param)


def other_tokens(batch: Batch, where: np.ndarray) -> Batch:
    """Other words in the marked places, of the same kind: neither special nor another word start."""
    tokens = batch.tokens.copy()
    move = where & ~VOCAB.is_special[tokens]
    ordinary = np.flatnonzero(~VOCAB.is_special)
    for token in np.unique(tokens[move]):
        alike = ordinary[VOCAB.starts_word[ordinary] == VOCAB.starts_word[token]]
        tokens[move & (batch.tokens == token)] = alike[(np.searchsorted(alike, token) + 3) % len(alike)]
    assert (tokens[move] != batch.tokens[move]).all()
    return batch._replace(tokens=tokens)


def test_configuration_is_an_objective_config(this: Case):
    assert isinstance(this.config, ObjectiveConfig)
    assert isinstance(this.config.for_evaluation(), type(this.config))
    hash(this.config)  # frozen, so that it can be a key and a static argument


def test_specs_describe_the_parameters(this: Case):
    shapes = jax.eval_shape(this.objective.init, jax.random.key(0))
    jax.tree.map(lambda spec, leaf: chex.assert_rank(leaf, len(spec.axes)), this.objective.specs, shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    chex.assert_trees_all_equal(this.params, this.objective.init(jax.random.key(0)))


def test_terms_agree_in_name_and_shape(this: Case):
    example, out, _ = probe_of(this)
    terms = set(example.weights)
    assert terms == set(example.counts) == set(this.objective.scale)
    if this.objective.couple is None:
        assert set(out.losses) == terms
    for term, loss in out.losses.items():
        assert loss.shape == example.weights[term].shape
        assert loss.dtype == np.float32
    for leaf in jax.tree.leaves((example, out.losses, out.features)):
        assert leaf.shape[0] == LENGTH // 3  # 8 rows
    for term, count in example.counts.items():
        assert count.shape == (8,)
        assert count.sum() > 0, f"nothing to learn in {term}"


def test_deterministic(this: Case):
    chex.assert_trees_all_equal(probe_of(this), probe_of(this))
    first, second = probe_of(this).example, probe_of(this, seed=6).example
    still = ("causal_lm", "cpc", "seq2seq", "simcse", "span_corruption", "two_tower")  # draw nothing, of short texts
    if this.name not in still:
        assert any((a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


def test_randomness_belongs_to_the_row(this: Case):
    """Rows in another order, with their row ids, give the same examples and losses in that order."""
    order = np.array([3, 1, 0, 2, 7, 6, 5, 4])
    shuffled = probe_of(this, jax.tree.map(lambda leaf: leaf[order], this.batch))
    straight = probe_of(this)
    chex.assert_trees_all_equal(shuffled.example, jax.tree.map(lambda leaf: leaf[order], straight.example))
    want = jax.tree.map(lambda leaf: leaf[order], straight.out.losses)
    chex.assert_trees_all_close(shuffled.out.losses, want, rtol=1e-5, atol=1e-6)


def test_padding_weighs_nothing(this: Case):
    example = probe_of(this).example
    empty = jax.tree.map(np.zeros_like, this.batch)._replace(row_ids=this.batch.row_ids, valid=this.batch.valid)
    nothing = probe_of(this, empty)
    for term in example.weights:
        assert nothing.example.weights[term].sum() == nothing.example.counts[term].sum() == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(nothing.gradient.grads))
    assert np.isfinite(jax.flatten_util.ravel_pytree(nothing.gradient)[0]).all()
    # what stands in the padding is never read
    garbage = np.where(this.batch.segment_ids == 0, VOCAB.size - 9, this.batch.tokens)
    chex.assert_trees_all_equal(probe_of(this, this.batch._replace(tokens=garbage)).gradient, probe_of(this).gradient)


def test_nothing_crosses_a_document(this: Case):
    """Every position's loss ignores the words of the first document of its row, or of all others."""
    whole = probe_of(this)
    first = other_tokens(this.batch, this.batch.segment_ids == 1)
    others = other_tokens(this.batch, this.batch.segment_ids > 1)
    outs = [probe_of(this, batch) for batch in (first, others)]
    for term, loss in whole.out.losses.items():
        if loss.ndim == 1:
            continue  # a loss of whole rows
        scored = whole.example.weights[term] > 0
        same = [np.asarray(out.out.losses[term] == loss)[scored] for out in outs]
        assert (same[0] | same[1]).all()
        assert (~same[0]).any(), "the words of the first document matter to its own losses"
        assert (~same[1]).any() == (this.batch.segment_ids > 1).any()


def test_rows_are_independent(this: Case):
    disturbed = probe_of(this, other_tokens(this.batch, np.arange(8)[:, None] == 3))
    for term, loss in probe_of(this).out.losses.items():
        changed = (disturbed.out.losses[term] != loss).reshape(8, -1).any(1)
        divided = this.name == "mixture" and not probe_of(this).example.counts[term][3]  # row 3 is another part's
        assert changed.tolist() == [row == 3 and not divided for row in range(8)], term


def test_every_parameter_learns(this: Case):
    grads = probe_of(this).gradient.grads
    wanted = jax.tree_util.tree_leaves_with_path(trainable(this.objective.specs, this.params))
    got = dict(jax.tree_util.tree_leaves_with_path(grads))
    assert set(got) == {path for path, _ in wanted}
    still = [path_name(path) for path, grad in got.items() if not (np.isfinite(grad).all() and (grad != 0).any())]
    assert not still


def test_metrics_are_finished_from_sums(this: Case):
    """The sums of two halves add to those of the whole, and so do their metrics."""
    judge = this.config.for_evaluation().build(VOCAB)
    eval_step = jax.jit(make_eval_step(judge, seed=0))
    carry = this.objective.start(this.params, jax.random.key(1)) if this.objective.start else {}
    step = jnp.zeros((), jnp.int32)
    ones, zeros = np.ones(4, np.float32), np.zeros(4, np.float32)
    whole, upper, lower = (
        eval_step(this.params, carry, step, this.batch._replace(valid=valid))
        for valid in (this.batch.valid, np.concatenate([ones, zeros]), np.concatenate([zeros, ones]))
    )
    if judge.couple is None:
        added: Sums = jax.tree.map(jnp.add, upper, lower)
        chex.assert_trees_all_close(added, whole, rtol=1e-5)
    metrics = finish(judge, whole)
    assert all(np.isfinite(value) and np.ndim(value) == 0 for value in metrics.values()), metrics


def test_the_vector_of_a_text_is_its_own(this: Case):
    """Neither other rows nor padding nor the place in the batch change it, and other words do."""
    judge = this.config.for_evaluation().build(VOCAB)
    if judge.embed is None:
        pytest.skip("makes no vectors")
    batch = jax.tree.map(lambda leaf: leaf[:, : LENGTH - 2] if leaf.ndim == 2 else leaf, this.batch)
    first = batch.segment_ids == 1
    texts = {"tokens": np.where(first, batch.tokens, 0), "segment_ids": first.astype(np.int32)}
    batch = batch._replace(**texts, sentence_ids=np.zeros_like(batch.tokens))
    snapshot = Snapshot(this.params, {}, jnp.zeros((), jnp.int32))
    embed = jax.jit(lambda batch: judge.embed(snapshot, batch, 0))
    vectors = jax.device_get(embed(batch))
    assert vectors.ndim == 2 and vectors.dtype == np.float32 and (np.abs(vectors).max(1) > 0).all()
    order = np.array([3, 1, 0, 2, 7, 6, 5, 4])
    moved = batch._replace(tokens=np.where(first, batch.tokens, 9)[order], segment_ids=batch.segment_ids[order])
    np.testing.assert_allclose(embed(moved), vectors[order], rtol=1e-5, atol=1e-6)
    changed = np.asarray(embed(other_tokens(batch, np.arange(8)[:, None] == 3)) != vectors).any(1)
    assert changed.tolist() == [row == 3 for row in range(8)]


# ------------------------------------------------------------------------------- devices and microbatches


def gradient_on(this: Case, mesh: MeshConfig, microbatches: int) -> tuple[Example, Gradient]:
    devices = jax.make_mesh((8,), ("x",)).devices.ravel()[: abs(np.prod(list(vars(mesh).values())))]
    placed = make_mesh(mesh, list(devices))
    shapes = jax.eval_shape(lambda: this.params)
    shardings = state_shardings(shapes, this.objective.specs, shapes, placed)

    @jax.jit
    def run(params: dict, batch: Batch) -> tuple[Example, Gradient]:
        carry = this.objective.start(params, jax.random.key(1)) if this.objective.start else {}
        snapshot = Snapshot(params, carry, jnp.zeros((), jnp.int32))
        example = make_example(this.objective, snapshot, batch, jax.random.key(5))  # as of ``probe_of``
        keys = row_keys(jax.random.fold_in(jax.random.key(5), 1), example.row_ids)
        return example, batch_gradient(this.objective, this.objective.specs, snapshot, example, keys, microbatches)

    with jax.set_mesh(placed):
        batch = put_batch(this.batch, np.arange(8), 8, placed)
        return jax.device_get(run(jax.device_put(this.params, shardings), batch))


def check_gradient(this: Case, mesh: MeshConfig, microbatches: int) -> None:
    """Compare with one device, one microbatch and dense attention."""
    example, got = gradient_on(this, mesh, microbatches)
    want_example, _, want = probe_of(case(this.name))
    chex.assert_trees_all_equal(example, want_example)  # tokens, masks and noise, bit for bit
    chex.assert_trees_all_close(got.losses, want.losses, rtol=1e-5)
    scale = float(optax.tree.norm(want.grads))
    chex.assert_trees_all_close(got.grads, want.grads, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [1, 2, 4])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (2, 1, 1), (8, 1, 1), (1, 8, 1), (1, 2, 2), (2, 2, 2), (1, 4, 2), (1, 1, 2)]
)
def test_full_matrix_of_devices_and_microbatches(this: Case, sizes: tuple[int, int, int], microbatches: int):
    if 8 % (microbatches * sizes[0] * sizes[1]):
        pytest.skip("the eight rows cannot be cut so")
    check_gradient(this, MeshConfig(*sizes), microbatches)


def in_form(this: Case, form: str) -> Case:
    return this._replace(objective=with_attention(this.config, form).build(VOCAB))


@pytest.mark.parametrize(
    "sizes, form",
    [
        ((1, 2, 2, 2), "blockwise"),
        pytest.param((2, 2, 2, 1), "dense", marks=pytest.mark.slow),
        pytest.param((2, 1, 1, 4), "blockwise", marks=pytest.mark.slow),
        pytest.param((1, 1, 1, 2), "blockwise", marks=pytest.mark.slow),
        pytest.param((1, 1, 1, 4), "blockwise", marks=pytest.mark.slow),
        pytest.param((1, 2, 1, 4), "dense", marks=pytest.mark.slow),  # left to the compiler
    ],
)
def test_devices_and_microbatches_agree_with_one_device(this: Case, sizes: tuple[int, int, int, int], form: str):
    """Rows over two devices, widths over two and lengths over two, or other such."""
    check_gradient(in_form(this, form), MeshConfig(*sizes), 2)


# ------------------------------------------------------------------------------------------- the whole step


def test_overfits_one_batch_with_one_compilation_and_resumes_exactly(this: Case):
    objective = this.config.for_evaluation().build(VOCAB)  # no dropout; the corruption still differs at every step
    batch = jax.tree.map(lambda leaf: leaf[:2], this.batch)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    config = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=10, weight_decay=0.0)
    optimizer = make_optimizer(config, objective.specs, shapes, 200)
    state = initial_state(objective, optimizer, objective.specs, seed=0)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(make_train_step(objective, optimizer, objective.specs, seed=0), 1))
    losses = []
    for index in range(200):
        if index == 100:
            saved = jax.device_get(state)
        state, measured = step(state, batch)
        losses.append(float(measured.loss))
        if index == 101:
            later = jax.device_get(state)
    assert np.mean(losses[-20:]) < 0.5 * losses[0]
    assert int(state.guard.skipped) == 0
    resumed = jax.tree.map(jnp.asarray, saved)
    for _ in range(2):
        resumed, _ = step(resumed, batch)
    chex.assert_trees_all_equal(jax.device_get(resumed), later)
