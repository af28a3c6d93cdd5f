"""Schedules, weight decay by role, groups, and every optimizer layer by layer against Optax on single tensors."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpt.optimizer import (
    OptimizerConfig,
    OptimizerName,
    ParameterGroup,
    assign_groups,
    check_optimizer,
    evaluated_params,
    learning_rate_schedule,
    make_optimizer,
    restore_frozen,
    trainable,
)
from jaxpt.sharding import MeshConfig, make_mesh, param_shardings, state_shardings
from jaxpt.types import FROZEN, ParamSpec

NAMES = typing.get_args(OptimizerName)

SPECS = {
    "embed": ParamSpec(("vocab", "embed"), "embedding"),
    "layers": {
        "kernel": ParamSpec(("layers", "embed", "mlp"), "kernel"),
        "scale": ParamSpec(("layers", None), "norm"),
    },
    "bias": ParamSpec((None,), "bias"),
}


def params() -> dict:
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "embed": jax.random.normal(keys[0], (5, 4)),
        "layers": {"kernel": jax.random.normal(keys[1], (3, 4, 6)), "scale": 1 + jax.random.normal(keys[2], (3, 4))},
        "bias": jax.random.normal(keys[3], (4,)),
    }


def update(config: OptimizerConfig, specs: dict = SPECS, grads: dict | None = None, times: int = 1) -> dict:
    values = params()
    specs = assign_groups(config, specs)
    optimizer = make_optimizer(config, specs, values, 10)
    part = trainable(specs, values)
    grads = trainable(specs, jax.tree.map(jnp.zeros_like, values) if grads is None else grads)
    state = optimizer.init(part)
    for _ in range(times):
        updates, state = optimizer.update(grads, state, part)
        part = optax.apply_updates(part, updates)
    return restore_frozen(part, values)


@pytest.mark.parametrize(
    ("settings", "at"),
    [
        ({"schedule": "constant"}, {0: 0.0, 5: 0.5, 10: 1.0, 50: 1.0, 110: 1.0}),
        ({"schedule": "cosine"}, {5: 0.5, 10: 1.0, 60: 0.5, 110: 0.0, 200: 0.0}),
        ({"schedule": "cosine", "final_fraction": 0.1}, {60: 0.55, 110: 0.1}),
        ({"schedule": "linear"}, {10: 1.0, 35: 0.75, 110: 0.0, 300: 0.0}),
        ({"schedule": "inverse_sqrt"}, {10: 1.0, 40: 0.5, 90: 1 / 3}),
        ({"schedule": "wsd", "decay_steps": 20}, {10: 1.0, 90: 1.0, 100: 0.5, 110: 0.0}),
        ({"schedule": "linear", "schedule_steps": 60}, {10: 1.0, 35: 0.5, 60: 0.0}),
    ],
)
def test_schedules(settings: dict, at: dict):
    rate = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10, **settings), 110)
    for step, value in at.items():
        np.testing.assert_allclose(rate(jnp.int32(step)), value, rtol=1e-5, atol=1e-7, err_msg=f"{settings} at {step}")


def test_schedules_that_cannot_be():
    with pytest.raises(ValueError, match="lower the warm-up"):
        learning_rate_schedule(OptimizerConfig(warmup_steps=11), 10)
    with pytest.raises(ValueError, match="decay_steps <= 8"):
        learning_rate_schedule(OptimizerConfig(warmup_steps=2, schedule="wsd"), 10)


def test_phases_change_the_rate():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule="linear")
    rate = learning_rate_schedule(config, 110, changes=((20, 2.0), (60, 0.5)))
    for step, value in {5: 0.5, 19: 0.91, 20: 1.8, 59: 1.02, 60: 0.25, 110: 0.0}.items():
        np.testing.assert_allclose(rate(jnp.int32(step)), value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "schedule is cosine, but schedule_free averages.*--optimizer.schedule constant"),
        ({"schedule": "constant", "averaging": 0.99}, "averaging must be 0"),
        ({"schedule": "constant", "beta1": 0.0}, "beta1 is 0.0"),
        ({"name": "muon", "muon_rms": 0.0}, "muon_rms is 0.0"),
    ],
)
def test_settings_that_cannot_be(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        check_optimizer(OptimizerConfig(**{"name": "schedule_free", **settings}), 10)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_weight_decay_goes_by_role(name: OptimizerName):
    new = update(OptimizerConfig(name, learning_rate=0.1, schedule="constant", weight_decay=0.5, clip_norm=None))
    old = params()
    np.testing.assert_allclose(new["embed"], 0.95 * old["embed"], rtol=1e-6)
    np.testing.assert_allclose(new["layers"]["kernel"], 0.95 * old["layers"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(new["layers"]["scale"], old["layers"]["scale"])  # rank 2, and yet a norm
    np.testing.assert_array_equal(new["bias"], old["bias"])


def test_groups_have_settings_of_their_own():
    config = OptimizerConfig(
        learning_rate=0.1,
        schedule="constant",
        weight_decay=0.5,
        clip_norm=None,
        groups=(ParameterGroup("layers/*", learning_rate=0.1, weight_decay=0.2), ParameterGroup("embed", frozen=True)),
    )
    new, old = update(config), params()
    np.testing.assert_allclose(new["layers"]["kernel"], (1 - 0.01 * 0.2) * old["layers"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(new["embed"], old["embed"])
    assert assign_groups(config, SPECS)["embed"].group == FROZEN
    with pytest.raises(ValueError, match=r"'encoder/.*' matches no parameter; they are bias, embed, layers/kernel"):
        assign_groups(OptimizerConfig(groups=(ParameterGroup("encoder/*"),)), SPECS)


def test_clipping_leaves_frozen_gradients_out():
    grads = jax.tree.map(jnp.ones_like, params())
    config = OptimizerConfig(learning_rate=1.0, schedule="constant", weight_decay=0.0, clip_norm=1.0, epsilon=1.0)
    config = OptimizerConfig(**{**vars(config), "groups": (ParameterGroup("layers/*", frozen=True),)})
    new, old = update(config, grads=grads), params()
    clipped = 1 / np.sqrt(24)  # 20 + 4 ones are left
    np.testing.assert_allclose(old["bias"] - new["bias"], clipped / (clipped + 1.0), rtol=1e-5)  # Adam's first step


def test_adamw_is_optax_adamw():
    grads = jax.tree.map(jnp.cos, params())
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", weight_decay=0.0, clip_norm=None, beta2=0.98)
    new = update(config, grads=grads, times=3)
    reference, values = optax.adam(0.1, b2=0.98), params()
    state = reference.init(values)
    for _ in range(3):
        updates, state = reference.update(grads, state)
        values = optax.apply_updates(values, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), new, values)


def test_adafactor_is_optax_adafactor_layer_by_layer():
    big = {"layers": {"kernel": 3 * jax.random.normal(jax.random.key(1), (3, 128, 130))}}
    specs = {"layers": {"kernel": SPECS["layers"]["kernel"]}}
    grads = jax.tree.map(lambda leaf: jnp.cos(leaf) * jnp.array([1.0, 10.0, 0.1])[:, None, None], big)
    config = OptimizerConfig("adafactor", learning_rate=0.1, schedule="constant", weight_decay=0.0, clip_norm=None)
    optimizer = make_optimizer(config, specs, big, 10)
    state = optimizer.init(big)
    updates, state = optimizer.update(grads, state, big)
    reference = optax.adafactor(0.1)
    for layer in range(3):
        kernel, grad = big["layers"]["kernel"][layer], grads["layers"]["kernel"][layer]
        want, _ = reference.update(grad, reference.init(kernel), kernel)
        np.testing.assert_allclose(updates["layers"]["kernel"][layer], want, rtol=1e-5)
    assert max(leaf.size for leaf in jax.tree.leaves(state)) <= 3 * 130  # factored, layer by layer


# ------------------------------------------------------------------------------- layer by layer, against Optax

DEEP = {
    "embed": ParamSpec(("vocab", "embed"), "embedding"),
    "head": ParamSpec(("vocab", "embed"), "kernel"),
    "layers": {
        "up": ParamSpec(("layers", "embed", "mlp"), "kernel"),
        "down": ParamSpec(("layers", "mlp", "embed"), "kernel"),
        "scale": ParamSpec(("layers", None), "norm"),
        "bias": ParamSpec(("layers", "mlp"), "bias"),
    },
    "dense": ParamSpec(("embed", None), "kernel"),
    "still": ParamSpec(("embed", None), "kernel"),
}
SHAPES = {
    "embed": (8, 4),
    "head": (8, 4),
    "layers": {"up": (3, 4, 8), "down": (3, 8, 4), "scale": (3, 4), "bias": (3, 8)},
    "dense": (4, 4),
    "still": (4, 4),
}


def deep(seed: int) -> dict:
    """Parameters, or gradients, whose layers and tensors differ in size; biases begin at 0."""
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda leaf: isinstance(leaf, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    sized = [
        jax.random.normal(key, shape) * 4.0 ** -jnp.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        if len(shape) > 1
        else jax.random.normal(key, shape)
        for key, shape in zip(keys, leaves, strict=True)
    ]
    tree = structure.unflatten(sized)
    if seed == 0:
        tree["layers"]["bias"] *= 0.0
    return tree


def single(name: str, path: str, rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    """What Optax does to one tensor of one layer."""
    matrix, decays = path in ("layers/up", "layers/down", "dense"), path not in ("layers/scale", "layers/bias")
    decay = decay if decays else 0.0
    if name == "lamb" and decays:
        return optax.lamb(rate, weight_decay=decay)
    if name == "lion":
        return optax.lion(rate, weight_decay=decay)
    if name == "muon" and matrix:
        return optax.contrib.muon(rate, weight_decay=decay, consistent_rms=0.2)
    if name == "schedule_free":
        return optax.contrib.schedule_free_adamw(rate, weight_decay=decay)  # pyright: ignore[reportArgumentType]
    return optax.adamw(rate, eps=1e-6 if name == "lamb" else 1e-8, weight_decay=decay)


@pytest.mark.parametrize("name", ["lamb", "lion", "muon", "schedule_free"])
def test_every_layer_is_updated_as_optax_updates_it_alone(name: OptimizerName):
    config = OptimizerConfig(
        name, learning_rate=0.1, warmup_steps=2, weight_decay=0.3, clip_norm=None,
        schedule="constant" if name == "schedule_free" else "linear",
        groups=(
            ParameterGroup("layers/down", learning_rate=0.5, weight_decay=0.1),
            ParameterGroup("still", frozen=True),
        ),
    )  # fmt: skip
    specs, values = assign_groups(config, DEEP), deep(0)
    optimizer = make_optimizer(config, specs, values, 10)
    schedule = learning_rate_schedule(config, 10)
    part = trainable(specs, values)
    state = optimizer.init(part)
    update = jax.jit(optimizer.update)
    for step in range(3):
        updates, state = update(trainable(specs, deep(1 + step)), state, part)
        part = optax.apply_updates(part, updates)
    got, evaluated = restore_frozen(part, values), evaluated_params(state, part)
    assert (evaluated is None) == (name != "schedule_free")

    def check(path: str, pick) -> None:
        factor, decay = (0.5, 0.1) if path == "layers/down" else (1.0, 0.3)
        reference = single(name, path, lambda count: factor * schedule(count), decay)
        alone = pick(values)
        inner = reference.init(alone)
        for step in range(3):
            change, inner = reference.update(pick(deep(1 + step)), inner, alone)
            alone = optax.apply_updates(alone, change)
        np.testing.assert_allclose(pick(got), alone, rtol=2e-5, atol=2e-6, err_msg=path)
        if evaluated is not None:
            want = optax.contrib.schedule_free_eval_params(inner, alone)
            np.testing.assert_allclose(pick(evaluated), want, rtol=2e-5, atol=2e-6, err_msg=path)
            assert np.abs(want - alone).max() > 1e-4  # x is not y

    for path in ("embed", "head", "dense"):
        check(path, lambda tree, path=path: tree[path])
    for path in ("up", "down", "scale", "bias"):
        for layer in range(3):
            check(f"layers/{path}", lambda tree, path=path, layer=layer: tree["layers"][path][layer])
    np.testing.assert_array_equal(got["still"], values["still"])


def first_update(name: OptimizerName, grads: dict, **settings) -> dict:
    config = OptimizerConfig(name, learning_rate=0.1, schedule="constant", weight_decay=0.0, clip_norm=None, **settings)
    values = deep(0)
    optimizer = make_optimizer(config, DEEP, values, 10)
    return optimizer.update(grads, optimizer.init(values), values)[0]


def test_lion_moves_everything_by_the_learning_rate():
    grads = deep(1)
    for update, grad in zip(jax.tree.leaves(first_update("lion", grads)), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(update, -0.1 * np.sign(grad), rtol=1e-6)


def test_lamb_moves_each_layer_by_the_learning_rate_times_its_norm():
    updates, values = first_update("lamb", deep(1)), deep(0)
    for path in ("up", "down"):
        for layer in range(3):
            moved = np.linalg.norm(updates["layers"][path][layer])
            np.testing.assert_allclose(moved, 0.1 * np.linalg.norm(values["layers"][path][layer]), rtol=1e-5)
    # norms and biases are Adam's: no ratio of norms
    np.testing.assert_allclose(np.abs(updates["layers"]["scale"]), 0.1, rtol=1e-2)


@pytest.mark.parametrize("rms", [0.2, None])
def test_muon_makes_each_layer_nearly_orthogonal(rms: float | None):
    grads = deep(1)
    updates = first_update("muon", grads, muon_rms=rms)
    for path, fan_in, fan_out in (("up", 4, 8), ("down", 8, 4)):
        scale = rms * np.sqrt(max(fan_in, fan_out)) if rms else np.sqrt(max(1, fan_out / fan_in))
        for layer in range(3):
            # five times the quintic of Jordan 2024 on the singular values, written out
            u, s, vt = np.linalg.svd(np.asarray(grads["layers"][path][layer], np.float64), full_matrices=False)
            s /= np.linalg.norm(s)
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            assert s.min() > 0.5, "the gradient is too ill-conditioned for this test"
            assert s.max() < 1.3
            want = -0.1 * scale * (u * s) @ vt
            np.testing.assert_allclose(updates["layers"][path][layer], want, rtol=1e-3, atol=1e-5)
    for path in ("embed", "head"):  # Adam's first step: tables are no matrices
        np.testing.assert_allclose(updates[path], -0.1 * np.sign(grads[path]), rtol=1e-2)


def test_no_moments_for_what_needs_none():
    values = deep(0)
    sizes = {}
    for name in NAMES:
        config = OptimizerConfig(name, schedule="constant")
        state = jax.eval_shape(make_optimizer(config, DEEP, values, 10).init, values)
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim > 1)
    total = sum(leaf.size for leaf in jax.tree.leaves(values))
    matrices = sum(values["layers"][path].size for path in ("up", "down")) + 2 * 16
    assert sizes["adamw"] == sizes["lamb"] == sizes["schedule_free"] == 2 * total
    assert sizes["lion"] == total
    assert sizes["muon"] == 2 * total - matrices


@pytest.mark.parametrize("name", NAMES)
def test_moments_live_with_their_parameters_and_meshes_agree(name: OptimizerName):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    config = OptimizerConfig(
        name, learning_rate=0.1, schedule="constant", groups=(ParameterGroup("still", frozen=True),)
    )
    specs, values = assign_groups(config, DEEP), deep(0)
    optimizer = make_optimizer(config, specs, values, 10)

    def start(values: dict) -> dict:
        return {"params": values, "state": optimizer.init(trainable(specs, values))}

    def step(whole: dict, grads: dict) -> dict:
        part = trainable(specs, whole["params"])
        updates, state = optimizer.update(trainable(specs, grads), whole["state"], part)
        return {"params": restore_frozen(optax.apply_updates(part, updates), whole["params"]), "state": state}

    places = state_shardings(jax.eval_shape(start, values), specs, values, mesh)
    where = {leaf.shape: place for leaf, place in zip(
        jax.tree.leaves(values), jax.tree.leaves(param_shardings(specs, values, mesh)), strict=True
    ) if leaf.shape in ((3, 4, 8), (3, 8, 4), (8, 4))}  # fmt: skip
    placed = jax.device_put(start(values), places)
    found = 0
    for leaf in jax.tree.leaves(placed["state"]):
        if leaf.shape in where:
            found += 1
            assert leaf.sharding.is_equivalent_to(where[leaf.shape], leaf.ndim)
            assert leaf.addressable_shards[0].data.size == leaf.size // 4
    assert found == {"lion": 4, "muon": 6}.get(name, 4 if name == "adafactor" else 8)

    if name not in ("lamb", "muon", "schedule_free"):
        return  # by element, or small: where they live is all there is to it
    sharded = jax.jit(step, out_shardings=places)
    want, got = start(values), placed
    for seed in (1, 2):
        want, got = step(want, deep(seed)), sharded(got, jax.device_put(deep(seed), places["params"]))
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)
