"""Schedules, weight decay by role, groups, and statistics per layer of a stack."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpt.optimizer import (
    OptimizerConfig,
    ParameterGroup,
    assign_groups,
    learning_rate_schedule,
    make_optimizer,
    restore_frozen,
    trainable,
)
from jaxpt.types import FROZEN, ParamSpec

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


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_weight_decay_goes_by_role(name: str):
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
