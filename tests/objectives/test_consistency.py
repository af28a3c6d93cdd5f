"""Consistency across views: what views share, which side learns, the teacher in the carry, the alarm."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import packed_batch, tiny_vocab

from jaxpt.losses.cross_entropy import logits_of
from jaxpt.losses.divergence import divergence
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import mlm_head
from jaxpt.models.patterns import bidirectional
from jaxpt.models.transformer import embedding_table, transformer
from jaxpt.objectives.consistency import Consistency, MovingAverage
from jaxpt.objectives.parts import at
from jaxpt.step import batch_gradient, finish, initial_state, make_example, make_train_step
from jaxpt.types import Example, Out, Snapshot, Sums, TrainState

VOCAB = tiny_vocab()
ENCODER = TransformerConfig(depth=1, width=16, heads=2, positions="rotary", logits_bias=True, layers="unroll")
DROPPED = dataclasses.replace(ENCODER, dropout=0.2)
CONFIG = Consistency(encoder=ENCODER)
BATCH = packed_batch(CONFIG.build(VOCAB).rows, VOCAB, length=64, size=16)
CANDIDATES = ~VOCAB.is_special[BATCH.tokens]
KEYS = jax.random.split(jax.random.key(0), 16)


def with_(**changes) -> Consistency:
    return dataclasses.replace(CONFIG, **changes)


@functools.cache
def corruption(config: Consistency):
    objective = config.build(VOCAB)
    start = Snapshot({}, {}, jnp.int32(0))
    return jax.jit(lambda batch, key: make_example(objective, start, batch, key))


def corrupted(config: Consistency = CONFIG, seed: int = 0) -> Example:
    return jax.device_get(corruption(config)(BATCH, jax.random.key(seed)))


@functools.cache
def params() -> dict:
    made = jax.jit(CONFIG.build(VOCAB).init)(jax.random.key(3))
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, made)  # so that predictions differ


@functools.cache
def losses_of(config: Consistency):
    objective = config.build(VOCAB)

    @jax.jit
    def run(params: dict, example: Example, carry: dict, step: int) -> Out:
        return objective.loss(Snapshot(params, carry, step), example, KEYS)

    return run


def losses(config: Consistency, example: Example, carry: dict | None = None, step: int = 0) -> Out:
    return jax.device_get(losses_of(config)(params(), example, {} if carry is None else carry, step))


@functools.cache
def gradient_of(config: Consistency):
    objective = config.build(VOCAB)._replace(scale={"mlm": 0.0, "consistency": 1.0})

    @jax.jit
    def run(params: dict, example: Example, carry: dict) -> dict:
        snapshot = Snapshot(params, carry, jnp.int32(0))
        return batch_gradient(objective, objective.specs, snapshot, example, KEYS, 1).grads

    return run


def gradient(config: Consistency, example: Example, carry: dict | None = None) -> tuple[dict, float]:
    """Of the consistency term alone, and its norm."""
    grads = jax.device_get(gradient_of(config)(params(), example, {} if carry is None else carry))
    return grads, float(optax.tree.norm(grads))


# ------------------------------------------------------------------------------------------- the views


@pytest.mark.parametrize("config", [CONFIG, with_(views=3, rate=0.25, shared=0.1)])
def test_views_share_some_hidden_tokens_and_no_others(config):
    counts = np.zeros(3)
    for seed in range(8):
        example = corrupted(config, seed)
        inputs, weights = example.inputs, example.weights["mlm"]
        room = example.weights["consistency"].shape[2]
        for row in range(16):
            chosen = [
                {int(p) for p, w in zip(inputs["target_positions"][row, v], weights[row, v], strict=True) if w}
                for v in range(config.views)
            ]
            used = weights[row, 0, :room] > 0
            shared = set(inputs["target_positions"][row, 0, :room][used].tolist())
            assert set.intersection(*chosen) == shared
            assert sum(len(view - shared) for view in chosen) == len(set.union(*chosen) - shared), "extras are disjoint"
            counts += len(shared), len(chosen[0]), CANDIDATES[row].sum()
            for v, view in enumerate(chosen):
                assert len(view) == weights[row, v].sum()
                elsewhere = np.setdiff1d(np.arange(64), sorted(view))
                assert (inputs["tokens"][row, v] == BATCH.tokens[row])[elsewhere].all()
        originals = np.take_along_axis(BATCH.tokens[:, None], inputs["target_positions"], axis=2)
        assert (inputs["targets"] == originals)[weights > 0].all()
        assert not VOCAB.is_special[originals[weights > 0]].any()
        compared = example.weights["consistency"]
        assert (compared == weights[:, : compared.shape[1], :room]).all()
        places = inputs["target_positions"][:, :, :room]
        assert (places == places[:, :1]).all(), "places of one slot are the same in all views"
        read = np.take_along_axis(inputs["tokens"], places, axis=2)
        assert (read == read[:, :1]).all(), "and read alike"
    # 128 rows of one rounding each: a share is met within 4 standard errors, .5 / sqrt(128) tokens of a row each
    assert counts[0] / 128 == pytest.approx(config.shared * counts[2] / 128, abs=0.18)
    assert counts[1] / 128 == pytest.approx(config.rate * counts[2] / 128, abs=0.18)


def test_short_rows_have_nothing_to_compare():
    """Two ordinary tokens at a share of .15: about two rows of three compare nothing; of such rows alone all is 0."""
    batch = BATCH._replace(segment_ids=np.where(np.arange(64) < 3, BATCH.segment_ids, 0))
    example = jax.device_get(corruption(CONFIG)(batch, jax.random.key(0)))
    assert 4 <= (example.counts["consistency"] == 0).sum() <= 15
    zero = functools.partial(jax.tree.map, np.zeros_like)
    empty = example._replace(weights=zero(example.weights), counts=zero(example.counts))
    out, (_, norm) = losses(CONFIG, empty), gradient(CONFIG, empty)
    assert np.isfinite(out.losses["consistency"]).all()
    assert norm == 0
    assert out.stats["watched"] == 0


# ------------------------------------------------------------------------------------------- which side learns


def test_the_loss_is_the_divergence_of_the_views_predictions():
    """KL from each view to the next, at the shared places, found again from predictions of single views."""
    example = corrupted()
    out = losses(CONFIG, example)
    compared, room = example.weights["consistency"], example.weights["consistency"].shape[2]
    assert compared.shape[1] == 2
    encoder, head = transformer(ENCODER, VOCAB.size), mlm_head(ENCODER, VOCAB.size)
    told = BATCH.segment_ids, BATCH.positions

    @jax.jit
    def logits(tokens, places):
        trunk = params()["trunk"]
        hidden = encoder.apply(trunk, tokens, bidirectional(*told), told[1])
        return logits_of(head.apply(params()["head"], at(hidden, places), embedding_table(trunk)))

    first, second = (
        logits(example.inputs["tokens"][:, v], example.inputs["target_positions"][:, v, :room]) for v in (0, 1)
    )
    for pair, (one, other) in enumerate([(first, second), (second, first)]):
        want = divergence("kl", one, other)
        np.testing.assert_allclose(out.losses["consistency"][:, pair], want, rtol=1e-3, atol=1e-4)
    assert np.mean(want) > 0.1


def test_only_the_side_without_stop_gradient_learns():
    """By linearity the gradient through both sides is the sum of those through one, and neither of them is 0."""
    example = corrupted()
    (first, a), (second, b), (both, c) = (
        gradient(with_(stop_gradient=side), example) for side in ("first", "second", "none")
    )
    chex.assert_trees_all_close(jax.tree.map(np.add, first, second), both, rtol=1e-3, atol=1e-4 * c)
    assert min(a, b) > 0.1
    assert float(optax.tree.norm(jax.tree.map(np.subtract, first, second))) > 0.01 * c


def test_a_teacher_equal_to_the_network_is_a_stopped_first_side():
    example, taught = corrupted(), with_(teacher=MovingAverage())
    want, got = losses(CONFIG, example), losses(taught, example, {"teacher": params()})
    chex.assert_trees_all_close(got.losses, want.losses, rtol=1e-5, atol=1e-6)
    (grads, norm), (by_teacher, _) = gradient(CONFIG, example), gradient(taught, example, {"teacher": params()})
    chex.assert_trees_all_close(by_teacher, grads, rtol=1e-4, atol=1e-5 * norm)
    other = jax.tree.map(lambda leaf: leaf * 0.5, params())
    moved = losses(taught, example, {"teacher": other})
    assert (moved.losses["consistency"] != want.losses["consistency"]).any()
    np.testing.assert_allclose(moved.losses["mlm"], want.losses["mlm"], rtol=1e-5)


def test_views_of_the_same_input_agree_but_for_dropout():
    """R-Drop: nothing to learn without dropout; with it, one symmetric comparison, other masks in each pass."""
    same = with_(rate=0.15, shared=0.15, divergence="symmetric_kl", stop_gradient="none")
    example = corrupted(same)
    assert (example.inputs["tokens"][:, 0] == example.inputs["tokens"][:, 1]).all()
    assert example.weights["consistency"].shape[1] == 1
    np.testing.assert_allclose(losses(same, example).losses["consistency"], 0, atol=1e-5)
    assert gradient(same, example)[1] < 1e-4
    dropped = losses(dataclasses.replace(same, encoder=DROPPED), example).losses["consistency"]
    assert (dropped[example.weights["consistency"] > 0] > 1e-4).mean() > 0.9


def test_the_teacher_has_dropout_only_where_it_is_asked_for():
    example = corrupted()
    quiet, loud = (
        losses(with_(encoder=DROPPED, teacher=MovingAverage(dropout=on)), example, {"teacher": params()}).losses
        for on in (False, True)
    )
    np.testing.assert_array_equal(quiet["mlm"], loud["mlm"])
    assert (quiet["consistency"] != loud["consistency"]).any()


# ------------------------------------------------------------------------------------------- the teacher


TAUGHT = with_(teacher=MovingAverage(decay=0.5, final_decay=0.9, steps=2), ramp_steps=2)
SGD = optax.sgd(0.5)  # updates are what they are


@functools.cache
def train_step():
    objective = TAUGHT.build(VOCAB)
    return jax.jit(make_train_step(objective, SGD, objective.specs, seed=0))


@functools.cache
def states() -> list[TrainState]:
    """Those of four steps."""
    objective = TAUGHT.build(VOCAB)
    state = jax.jit(lambda: initial_state(objective, SGD, objective.specs, seed=0))()
    found = [jax.device_get(state)]
    for _ in range(4):
        state, _ = train_step()(state, BATCH)
        found.append(jax.device_get(state))
    return found


def test_the_teacher_follows_and_resumes_exactly():
    first, *later = states()
    want = first.params
    chex.assert_trees_all_equal(first.carry["teacher"], want)
    for state, decay in zip(later, (0.5, 0.7, 0.9, 0.9), strict=True):
        want = jax.tree.map(lambda a, b: np.float32(decay) * a + np.float32(1 - decay) * b, want, state.params)  # noqa: B023
        chex.assert_trees_all_close(state.carry["teacher"], want, rtol=1e-5, atol=1e-6)
    assert float(optax.tree.norm(jax.tree.map(np.subtract, want, later[-1].params))) > 0.01
    state = jax.tree.map(jnp.asarray, states()[2])
    for _ in range(2):
        state, _ = train_step()(state, BATCH)
    chex.assert_trees_all_equal(jax.device_get(state), states()[4])


def test_a_refused_step_leaves_the_teacher_alone():
    before = states()[2]
    spoiled = before._replace(params=jax.tree.map(lambda leaf: leaf * np.nan, before.params))
    after, _ = train_step()(spoiled, BATCH)
    chex.assert_trees_all_equal(jax.device_get(after.carry), before.carry)
    assert int(after.guard.skipped) == 1


# -------------------------------------------------------------------------------------------- the alarm


def test_the_alarm_rises_where_all_places_get_one_prediction():
    example = corrupted()

    objective = CONFIG.build(VOCAB)
    counts = {term: count.sum() for term, count in example.counts.items()}
    # a head that says its bias, whatever it reads
    silent = jax.tree.map(lambda leaf: leaf * 0, params()["head"]) | {"bias": jnp.linspace(-2, 2, VOCAB.size)}

    def metrics(made: dict, step: int) -> dict[str, float]:
        out = losses_of(CONFIG)(made, example, {}, step)
        sums = {term: jnp.sum(loss * example.weights[term]) for term, loss in out.losses.items()}
        return {name: float(value) for name, value in finish(objective, Sums(sums, counts, out.stats)).items()}

    late, early = CONFIG.alarm_after, CONFIG.alarm_after - 1
    dead, alive = metrics(params() | {"head": silent}, late), metrics(params(), late)
    assert dead["information"] == pytest.approx(0, abs=1e-5)
    assert dead["loss/consistency"] == pytest.approx(0, abs=1e-6), "which consistency alone would be content with"
    assert dead["alarm/collapse"] == 1
    assert alive["information"] > 0.1
    assert alive["alarm/collapse"] == 0
    assert metrics(params() | {"head": silent}, early)["alarm/collapse"] == 0
    assert 0 < alive["prediction_entropy"] < np.log(61)


# ------------------------------------------------------------------------------------------- settings


def test_evaluation_compares_with_masked_lm():
    config = dataclasses.replace(TAUGHT, encoder=dataclasses.replace(ENCODER, dropout=0.1)).for_evaluation()
    assert (config.rate, config.shared, config.teacher, config.ramp_steps) == (0.15, 0.075, None, 0)
    assert config.encoder.dropout == 0
    objective = config.build(VOCAB)
    assert objective.start is None and objective.scale["consistency"] == 1.0


def test_views_show_every_view():
    objective, example = CONFIG.build(VOCAB), corrupted()
    assert objective.views is not None
    shown = objective.views(Snapshot({}, {}, jnp.int32(0)), example)
    assert list(shown) == ["view_1", "view_2"]
    for v, view in enumerate(shown.values()):
        np.testing.assert_array_equal(view.tokens, example.inputs["tokens"][:, v])
        np.testing.assert_array_equal(view.weights, example.weights["mlm"][:, v])


@pytest.mark.parametrize("rate", [0.025, 0.05, 0.1])
def test_evaluation_is_allowed_whatever_the_rounding(rate):
    with_(rate=rate, shared=rate, evaluation_rate=0.1).for_evaluation().build(VOCAB)


def test_what_cannot_be_is_refused():
    for changes, message in (
        ({"shared": 0.4}, r"shared is a part of what each view selects, in \(0, 0.3\], not 0.4"),
        ({"views": 1}, "at least 2, not 1"),
        ({"rate": 0.8}, "at rate, 2 views take .* = 1.45 of the tokens"),
        ({"views": 8, "rate": 0.11, "shared": 0.02}, "at evaluation_rate, 8 views take .*: lower evaluation_rate"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"teacher": MovingAverage(), "stop_gradient": "second"}, "a teacher has no gradient"),
        ({"mask": 0.9, "random": 0.2}, "more than 1"),
    ):
        with pytest.raises(ValueError, match=message):
            with_(**changes).build(VOCAB)
    with pytest.raises(ValueError, match="final_decay needs steps"):
        MovingAverage(final_decay=0.999)
