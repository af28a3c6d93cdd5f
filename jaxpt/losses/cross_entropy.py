"""Cross-entropy over a vocabulary: the one place where logits become losses."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpt.types import Array


class CrossEntropy(NamedTuple):
    """What one pass over the logits gives, per position and in float32."""

    loss: Array  # [...]: with label smoothing
    nll: Array  # [...]: -log p(target), without
    log_normalizer: Array  # [...]: log of the sum of exp(logits), log Z
    correct: Array  # [...]: 1 where the target is the likeliest token, else 0; no gradient


def cross_entropy(logits: Array, targets: Array, label_smoothing: float = 0.0) -> CrossEntropy:
    """Return the cross-entropy of each position.

    With the smoothed target q = (1 - eps) onehot(y) + eps / V (the form of optax and of Szegedy et al. 2016;
    fairseq and T5X put eps / (V - 1) on the others instead)::

        loss = -sum_i q_i log p_i = (1 - eps) nll + eps (log Z - mean_i z_i)      dloss/dz = p - q

    Its optimum is biased by eps (1/V - pi_i) against the true pi: report ``nll`` as the metric.

    Args:
      logits: [..., V] of any float type; the arithmetic is float32.
      targets: [...] i32 in 0 .. V-1.
      label_smoothing: eps, in [0, 1).

    >>> import jax.numpy as jnp
    >>> result = cross_entropy(jnp.array([[0.0, 0.0, 2.0, 0.0]]), jnp.array([2]))
    >>> round(float(result.nll[0]), 4), round(float(result.log_normalizer[0]), 4), float(result.correct[0])
    (0.3408, 2.3408, 1.0)
    """
    logits = logits.astype(jnp.float32)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = log_normalizer - target_logit
    loss = nll
    if label_smoothing:
        loss = (1 - label_smoothing) * nll + label_smoothing * (log_normalizer - jnp.mean(logits, axis=-1))
    correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return CrossEntropy(loss, nll, log_normalizer, correct)


def z_loss(log_normalizer: Array) -> Array:
    """Return (log Z)^2, the auxiliary loss that keeps the logits' normaliser near 1 (PaLM; scale 1e-4).

    As a term of its own with scale lambda, beside the cross-entropy, d/dz = p (1 + 2 lambda log Z) - y.

    Args:
      log_normalizer: [...] f32, of ``cross_entropy``.
    """
    return jnp.square(log_normalizer)
