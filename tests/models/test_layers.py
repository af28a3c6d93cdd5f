import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxpt.models.layers import ACTIVATIONS, Norm, dense, dropout, normal, ones, zeros
from jaxpt.models.params import constrain, initializer_of, specs_of, split, stacked
from jaxpt.types import ParamSpec

X = np.random.default_rng(0).standard_normal((2, 3, 5))


def normalise(kind, epsilon, *, bias):
    declared = split(Norm(kind, 5, epsilon, bias=bias))
    rng = np.random.default_rng(1)
    params = {name: rng.standard_normal(5) for name in declared.tree}
    return declared.bind(jax.tree.map(jnp.float32, params))(jnp.float32(X)), params


def test_layer_norm():
    out, params = normalise("layer", 0.1, bias=True)
    expected = (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, keepdims=True) + 0.1)
    np.testing.assert_allclose(out, expected * params["scale"] + params["bias"], atol=1e-6)
    assert set(normalise("layer", 0.1, bias=False)[1]) == {"scale"}


def test_rms_norm():
    out, params = normalise("rms", 0.1, bias=True)
    expected = X / np.sqrt((X**2).mean(-1, keepdims=True) + 0.1)
    np.testing.assert_allclose(out, expected * params["scale"], atol=1e-6)
    assert set(params) == {"scale"}


@pytest.mark.parametrize("x", [-3.0, -0.5, 0.0, 0.7, 2.5])
def test_activations(x):
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    expected = {
        "gelu": x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
        "gelu_tanh": 0.5 * x * (1 + math.tanh(inner)),
        "silu": x / (1 + math.exp(-x)),
        "relu": max(x, 0.0),
    }
    assert set(expected) == set(ACTIVATIONS)
    for name, value in expected.items():
        assert float(ACTIVATIONS[name](jnp.float32(x))) == pytest.approx(value, abs=1e-6)


def test_dense_sums_in_float32():
    x = jnp.full((1, 4096), 1.0, jnp.bfloat16)
    kernel = jnp.full((4096, 1), 2.0**-12)
    assert dense(x, kernel, jnp.ones(1)).dtype == jnp.bfloat16
    assert float(dense(x, kernel, jnp.ones(1))[0, 0]) == 2.0
    gradient = jax.grad(lambda k: dense(x, k).astype(jnp.float32).sum())(kernel)
    assert gradient.dtype == jnp.float32


@pytest.mark.parametrize("biased", [True, False])
def test_the_gradients_of_dense_equal_those_of_plain_products(biased):
    rng = np.random.default_rng(2)
    x, kernel, bias = (jnp.float32(rng.standard_normal(shape)) for shape in ((2, 3, 5), (5, 4), (4,)))
    pull = jnp.float32(rng.standard_normal((2, 3, 4)))
    rest = (bias,) if biased else ()
    wanted = jax.grad(lambda x, k, *b: jnp.vdot(pull, x @ k + sum(b)), argnums=range(2 + biased))(x, kernel, *rest)
    given = jax.grad(lambda *args: jnp.vdot(pull, dense(*args)), argnums=range(2 + biased))(x, kernel, *rest)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), given, wanted)


def test_dense_multiplies_in_the_dtype_of_its_input_in_both_directions():
    """Every product of forward and backward pass has bfloat16 operands and float32 sums."""
    x, kernel, bias = jnp.ones((2, 3, 5), jnp.bfloat16), jnp.ones((5, 4)), jnp.ones(4)
    program = jax.make_jaxpr(jax.grad(lambda *args: dense(*args).astype(jnp.float32).sum(), (0, 1, 2)))(x, kernel, bias)
    text = str(program)
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) >= 3 and all("preferred_element_type=float32" in text for _ in products)
    assert [out.aval.dtype for out in program.jaxpr.outvars] == [jnp.bfloat16, jnp.float32, jnp.float32]
    kinds = {(v.aval.dtype) for e in program.jaxpr.eqns if e.primitive.name == "dot_general" for v in e.invars}
    assert kinds == {jnp.dtype("bfloat16")}


def test_dropout_bits_are_fair_and_independent():
    """Neighbours, rows, layers' keys and sites: every pair of masks agrees as often as coins do."""
    keys = jax.random.split(jax.random.key(5), 64)
    x = jnp.ones((64, 64, 64))
    masks = np.stack([np.asarray(dropout(x, keys, 0.5, site)) > 0 for site in range(4)])  # site, row, 64, 64
    error = 5 / math.sqrt(masks[0].size)
    assert abs(masks.mean() - 0.5) < error
    for first, second in (
        (masks[..., 1:], masks[..., :-1]),  # neighbours in the row
        (masks[:, :, 1:], masks[:, :, :-1]),
        (masks[:, 1:], masks[:, :-1]),  # rows
        (masks[1:], masks[:-1]),  # sites
    ):
        assert abs((first == second).mean() - 0.5) < error
    of_places = masks.reshape(256, 4096).mean(0)  # a fair coin at every place
    assert abs(of_places.std() - 0.5 / 16) < 0.002
    of_rows = masks.reshape(256, 4096).mean(1)
    assert abs(of_rows.std() - 0.5 / 64) < 0.002


def test_dropout_frequency_and_expectation():
    keys = jax.random.split(jax.random.key(0), 3)
    dropped = np.asarray(dropout(jnp.ones((3, 100, 100)), keys, 0.3, 0))
    assert set(np.unique(dropped)) == {0.0, np.float32(1) / np.float32(0.7)}
    np.testing.assert_allclose((dropped == 0).mean((1, 2)), 0.3, atol=5 * math.sqrt(0.21 / 1e4))
    np.testing.assert_allclose(dropped.mean(), 1, atol=0.02)


def test_dropout_mask_of_a_row_is_its_own():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jnp.ones((4, 6, 8))
    whole = dropout(x, keys, 0.5, 1)
    np.testing.assert_array_equal(whole[2:3], dropout(x[:1], keys[2:3], 0.5, 1))
    np.testing.assert_array_equal(whole[:, :3], dropout(x[:, :3], keys, 0.5, 1))  # the place in it, not its length
    assert (whole[0] != whole[1]).any()
    assert (whole != dropout(x, keys, 0.5, 2)).any()


def test_dropout_off():
    keys = jax.random.split(jax.random.key(0), 2)
    np.testing.assert_array_equal(dropout(X[:2], None, 0.5, 0), X[:2])
    np.testing.assert_array_equal(dropout(X[:2], keys, 0.0, 0), X[:2])


def test_initializers():
    key = jax.random.key(0)
    assert not zeros(key, (3,)).any() and (ones(key, (3,)) == 1).all()
    assert float(normal(0.02)(key, (200, 200)).std()) == pytest.approx(0.02, rel=0.02)
    cut = normal(0.02, 2.0)(key, (200, 200))
    assert float(jnp.abs(cut).max()) <= 0.04 and float(cut.std()) == pytest.approx(0.02 * 0.8796, rel=0.02)


def test_a_stack_leads_with_layers():
    tree = {"a": split(Norm("layer", 5, 1e-5, bias=True)).tree["scale"]}
    declared = {"deep": stacked(tree, 4), "one": tree}
    specs = specs_of(declared)
    assert specs["deep"]["a"] == ParamSpec(("layers", None), "norm")
    assert specs["one"]["a"] == ParamSpec((None,), "norm")
    assert initializer_of(declared)(jax.random.key(0))["deep"]["a"].shape == (4, 5)


# --------------------------------------------------------------------------------------- constrain


def mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def sharding_of(shape, *names):
    return jax.jit(lambda: constrain(jnp.zeros(shape), *names))().sharding


def test_constrain_follows_the_rules():
    with jax.set_mesh(mesh(data=2, fsdp=2, tensor=2, context=1)):
        spec = sharding_of((8, 3, 6), "batch", "length", "mlp").spec
        assert spec == PartitionSpec(("data", "fsdp"), None, "tensor")
        assert sharding_of((2, 3), "batch", None).spec == PartitionSpec("data")
        assert sharding_of((3, 3), "batch", "mlp").is_fully_replicated
        assert sharding_of((8, 8), "mlp", "heads").spec == PartitionSpec("tensor")  # an axis is used once
        assert sharding_of((8,), "nowhere").is_fully_replicated


def test_constrain_knows_other_meshes_and_none():
    x = jnp.ones((4, 4))
    assert constrain(x, "batch", None) is x
    with jax.set_mesh(mesh(fsdp=4)):
        assert sharding_of((4, 4), "batch", "mlp").spec == PartitionSpec("fsdp")
    both = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))
    part = PartitionSpec("data")
    with jax.set_mesh(both):  # inside shard_map, axes are not the compiler's to place
        out = jax.jit(
            jax.shard_map(lambda y: constrain(y, "batch", None) + 1, in_specs=part, out_specs=part, axis_names={"data"})
        )(x)
    np.testing.assert_array_equal(out, 2)
