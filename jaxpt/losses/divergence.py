"""How far two predictions of the same token are apart, and whether predictions tell tokens apart at all; in float32."""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy

from jaxpt.losses.cross_entropy import logits_of, map_logits
from jaxpt.losses.token_metrics import ratio
from jaxpt.types import Array, Readout

Divergence: TypeAlias = Literal["kl", "symmetric_kl", "js"]

WATCHED = 16  # places of a row, at most, whose logits ``information_sums`` makes


def divergence(kind: Divergence, first: Array, second: Array, temperature: float = 1.0) -> Array:
    """Return the divergence of two predictions at each position, with p, q = softmax(first / T), softmax(second / T)::

        kl              T^2 KL(p || q)                       d/dsecond = T (q - p),  d/dfirst = T p (log(p/q) - KL)
        symmetric_kl    T^2 (KL(p || q) + KL(q || p)) / 2    R-Drop's (Liang et al. 2021, arXiv:2106.14448)
        js              T^2 (KL(p || m) + KL(q || m)) / 2,   m = (p + q) / 2;  at most T^2 ln 2

    T^2 keeps the size of the gradient (Hinton et al. 2015, arXiv:1503.02531). Of predictions that are nearly alike
    js is a quarter of the others, and so wants four times their weight.

    Args:
      kind: which.
      first, second: logits [..., V], finite.
      temperature: T.

    Returns:
      [...] f32, 0 where the predictions are the same.

    >>> p, q = jnp.array([0.0, 0.0]), jnp.log(jnp.array([0.75, 0.25]))
    >>> [round(float(divergence(kind, p, q)), 4) for kind in ("kl", "symmetric_kl", "js")]
    [0.1438, 0.1373, 0.0338]
    """
    log_p, log_q = (jax.nn.log_softmax(logits.astype(jnp.float32) / temperature) for logits in (first, second))
    if kind == "kl":
        value = _kl(log_p, log_q)
    elif kind == "symmetric_kl":
        value = (_kl(log_p, log_q) + _kl(log_q, log_p)) / 2
    else:
        log_m = jnp.logaddexp(log_p, log_q) - np.log(2)
        value = (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2
    return temperature**2 * value


def linear_divergence(
    kind: Divergence, first: Readout, second: Readout, temperature: float = 1.0, *, pieces: int | None = None
) -> Array:
    """Return ``divergence`` of the logits of two readouts, hidden [R, K, E]: [R, K] f32.

    Args:
      kind, temperature: see ``divergence``.
      first, second: of heads over one vocabulary.
      pieces: as of ``linear_cross_entropy``.
    """

    def one(logits_RKV: Array, hidden_RKE: Array) -> Array:
        return divergence(kind, logits_RKV, logits_of(second._replace(hidden=hidden_RKE)), temperature)

    return map_logits(one, first, second.hidden, pieces=pieces)


def _kl(log_p: Array, log_q: Array) -> Array:
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


# ------------------------------------------------------------------------------------------------ collapse


def information_sums(readout: Readout, weights: Array) -> dict[str, Array]:
    """Sums over some places of each row of what ``information`` is made of.

    Args:
      readout: hidden [R, K, E]; no gradient goes through.
      weights: [R, K] f32.

    Returns:
      "predicted" [V] f32, "prediction_entropy" and "watched" [] f32, additive over rows, microbatches and batches.
    """
    stride = max(1, -(-weights.shape[1] // WATCHED))
    some, weights = readout._replace(hidden=readout.hidden[:, ::stride]), weights[:, ::stride]
    p_RKV = jax.nn.softmax(logits_of(jax.lax.stop_gradient(some)))
    return {
        "predicted": jnp.einsum("rk,rkv->v", weights, p_RKV),
        "prediction_entropy": -jnp.sum(weights * jnp.sum(xlogy(p_RKV, p_RKV), -1)),
        "watched": jnp.sum(weights),
    }


def information(sums: dict[str, Array]) -> dict[str, Array]:
    """Finish the sums of ``information_sums``: how much, in nats, predictions tell places apart::

        information = H(mean of p) - mean of H(p)      0 where every place gets the same prediction

    Args:
      sums: added up.

    Returns:
      information, and prediction_entropy, the mean of H(p).
    """
    mean_V = ratio(sums["predicted"], sums["watched"])
    entropy = ratio(sums["prediction_entropy"], sums["watched"])
    return {"information": -jnp.sum(xlogy(mean_V, mean_V)) - entropy, "prediction_entropy": entropy}
