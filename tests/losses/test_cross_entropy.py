"""Cross-entropy and z-loss against optax, closed forms and autodiff."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize

from jaxpt.losses.cross_entropy import cross_entropy, z_loss

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
