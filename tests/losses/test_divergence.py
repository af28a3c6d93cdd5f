"""Divergences of two predictions against SciPy, their gradients in closed form, in pieces; and the sign of collapse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr, softmax

from jaxpt.losses.divergence import divergence, information, information_sums, linear_divergence
from jaxpt.types import Readout

KINDS = ("kl", "symmetric_kl", "js")
compiled = jax.jit(divergence, static_argnums=0)
pulled = jax.jit(jax.grad(divergence, argnums=1), static_argnums=0)
FIRST, SECOND = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32) * 2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_values_are_those_of_scipy(temperature):
    p, q = softmax(np.float64(FIRST) / temperature, -1), softmax(np.float64(SECOND) / temperature, -1)
    forth, back = rel_entr(p, q).sum(-1), rel_entr(q, p).sum(-1)
    wanted = {"kl": forth, "symmetric_kl": (forth + back) / 2, "js": jensenshannon(p, q, axis=-1) ** 2}
    for kind in KINDS:
        got = divergence(kind, FIRST, SECOND, temperature)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, temperature**2 * wanted[kind], rtol=1e-5)


def test_gradients_of_kl_in_closed_form():
    """KL(p || q): q - p towards the second logits, p (log(p/q) - KL) towards the first; T of each at temperature T."""
    for temperature in (1.0, 2.0):
        p, q = softmax(FIRST / temperature, -1), softmax(SECOND / temperature, -1)
        gradient = jax.grad(lambda a, b: divergence("kl", a, b, temperature).sum(), argnums=(0, 1))  # noqa: B023
        of_first, of_second = gradient(FIRST, SECOND)
        np.testing.assert_allclose(of_second, temperature * (q - p), atol=1e-5)
        log_ratio = np.log(p) - np.log(q)
        kl = (p * log_ratio).sum(-1, keepdims=True)
        np.testing.assert_allclose(of_first, temperature * p * (log_ratio - kl), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_prediction_is_at_no_distance_and_has_no_gradient(kind):
    value, gradients = jax.value_and_grad(lambda a, b: divergence(kind, a, b).sum(), argnums=(0, 1))(FIRST, FIRST)
    assert abs(value) < 1e-5
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0, atol=1e-6)
    assert (divergence(kind, FIRST, SECOND) > 0.01).all()


LOGITS = arrays(np.float32, (2, 6), elements=st.floats(-60, 60, width=32))


@settings(max_examples=60, deadline=None)
@given(LOGITS)
def test_bounds_and_symmetry(logits):
    a, b = logits
    values = {kind: float(compiled(kind, a, b)) for kind in KINDS}
    assert all(value >= -1e-5 for value in values.values())
    assert values["js"] <= np.log(2) + 1e-6
    for kind in ("symmetric_kl", "js"):
        assert values[kind] == pytest.approx(float(compiled(kind, b, a)), rel=1e-5, abs=1e-6)
    assert values["kl"] + float(compiled("kl", b, a)) == pytest.approx(2 * values["symmetric_kl"], rel=1e-5, abs=1e-5)
    for kind in KINDS:
        assert np.isfinite(pulled(kind, a, b)).all()


def test_of_near_predictions_js_is_a_quarter():
    near = FIRST + 0.05 * SECOND
    kl, symmetric, js = (np.asarray(divergence(kind, FIRST, near)) for kind in KINDS)
    np.testing.assert_allclose(symmetric, kl, rtol=0.1)
    np.testing.assert_allclose(4 * js, symmetric, rtol=0.01)


KEYS = jax.random.split(jax.random.key(0), 6)


def readout(keys) -> Readout:
    return Readout(
        *(jax.random.normal(key, shape) for key, shape in zip(keys, ((2, 6, 5), (11, 5), (11,)), strict=True))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_change_neither_values_nor_gradients(kind):
    pull = jax.random.normal(jax.random.key(7), (2, 6))
    both = readout(KEYS[:3]), readout(KEYS[3:])

    def of(pieces):
        total = lambda a, b: jnp.vdot(pull, linear_divergence(kind, a, b, 1.5, pieces=pieces))  # noqa: E731
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(*both)

    whole = of(1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), of(3), whole)


def test_pieces_hold_less_than_the_logits():
    wide = Readout(jnp.ones((2, 256, 8)), jnp.ones((4096, 8)))

    def temporary(pieces):
        step = jax.jit(jax.grad(lambda r: linear_divergence("js", r, wide, pieces=pieces).sum()))
        return step.lower(wide).compile().memory_analysis().temp_size_in_bytes

    logits_bytes = 4 * 2 * 256 * 4096
    assert temporary(1) >= logits_bytes
    assert temporary(64) < logits_bytes / 4


def told(logits_KV: np.ndarray, weights_K: np.ndarray) -> dict[str, float]:
    """Information of given logits, which are the hidden states of an identity table."""
    given = Readout(jnp.asarray(logits_KV)[None], jnp.eye(logits_KV.shape[1]))
    return {name: float(value) for name, value in information(information_sums(given, weights_K[None])).items()}


def test_information_is_nothing_where_all_predictions_are_the_same():
    same = np.tile(np.array([1.0, -2.0, 0.5, 0.0], np.float32), (6, 1))
    p = softmax(same[0])
    found = told(same, np.ones(6, np.float32))
    assert found["information"] == pytest.approx(0, abs=1e-6)
    assert found["prediction_entropy"] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)
    certain = told(50 * np.eye(4, dtype=np.float32), np.ones(4, np.float32))
    assert certain["information"] == pytest.approx(np.log(4), rel=1e-5)
    assert certain["prediction_entropy"] == pytest.approx(0, abs=1e-6)
    two = told(50 * np.eye(4, dtype=np.float32), np.array([1, 1, 0, 0], np.float32))
    assert two["information"] == pytest.approx(np.log(2), rel=1e-5), "places of weight 0 count"
    assert told(same, np.zeros(6, np.float32)) == {"information": 0, "prediction_entropy": 0}
