"""Diagnostics on quadratics, on losses of known gradients, and on a Transformer whose Hessian is written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from support import packed_batch, tiny_vocab

from jaxpt.corruption.rows import row_keys
from jaxpt.diagnostics import Alignment, Curvature, curvature, make_alignment, make_curvature, products, readings
from jaxpt.models.config import TransformerConfig
from jaxpt.objectives import CausalLM
from jaxpt.optimizer import OptimizerConfig, make_optimizer
from jaxpt.sharding import MeshConfig, make_mesh
from jaxpt.step import batch_gradient, initial_state, make_train_step
from jaxpt.types import FROZEN, Batch, Example, Objective, Out, ParamSpec, RowSpec, Snapshot

SEED = 5
NOTHING = Curvature(*np.zeros(5))


# ---------------------------------------------------------------------------------------------- quadratics


def quadratic(eigenvalues: list[float]) -> np.ndarray:
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(len(eigenvalues), len(eigenvalues))))
    return basis @ np.diag(eigenvalues) @ basis.T


@pytest.mark.parametrize("eigenvalues", [[5.0, 3.0, 1.0, 0.5, -2.0], [-5.0, 3.0, 1.0, 0.5, 2.0]])
def test_a_quadratic_is_measured_exactly(eigenvalues: list[float]):
    H = quadratic(eigenvalues)
    point = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5, 1.0, 3.0]])}
    flat, unravel = ravel_pytree(point)
    gradient = lambda tree: unravel(jnp.asarray(H, jnp.float32) @ ravel_pytree(tree)[0])  # noqa: E731
    samples = 4000
    found = jax.jit(lambda p: curvature(gradient, p, jax.random.key(1), iterations=30, samples=samples))(point)
    g = H @ np.asarray(flat, np.float64)
    assert found.gradient == pytest.approx(g @ H @ g / (g @ g), rel=1e-5)
    assert found.top == pytest.approx(eigenvalues[0], rel=1e-3)
    assert found.top_residual < 1e-3
    variance = 2 * ((H - np.diag(np.diag(H))) ** 2).sum()
    assert abs(found.trace - np.trace(H)) < 4 * np.sqrt(variance / samples)
    assert samples * found.trace_error**2 == pytest.approx(variance, rel=0.15)


def test_a_flat_loss_has_no_curvature():
    found = curvature(lambda x: 0.0 * x, jnp.ones(3), jax.random.key(0), iterations=3, samples=2)
    np.testing.assert_array_equal(jnp.array(found), 0.0)


# -------------------------------------------------------------------------------------- a known alignment

ROWS = 4
X = {  # of each row: the gradient of the row's loss in the two layers, [R, 2, 2]
    "one": jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, -1.0]]] * 2),
    "same": jnp.array([[[3.0, 0.0], [0.0, 2.0]]] * ROWS),
    "against": jnp.array([[[-1.0, 0.0], [5.0, 0.0]]] * ROWS),
}
SCALES = {"one": 1.0, "same": lambda step: 2.0 + 0.0 * step, "against": 0.5}
SPECS = {
    "trunk": {
        "embed": {"tokens": ParamSpec(("vocab", "embed"), "embedding")},
        "layers": {"w": ParamSpec(("layers", None), "kernel"), "late": ParamSpec(("layers", None), "norm")},
        "still": ParamSpec((), "bias", FROZEN),
    },
    "head": {"w": ParamSpec((None, None), "kernel")},
}


def rows(count: int = ROWS) -> Batch:
    tokens, ids = jnp.ones((count, 2), jnp.int32), jnp.arange(count, dtype=jnp.uint32)
    return Batch(tokens, tokens, tokens, tokens, ids, jnp.zeros(count, jnp.int32), jnp.ones(count))


def linear() -> Objective:
    """Losses <w, x> whose gradients in the layers are x; the head and the table get the same from every term."""

    def init(key):
        layers = {"w": jnp.ones((2, 2)), "late": jnp.ones((1, 2))}
        trunk = {"embed": {"tokens": jnp.ones((3, 2))}, "layers": layers, "still": jnp.ones(())}
        return {"trunk": trunk, "head": {"w": jnp.ones((2, 2))}}

    def corrupt(snapshot, batch, key):
        return Example(X, batch.row_ids, {term: jnp.ones(ROWS) for term in X})

    def loss(snapshot, example, keys):
        trunk, head = snapshot.params["trunk"], snapshot.params["head"]
        common = head["w"].sum() + trunk["embed"]["tokens"].sum() * jnp.array([1.0, -1.0])
        x = example.inputs
        losses = {term: (trunk["layers"]["w"] * x[term]).sum((1, 2)) + common[0] for term in X}
        losses["against"] += (trunk["layers"]["late"] * x["against"][:, 1:]).sum((1, 2)) + common[1] - common[0]
        return Out(losses)

    return Objective(RowSpec(), SPECS, init, corrupt, loss, SCALES)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_cosines_of_known_gradients(microbatches: int):
    objective = linear()
    snapshot = Snapshot(objective.init(jax.random.key(0)), {}, jnp.zeros((), jnp.int32))
    measure = jax.jit(make_alignment(objective, SPECS, seed=SEED, microbatches=microbatches))
    found = readings(tuple(SCALES), jax.device_get(measure(snapshot, rows())), NOTHING)
    # mean gradients by layer: one (1.5, 0), (0, 0); same (3, 0), (0, 2); against (-1, 0), (5, 0) twice
    assert found["cosine/one-same/trunk/layers/0"] == pytest.approx(1.0)
    assert found["cosine/one-against/trunk/layers/0"] == pytest.approx(-1.0)
    assert found["cosine/same-against/trunk/layers/1"] == pytest.approx(0.0, abs=1e-6)
    assert "cosine/one-same/trunk/layers/1" not in found  # the first has no gradient there
    assert found["cosine/one-same/trunk/embed/tokens"] == pytest.approx(1.0)
    assert found["cosine/one-against/trunk/embed/tokens"] == pytest.approx(-1.0)
    assert found["cosine/one-same"] == pytest.approx(3 / np.sqrt(9 + 4))
    assert found["cosine/one-against"] == pytest.approx(-1 / np.sqrt(1 + 25 + 25))
    assert [found[f"norm/{term}"] for term in SCALES] == pytest.approx([1.5, 2 * np.sqrt(13), 0.5 * np.sqrt(51)])
    # rows 0 and 2 against rows 1 and 3
    assert found["noise_floor/one"] == pytest.approx((2 - 1) / np.sqrt(2 * 5))
    assert found["noise_floor/one/trunk/layers/0"] == pytest.approx(1.0)
    assert found["noise_floor/one/trunk/layers/1"] == pytest.approx(-1.0)
    assert found["noise_floor/same"] == pytest.approx(1.0)
    assert not any("head" in name or "still" in name for name in found)


def test_one_term_has_a_noise_floor_alone():
    objective = linear()._replace(scale={"one": 1.0})
    corrupt, loss = objective.corrupt, objective.loss
    objective = objective._replace(
        corrupt=lambda *a: corrupt(*a)._replace(weights={"one": jnp.ones(ROWS)}),
        loss=lambda *a: Out({"one": loss(*a).losses["one"]}),
    )
    snapshot = Snapshot(objective.init(jax.random.key(0)), {}, jnp.zeros((), jnp.int32))
    measured = jax.jit(make_alignment(objective, SPECS, seed=SEED))(snapshot, rows())
    assert measured.terms == {}
    found = readings(("one",), jax.device_get(measured), NOTHING)
    assert found["noise_floor/one"] == pytest.approx(1 / np.sqrt(10))
    assert not any(name.startswith(("cosine", "norm/")) for name in found)


def test_networks_without_layers_all_count():
    specs = {"a": ParamSpec((), "bias"), "b": ParamSpec((None,), "bias")}
    found = products(specs, {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[1.0, 1.0], [0.0, 1.0]])})
    assert {name: each.tolist() for name, each in found.items()} == {
        "a": [[1, 2], [2, 4]],
        "b": [[2, 1], [1, 1]],
        "": [[3, 3], [3, 5]],
    }


def test_a_gradient_that_is_not_finite_reads_so():
    found = readings(("a", "b"), Alignment({"": np.array([[np.nan, 1.0], [1.0, 1.0]])}, {}), NOTHING)
    assert np.isnan(found["cosine/a-b"])


# -------------------------------------------------------------------------------------------- a Transformer

VOCAB = tiny_vocab(23, sentinels=1)
SMALL = {"depth": 1, "width": 4, "heads": 2, "mlp_width": 6, "max_length": 12, "init_scale": 0.5}


@pytest.fixture(scope="module")
def written_out():
    """A causal LM with two terms, its gradient and its Hessian, [P, P], by reverse over reverse."""
    objective = CausalLM(TransformerConfig(**SMALL, layers="unroll", attention="dense"), z_loss=0.1).build(VOCAB)
    params = objective.init(jax.random.key(0))
    batch = packed_batch(objective.rows, VOCAB, 12, 8)
    snapshot = Snapshot(params, {}, jnp.zeros((), jnp.int32))
    example, keys = example_of(objective, snapshot, batch)
    flat, unravel = ravel_pytree(params)

    def gradient(x, microbatches=1):
        look = snapshot._replace(params=unravel(x))
        return ravel_pytree(batch_gradient(objective, objective.specs, look, example, keys, microbatches).grads)[0]

    hessian = jax.jit(lambda x: (gradient(x), jax.lax.map(lambda v: jax.vjp(gradient, x)[1](v)[0], jnp.eye(x.size))))
    g, H = hessian(flat)
    return objective, snapshot, batch, flat, gradient, np.asarray(g), np.asarray(H, np.float64)


def example_of(objective: Objective, snapshot: Snapshot, batch: Batch):
    from jaxpt.step import make_example, seed_key

    corrupt, loss = (jax.random.fold_in(seed_key(SEED, use), snapshot.step) for use in ("corrupt", "loss"))
    example = make_example(objective, snapshot, batch, corrupt)
    return example, row_keys(loss, example.row_ids)


def test_products_with_the_hessian_of_a_transformer(written_out):
    _, _, _, flat, gradient, _, H = written_out
    rng = np.random.default_rng(1)
    u, v = (jnp.asarray(rng.normal(size=flat.size), jnp.float32) for _ in range(2))
    both = jax.jit(lambda x, v: jax.jvp(lambda y: gradient(y, microbatches=2), (x,), (v,)))
    product = lambda x, v: both(x, v)[1]  # noqa: E731
    Hu, Hv = product(flat, u), product(flat, v)
    want = H @ np.asarray(v)
    assert np.linalg.norm(Hv - want) < 1e-4 * np.linalg.norm(want)
    assert u @ Hv == pytest.approx(float(v @ Hu), abs=1e-5 * float(jnp.linalg.norm(u) * jnp.linalg.norm(Hv)))
    step = 1e-3
    differences = (both(flat + step * v, v)[0] - both(flat - step * v, v)[0]) / (2 * step)
    assert np.linalg.norm(differences - want) < 2e-2 * np.linalg.norm(want)


@pytest.mark.slow
def test_curvature_of_a_transformer_on_a_mesh(written_out):
    """Scanned, rematerialised, attended in tiles, on eight devices: the same Hessian."""
    objective, snapshot, batch, _, _, g, H = written_out
    form = TransformerConfig(**SMALL, layers="scan", remat="full", attention="blockwise")
    other = CausalLM(form, z_loss=0.1).build(VOCAB)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))):
        measure = make_curvature(other, objective.specs, seed=SEED, iterations=30, samples=6)
        found = jax.jit(measure)(snapshot, batch)
    values = np.linalg.eigvalsh(H)
    top = values[np.argmax(abs(values))]
    assert found.gradient == pytest.approx(g @ H @ g / (g @ g), rel=1e-3)
    assert found.top == pytest.approx(top, rel=2e-2)
    assert found.top_residual < 0.2
    assert abs(found.trace - np.trace(H)) < 5 * found.trace_error
    spread = np.sqrt(2 * ((H - np.diag(np.diag(H))) ** 2).sum() / 6)
    assert spread / 3 < found.trace_error < 3 * spread


def test_the_gradients_of_the_terms_add_up_to_the_step(written_out):
    """With its masks, dropout and step, on a mesh: grad(a L1 + b L2) = a g1 + b g2."""
    network = TransformerConfig(**SMALL, layers="unroll", dropout=0.2)
    objective = CausalLM(network, z_loss=0.1).build(VOCAB)
    batch = written_out[2]
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    optimizer = make_optimizer(OptimizerConfig(schedule="constant"), objective.specs, shapes, 10)
    state = initial_state(objective, optimizer, objective.specs, seed=SEED)._replace(step=jnp.int32(3))
    _, measured = jax.jit(make_train_step(objective, optimizer, objective.specs, seed=SEED))(state, batch)
    snapshot = Snapshot(state.params, state.carry, state.step)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        found = jax.jit(make_alignment(objective, objective.specs, seed=SEED))(snapshot, batch)
    groups = found.terms.keys() - {""}
    assert groups == {"trunk/embed/tokens", "trunk/embed", "trunk/layers", "trunk/final_norm"}
    squares = sum(float(found.terms[group].sum()) for group in groups)  # the head is the table
    assert squares == pytest.approx(float(measured.grad_norm) ** 2, rel=1e-4)
