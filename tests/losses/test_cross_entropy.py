"""Cross-entropy and z-loss against optax, closed forms and autodiff."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize

from jaxpt.losses.cross_entropy import cross_entropy, linear_cross_entropy, logits_of, z_loss
from jaxpt.types import Readout

LOGITS = 3 * jax.random.normal(jax.random.key(0), (4, 6, 11))
TARGETS = jax.random.randint(jax.random.key(1), (4, 6), 0, 11)


def test_equals_optax():
    result = cross_entropy(LOGITS, TARGETS)
    wanted = optax.softmax_cross_entropy_with_integer_labels(LOGITS, TARGETS)
    np.testing.assert_allclose(result.nll, wanted, rtol=1e-5)
    np.testing.assert_array_equal(result.loss, result.nll)
    np.testing.assert_allclose(result.log_normalizer, np.log(np.exp(np.float64(LOGITS)).sum(-1)), rtol=1e-6)
    np.testing.assert_array_equal(result.correct, (LOGITS.argmax(-1) == TARGETS).astype(np.float32))
    smoothed = optax.softmax_cross_entropy(LOGITS, optax.smooth_labels(jax.nn.one_hot(TARGETS, 11), 0.1))
    np.testing.assert_allclose(cross_entropy(LOGITS, TARGETS, 0.1).loss, smoothed, rtol=1e-5)
    np.testing.assert_allclose(cross_entropy(LOGITS, TARGETS, 0.1).nll, wanted, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_is_p_minus_q(smoothing):
    gradient = jax.grad(lambda z: cross_entropy(z, TARGETS, smoothing).loss.sum())(LOGITS)
    target = (1 - smoothing) * jax.nn.one_hot(TARGETS, 11) + smoothing / 11
    np.testing.assert_allclose(gradient, jax.nn.softmax(LOGITS) - target, atol=1e-6)


def test_gradient_with_z_loss():
    """L = CE + lambda (log Z)^2 has dL/dz = p (1 + 2 lambda log Z) - y."""
    scale = 0.01

    def total(z):
        result = cross_entropy(z, TARGETS)
        return jnp.sum(result.loss + scale * z_loss(result.log_normalizer))

    log_normalizer = jax.nn.logsumexp(LOGITS, axis=-1, keepdims=True)
    wanted = jax.nn.softmax(LOGITS) * (1 + 2 * scale * log_normalizer) - jax.nn.one_hot(TARGETS, 11)
    np.testing.assert_allclose(jax.grad(total)(LOGITS), wanted, atol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
    logits = LOGITS.astype(jnp.bfloat16)
    result = cross_entropy(logits, TARGETS)
    assert all(value.dtype == jnp.float32 for value in result)
    exact = cross_entropy(logits.astype(jnp.float32), TARGETS)
    np.testing.assert_array_equal(result.loss, exact.loss)


def test_huge_logits_stay_finite():
    logits = jnp.array([[3e4, -3e4, 0.0]])
    loss, gradient = jax.value_and_grad(lambda z: cross_entropy(z, jnp.array([1]), 0.1).loss.sum())(logits)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()


def test_the_bias_of_label_smoothing():
    """At the optimum of the smoothed loss under true probabilities pi, p - pi = eps (1/V - pi) exactly."""
    truth, smoothing = np.array([0.5, 0.3, 0.15, 0.05]), 0.2
    targets = jnp.arange(4)

    @jax.jit
    def expected(z):
        losses = cross_entropy(jnp.broadcast_to(z, (4, 4)), targets, smoothing).loss
        return jnp.sum(jnp.asarray(truth) * losses)

    grad = jax.jit(jax.grad(expected))
    best = minimize(lambda z: float(expected(z)), np.zeros(4), jac=lambda z: np.asarray(grad(z), float), tol=1e-6)
    optimum = np.asarray(jax.nn.softmax(best.x))
    np.testing.assert_allclose(optimum - truth, smoothing * (0.25 - truth), atol=2e-3)
    other_form = 4 / 3 * smoothing * (0.25 - truth)  # of fairseq and T5X: a third more
    assert np.abs(optimum - truth - other_form).max() > 0.01


# ------------------------------------------------------------------------------------- from hidden states

KEYS = jax.random.split(jax.random.key(2), 3)
READOUT = Readout(
    jax.random.normal(KEYS[0], (4, 6, 5)), jax.random.normal(KEYS[1], (11, 5)), jax.random.normal(KEYS[2], (11,))
)


def test_logits_of_a_readout():
    hidden, table, bias = (np.float64(part) for part in READOUT)
    np.testing.assert_allclose(logits_of(READOUT), hidden @ table.T + bias, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits_of(READOUT._replace(bias=None)), hidden @ table.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("pieces", [1, 2, 6])
def test_linear_cross_entropy_and_its_gradients_equal_those_through_the_logits(pieces, biased):
    """All three outputs are pulled with weights of their own, so that no part of the written-out gradient is idle."""
    pulls = jax.random.normal(jax.random.key(3), (3, 4, 6))

    def total(result):
        return sum(jnp.vdot(pull, part) for pull, part in zip(pulls, result[:3], strict=True))

    @jax.jit
    def through_logits(readout):
        return total(cross_entropy(logits_of(readout), TARGETS, 0.1))

    @jax.jit
    def in_pieces(readout):
        return total(linear_cross_entropy(readout, TARGETS, 0.1, pieces=pieces))

    readout = READOUT if biased else READOUT._replace(bias=None)
    wanted, gradient = jax.value_and_grad(through_logits)(readout)
    value, given = jax.value_and_grad(in_pieces)(readout)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), given, gradient)
    result = linear_cross_entropy(readout, TARGETS, pieces=pieces)
    np.testing.assert_array_equal(result.correct, cross_entropy(logits_of(readout), TARGETS).correct)


def test_linear_cross_entropy_in_bfloat16_keeps_float32_gradients_of_the_table():
    readout = READOUT._replace(hidden=READOUT.hidden.astype(jnp.bfloat16))
    given = jax.grad(lambda r: linear_cross_entropy(r, TARGETS).loss.sum())(readout)
    assert given.hidden.dtype == jnp.bfloat16 and given.table.dtype == given.bias.dtype == jnp.float32
    exact = jax.grad(lambda r: cross_entropy(logits_of(r), TARGETS).loss.sum())(READOUT)
    np.testing.assert_allclose(given.table, exact.table, atol=0.06)


def test_pieces_hold_less_than_the_logits():
    readout = Readout(jnp.ones((2, 512, 8)), jnp.ones((4096, 8)))
    targets = jnp.zeros((2, 512), jnp.int32)

    def temporary(pieces):
        step = jax.jit(jax.grad(lambda r: linear_cross_entropy(r, targets, pieces=pieces).loss.sum()))
        return step.lower(readout).compile().memory_analysis().temp_size_in_bytes

    logits_bytes = 4 * 2 * 512 * 4096
    assert temporary(1) >= logits_bytes
    assert temporary(64) < logits_bytes / 8


def test_pieces_follow_from_the_bytes(monkeypatch):
    """13 positions have no divisor but 1 and 13: what does not fit whole is made position by position."""
    monkeypatch.setattr("jaxpt.losses.cross_entropy.LOGITS_BYTES", 4 * 2 * 3 * 11)
    hidden = jnp.ones((2, 13, 5))
    targets = jnp.zeros((2, 13), jnp.int32)

    def program(k):
        readout = READOUT._replace(hidden=hidden[:, :k])
        return jax.make_jaxpr(lambda r: linear_cross_entropy(r, targets[:, :k]))(readout)

    programs = {k: program(k) for k in (3, 6, 13)}
    scans = {k: [e for e in _equations(p.jaxpr) if e.primitive.name == "scan"] for k, p in programs.items()}
    assert [scans[k][0].params["length"] if scans[k] else 1 for k in (3, 6, 13)] == [1, 2, 13]


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None:
                yield from _equations(inner if hasattr(inner, "eqns") else inner.jaxpr)
