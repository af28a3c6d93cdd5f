"""Sums and mixtures of objectives: what the parts do alone, they do together."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import packed_batch, tiny, tiny_vocab

from jaxpt.config import RunConfig, config_types, from_json, override, to_json, validate
from jaxpt.corruption.rows import row_keys
from jaxpt.models.config import TransformerConfig
from jaxpt.objectives import CausalLM, MaskedLM, Mixture, Multitask, SimCSE
from jaxpt.objectives.combine import Portion, Task
from jaxpt.objectives.members import unite_rows
from jaxpt.objectives.schedules import Cosine, Exponential, Linear, Stairs, WarmUp
from jaxpt.step import Gradient, batch_gradient, finish, initial_state, make_eval_step, make_example, make_train_step
from jaxpt.types import Batch, Example, Objective, Out, Packing, ParamSpec, RowSpec, Snapshot

VOCAB = tiny_vocab()


@dataclass(frozen=True)
class Toy:
    """A row-wise regression on noise; ``coupled`` adds a term over all rows, ``teacher`` a moving average."""

    gain: float = 1.0
    width: int = 3
    coupled: bool = False
    teacher: bool = False
    group: str = "main"
    packing: Packing = "concatenate"
    suffix: tuple[int, ...] = ()
    reserve: int = 0
    fields: tuple[str, ...] = ()

    def for_evaluation(self) -> Toy:
        return self

    def build(self, vocab) -> Objective:
        specs = {
            "trunk": {"in": ParamSpec((None,), "kernel", self.group), "out": ParamSpec((None,), "kernel")},
            "head": {"bias": ParamSpec((None,), "bias")},
        }

        def init(key):
            first, second = jax.random.split(key)
            trunk = {name: jax.random.normal(k, (self.width,)) for name, k in (("in", first), ("out", second))}
            return {"trunk": trunk, "head": {"bias": jnp.zeros(1)}}

        def corrupt(snapshot: Snapshot, batch: Batch, key) -> Example:
            length = batch.tokens.shape[1]
            noise = jax.vmap(lambda k: jax.random.uniform(k, (length,)))(row_keys(key, batch.row_ids))
            weights = {"fit": (batch.segment_ids > 0).astype(jnp.float32)}
            if self.coupled:
                weights["pair"] = jnp.ones(len(batch.tokens))
            return Example({"x": self.gain * batch.tokens / 30.0, "noise": noise}, batch.row_ids, weights)

        def loss(snapshot, example, keys) -> Out:
            trunk, inputs = snapshot.params["trunk"], example.inputs
            hidden = jnp.tanh(inputs["x"][..., None] * trunk["in"] + inputs["noise"][..., None])
            guess = hidden @ trunk["out"] + snapshot.params["head"]["bias"]
            error = (guess - inputs["noise"]) ** 2
            stats = {"errors": jnp.sum(error * example.weights["fit"])}
            return Out({"fit": error}, stats, {"state": hidden.mean(1)})

        def couple(snapshot, features, example):
            state = features["state"]
            scores = state @ state.T
            return {"pair": jax.nn.logsumexp(scores, 1) - jnp.diag(scores)}, {"pairs": jnp.float32(scores.size)}

        def advance(snapshot, features, example):
            mean = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, snapshot.carry, snapshot.params["trunk"])
            return snapshot.params, mean

        return Objective(
            rows=RowSpec(self.packing, suffix=self.suffix, reserve=self.reserve, fields=self.fields),
            specs=specs,
            init=init,
            corrupt=corrupt,
            loss=loss,
            scale={"fit": 1.0} | ({"pair": 0.5} if self.coupled else {}),
            couple=couple if self.coupled else None,
            start=(lambda params, key: params["trunk"]) if self.teacher else None,
            advance=advance if self.teacher else None,
            summary=lambda sums: {"mean_error": sums.stats["errors"] / sums.counts["fit"]},
        )


ALL = Toy(coupled=True, teacher=True)
OTHER = Toy(gain=2.0)


def rows_of(size: int = 8, spec: RowSpec = RowSpec()) -> Batch:  # noqa: B008
    return packed_batch(spec, VOCAB, length=12, size=size)


@functools.partial(jax.jit, static_argnums=(0, 3))
def gradient(config, batch: Batch, step=0, microbatches: int = 1) -> tuple[Example, Gradient]:
    """As the train step computes it."""
    objective = config.build(VOCAB)
    params = objective.init(jax.random.key(0))
    carry = objective.start(params, jax.random.key(1)) if objective.start else {}
    snapshot = Snapshot(params, carry, jnp.int32(step))
    example = make_example(objective, snapshot, batch, jax.random.key(2))
    keys = row_keys(jax.random.key(3), example.row_ids)
    return example, batch_gradient(objective, objective.specs, snapshot, example, keys, microbatches)


def of_part(entries: dict, name: str) -> dict:
    return {key.removeprefix(f"{name}/"): value for key, value in entries.items() if key.startswith(f"{name}/")}


# ------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    "course, want",
    [
        (Linear(1.0, 0.2, 2, 6), [1.0, 1.0, 0.6, 0.2, 0.2]),
        (Cosine(1.0, 0.0, 2, 6), [1.0, 1.0, 0.5, 0.0, 0.0]),
        (Exponential(4.0, 1.0, 2, 6), [4.0, 4.0, 2.0, 1.0, 1.0]),
        (Stairs((0, 2, 4), (3.0, 0.0, 5.0)), [3.0, 0.0, 5.0, 5.0, 5.0]),
        (WarmUp(3.0, 2, 6), [0.0, 0.0, 1.5, 3.0, 3.0]),
        (None, [1.0] * 5),
    ],
)
def test_weights_at_steps(course, want):
    """Steps 0, 2, 4, 6 and 7, as the traced step; the last is what evaluation takes."""
    config = Multitask((Task("a", ALL, 3.0, course), Task("b", OTHER)), rows=None)
    scale = config.build(VOCAB).scale
    both = lambda step: jnp.stack([jnp.float32(_value(scale[term], step)) for term in ("a/fit", "a/pair")])  # noqa: E731
    values = jax.jit(jax.vmap(both))
    found = values(jnp.array([0, 2, 4, 6, 7]))
    np.testing.assert_allclose(found, 3.0 * np.stack([want, 0.5 * np.array(want)], 1), rtol=1e-6, atol=1e-7)
    assert scale["b/fit"] == 1.0
    assert config.for_evaluation().parts[0].weight == 3.0 * want[-1]


def _value(scale, step):
    return scale(step) if callable(scale) else scale


def test_a_schedule_of_a_part_is_multiplied():
    inner = Multitask((Task("x", Toy(), course=Linear(0.0, 4.0, 0, 4)),), rows=None)
    scale = Multitask((Task("outer", inner, course=Linear(1.0, 0.0, 0, 4)),), rows=None).build(VOCAB).scale
    assert [float(scale["outer/x/fit"](step)) for step in range(5)] == [0.0, 0.75, 1.0, 0.75, 0.0]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Linear(1.0, 0.0, 5, 5), "end must come after begin"),
        (lambda: WarmUp(1.0, -1, 5), "begin must be at least 0"),
        (lambda: Exponential(1.0, 0.0, 0, 5), "Linear reaches 0"),
        (lambda: Stairs((1, 2), (0.0, 1.0)), "rise from 0"),
        (lambda: Stairs((0, 2), (1.0,)), "one value each"),
    ],
)
def test_schedules_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --------------------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("combination", [Multitask((Task("a", ALL),), None), Mixture((Portion("a", ALL),), None)])
def test_one_part_is_the_part_itself(combination):
    """Bit for bit: example, gradient, sums."""
    (example, whole), (want_example, want) = gradient(combination, rows_of()), gradient(ALL, rows_of())
    chex.assert_trees_all_equal(example.inputs["a"], want_example.inputs)
    chex.assert_trees_all_equal(whole.grads, want.grads)
    for found, wanted in zip(whole[1:], want[1:], strict=True):
        chex.assert_trees_all_equal(of_part(found, "a"), wanted)


def test_the_gradient_of_a_sum_is_the_sum_of_the_gradients():
    courses = {"a": (0.3, None), "b": (2.0, Linear(0.5, 0.0, 0, 10))}
    parts = {"a": ALL, "b": OTHER}
    config = Multitask(tuple(Task(name, parts[name], *courses[name]) for name in parts), rows=None)
    together = gradient(config, rows_of(), 4)[1].grads
    alone = {}
    for name in parts:
        only = tuple(replace(part, weight=float(part.name == name), course=None) for part in config.parts)
        alone[name] = gradient(replace(config, parts=only), rows_of(), 4)[1].grads
    want = jax.tree.map(lambda a, b: 0.3 * a + 0.6 * b, alone["a"], alone["b"])
    chex.assert_trees_all_close(together, want, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(alone["a"], gradient(ALL, rows_of())[1].grads, rtol=1e-6, atol=1e-7)
    assert float(optax.tree.norm(alone["b"])) > 0.1


def test_parts_of_a_sum_draw_apart():
    example, _ = gradient(Multitask((Task("a", Toy()), Task("b", Toy())), rows=None), rows_of())
    first, second = (np.asarray(example.inputs[name]["noise"]).ravel() for name in "ab")
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / len(first) ** 0.5


def test_a_weight_of_0_silences_a_part_without_a_new_program():
    config = Multitask((Task("a", Toy(), course=Stairs((0, 5), (1.0, 0.0))), Task("b", OTHER)), rows=None)
    before = gradient._cache_size()
    early, late = (gradient(config, rows_of(), step)[1].grads for step in (4, 5))
    assert gradient._cache_size() == before + 1
    silent = Multitask((Task("a", Toy(), 0.0), Task("b", OTHER)), rows=None)
    chex.assert_trees_all_close(late, gradient(silent, rows_of(), 5)[1].grads, rtol=1e-6)
    assert not np.allclose(early["trunk"]["in"], late["trunk"]["in"])


# ------------------------------------------------------------------------------------------------ mixtures

MIXED = Mixture((Portion("a", ALL, share=3), Portion("b", OTHER)), rows=None)


def test_every_part_sees_its_own_rows_only():
    batch = rows_of()
    example, mixed = gradient(MIXED, batch)
    counts = {term: np.asarray(count > 0).tolist() for term, count in example.counts.items()}
    assert counts["a/fit"] == counts["a/pair"] == [True] * 6 + [False] * 2
    assert counts["b/fit"] == [False] * 6 + [True] * 2
    own = {"a": (ALL, slice(0, 6)), "b": (OTHER, slice(6, 8))}
    grads = []
    for name, (config, rows) in own.items():
        _, alone = gradient(config, jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch))
        chex.assert_trees_all_close(of_part(mixed.losses, name), alone.losses, rtol=1e-6)
        chex.assert_trees_all_close(of_part(mixed.stats, name), alone.stats, rtol=1e-6)
        grads.append(alone.grads)
    want = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, *grads)  # each part weighs its share of the rows
    chex.assert_trees_all_close(mixed.grads, want, rtol=1e-5, atol=1e-6)
    # no part reads another's rows, in the coupled term neither
    other = batch._replace(tokens=np.concatenate([batch.tokens[:6], (batch.tokens[6:] + 3) % VOCAB.size]))
    _, changed = gradient(MIXED, other)
    chex.assert_trees_all_equal(of_part(changed.losses, "a"), of_part(mixed.losses, "a"))
    assert changed.losses["b/fit"] != mixed.losses["b/fit"]


NESTED = Multitask((Task("mix", replace(MIXED, parts=(replace(MIXED.parts[0], share=1), MIXED.parts[1]))),
                    Task("c", Toy(gain=0.5, coupled=True), 0.2)), rows=None)  # fmt: skip


@pytest.mark.parametrize("config", [MIXED, NESTED, Mixture((Portion("x", NESTED), Portion("y", OTHER)), rows=None)])
def test_microbatches_agree(config):
    """Coupled terms included; every strided microbatch holds each part's share."""
    batch = rows_of(16)
    example, whole = gradient(config, batch)
    for microbatches in (2, 4):
        same, cut = gradient(config, batch, 0, microbatches)
        chex.assert_trees_all_equal(same, example)
        chex.assert_trees_all_close(cut, whole, rtol=2e-5, atol=1e-5)


def test_nesting_keeps_every_name():
    example, out = gradient(NESTED, rows_of())
    assert set(example.weights) == {"mix/a/fit", "mix/a/pair", "mix/b/fit", "c/fit", "c/pair"}
    assert set(out.losses) == set(example.weights)
    assert set(out.features) == {"mix/a/state", "mix/b/state", "c/state"}
    objective = NESTED.build(VOCAB)
    state = objective.start(objective.init(jax.random.key(0)), jax.random.key(1))
    assert set(state) == {"mix"} and set(state["mix"]) == {"a"}


def test_rows_that_cannot_be_divided():
    with pytest.raises(ValueError, match=r"6 rows .* 3 : 1: make batch_size a multiple of 4 times microbatches"):
        gradient(MIXED, rows_of(6))
    even = Mixture((Portion("a", Toy(), share=30), Portion("b", OTHER, share=10)), rows=None)
    assert gradient(even, rows_of(8))[0].counts["b/fit"][6:].all()  # 30 : 10 is 3 : 1


def test_evaluation_gives_every_row_to_every_part():
    judge = MIXED.for_evaluation()
    assert [part.weight for part in judge.parts] == [0.75, 0.25]
    batch, objective = rows_of(5), judge.build(VOCAB)
    params = objective.init(jax.random.key(0))
    carry = objective.start(params, jax.random.key(1))
    step = make_eval_step(objective, seed=0)
    metrics = finish(objective, step(params, carry, jnp.int32(0), batch))
    for name, config in (("a", ALL), ("b", OTHER)):
        alone = config.build(VOCAB)
        want = finish(alone, make_eval_step(alone, seed=0)(params, carry.get(name, {}), jnp.int32(0), batch))
        assert metrics[f"loss/{name}/fit"] == want["loss/fit"]
        assert metrics[f"{name}/mean_error"] == want["mean_error"]


# ------------------------------------------------------------------------------------- state between steps


@functools.cache
def trained(steps: int, microbatches: int = 1):
    objective = MIXED.build(VOCAB)
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_train_step(objective, optimizer, objective.specs, seed=0, microbatches=microbatches))
    state = initial_state(objective, optimizer, objective.specs, seed=0)
    for _ in range(steps):
        state, _ = step(state, rows_of())
    return step, jax.device_get(state)


def test_carry_belongs_to_its_part_and_resumes():
    step, half = trained(2)
    _, whole = trained(4)
    assert set(half.carry) == {"a"}
    resumed = jax.tree.map(jnp.asarray, half)
    for _ in range(2):
        resumed, _ = step(resumed, rows_of())
    chex.assert_trees_all_equal(jax.device_get(resumed), whole)
    # the teacher follows the trunk that all parts train
    _, third = trained(3)
    want = 0.5 * half.carry["a"]["in"] + 0.5 * third.params["trunk"]["in"]
    np.testing.assert_allclose(third.carry["a"]["in"], want, rtol=1e-6)


def test_frozen_parameters_stay_out_of_the_gradient():
    frozen = Multitask((Task("a", replace(ALL, group="frozen")), Task("b", replace(OTHER, group="frozen"))), rows=None)
    grads = gradient(frozen, rows_of())[1].grads
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(grads)} == {"out", "bias"}


# ------------------------------------------------------------------------------------------ what must agree


def refuse(config, *patterns: str) -> None:
    with pytest.raises(ValueError) as caught:
        config.build(VOCAB)
    for pattern in patterns:
        assert pattern in str(caught.value), caught.value


def test_networks_that_differ_are_refused():
    wide = Multitask((Task("a", Toy()), Task("b", Toy(width=5))), rows=None)
    refuse(wide, "'a' and 'b' share the network 'trunk'", "its in is (3,)", "(5,)", "own=('trunk',)")
    group = Multitask((Task("a", Toy()), Task("b", Toy(group="frozen"))), rows=None)
    refuse(group, "'a' and 'b' share the network 'trunk'", "its in is", "'frozen'")
    masked = tiny(Multitask())
    masked = replace(masked, parts=(replace(masked.parts[0], objective=MaskedLM(masked.parts[1].objective.decoder)),
                                    masked.parts[1]))  # fmt: skip
    refuse(masked, "'mlm' and 'clm' share the network 'head'", "absent")


def test_a_part_can_keep_a_network_to_itself():
    apart = Multitask((Task("a", Toy()), Task("b", Toy(width=5), own=("trunk",))), rows=None)
    objective = apart.build(VOCAB)
    params = objective.init(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == {
        "trunk": {"in": (3,), "out": (3,)},
        "b_trunk": {"in": (5,), "out": (5,)},
        "head": {"bias": (1,)},
    }
    assert jax.tree.structure(params) == jax.tree.structure(objective.specs)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradient(apart, rows_of())[1].grads))
    refuse(Multitask((Task("a", Toy(), own=("tail",)),), rows=None), "has no network tail", "trunk, head")


@pytest.mark.parametrize("change, word", [({"packing": "best_fit"}, "packing"), ({"suffix": (3,)}, "suffix")])
def test_rows_that_differ_are_refused_or_chosen(change, word):
    config = Multitask((Task("a", Toy()), Task("b", Toy(**change))), rows=None)
    refuse(config, "'a' asks for rows with", word, "rows='a' or rows='b'")
    assert getattr(replace(config, rows="b").build(VOCAB).rows, word) == change[word]
    refuse(replace(config, rows="c"), "rows='c' is not the name of a part")


@pytest.mark.parametrize("packing", ["one_document", "best_fit"])
def test_texts_that_get_their_own_cls_keep_their_rows(packing):
    """Rows of masked_lm have [CLS] already, and perhaps several documents; those of simcse serve both."""
    network = TransformerConfig(depth=1, width=8, heads=1)
    parts = Task("mlm", MaskedLM(encoder=network, packing=packing)), Task("sim", SimCSE(encoder=network))
    refuse(Multitask(parts, rows="mlm"), "'sim' puts the text of a row between [CLS] and [SEP] itself", "rows='sim'")
    assert Multitask(parts, rows="sim").build(VOCAB).rows.prefix == ()


def test_rows_have_room_and_fields_for_every_part():
    parts = Task("a", Toy(reserve=2, fields=("phrase_starts",))), Task("b", Toy(reserve=5, fields=("document_ids",)))
    rows = Multitask(parts, rows=None).build(VOCAB).rows
    assert rows.tokens(64) == 59
    assert rows.fields == ("phrase_starts", "document_ids")


def test_streams_and_pairs_stay_whole():
    def united(first: RowSpec, second: RowSpec) -> RowSpec:
        members = [
            SimpleNamespace(name=n, objective=SimpleNamespace(rows=r, embed=None))
            for n, r in (("a", first), ("b", second))
        ]
        return unite_rows("mixture", members, "a")

    stream, pairs = RowSpec("stream"), RowSpec("best_fit", texts=2)
    assert united(stream, RowSpec()).packing == "stream"
    assert united(pairs, RowSpec("best_fit")).texts == united(RowSpec("best_fit"), pairs).texts == 2
    with pytest.raises(ValueError, match="'b' goes on where the row before ended"):
        united(RowSpec(), stream)
    with pytest.raises(ValueError, match="'b' reads pairs, which rows packed as 'concatenate' would cut"):
        united(RowSpec(), pairs)


def test_names_are_checked():
    refuse(Multitask((), rows=None), "parts is empty")
    refuse(Multitask((Task("a", Toy()), Task("a", Toy())), rows=None), "a name of its own")
    refuse(Mixture((Portion("a/b", Toy()),), rows=None), "without a slash")
    refuse(Mixture((Portion("a", Toy(), share=0),), rows=None), "share of 'a' is 0")


# ------------------------------------------------------------------------------------ files and command line


@pytest.mark.parametrize("objective", [Multitask(), Mixture(), NESTED])
def test_configurations_are_saved(objective):
    config = RunConfig(objective, out="run")
    validate(config, data=False)
    assert from_json(to_json(config), config_types(config)) == config
    hash(objective)


def test_flags_reach_into_the_parts():
    first, second = Multitask().parts
    objective = Multitask((replace(first, course=WarmUp(1.0, 0, 9)), second))
    flags = {"objective.rate": "0.3", "course.last": "0.5", "objective.encoder.depth": "3"}
    args = [text for name, value in flags.items() for text in (f"--objective.parts.0.{name}", value)]
    found = override(RunConfig(objective, out="run"), [*args, "--objective.parts.1.weight", "0.02"]).objective
    assert isinstance(found, Multitask) and isinstance(found.parts[0].objective, MaskedLM)
    assert found.parts[0].objective.rate == 0.3 and found.parts[0].objective.encoder.depth == 3
    assert found.parts[0].course == WarmUp(0.5, 0, 9) and found.parts[1].weight == 0.02
    mixed = override(RunConfig(Mixture(), out="run"), ["--objective.parts.0.share", "15"]).objective
    assert isinstance(mixed, Mixture) and mixed.parts[0].share == 15 and mixed.parts[0].weight is None


def test_the_hybrid_predicts_every_token_from_the_place_before_it():
    """GPT-BERT: one trunk and one head; the masked half of the rows is read from both sides, the other causally."""
    config = tiny(Mixture())
    objective = config.build(VOCAB)
    assert set(objective.specs) == {"trunk", "head"}
    assert objective.scale == {"mlm/mlm": 0.5, "clm/lm": 0.5}
    batch = packed_batch(objective.rows, VOCAB, 24, 8)
    snapshot = Snapshot(objective.init(jax.random.key(0)), {}, jnp.int32(0))
    example = jax.device_get(jax.jit(lambda: make_example(objective, snapshot, batch, jax.random.key(0)))())
    masked, causal = example.inputs["mlm"], example.inputs["clm"]
    row, k = np.argwhere(np.asarray(example.weights["mlm/mlm"]) > 0)[0]
    assert batch.tokens[row, masked["target_positions"][row, k] + 1] == masked["targets"][row, k]
    assert (causal["tokens"][4:] == batch.tokens[4:]).all()
    assert (np.asarray(masked["tokens"][:4]) == VOCAB.mask).any()
    assert isinstance(config.parts[1].objective, CausalLM)
