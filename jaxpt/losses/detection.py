"""Metrics of a yes-or-no question per position, as additive sums: two histograms of scores hold them all."""

from __future__ import annotations

import jax.numpy as jnp

from jaxpt.losses.token_metrics import ratio
from jaxpt.types import Array

REACH, PER_UNIT = 16, 16  # bins are 1/16 of a logit wide, from -16 to 16; what lies beyond is in the last ones
BINS = 2 * REACH * PER_UNIT


def detection_sums(logits: Array, labels: Array, weights: Array) -> dict[str, Array]:
    """Histograms of the scores of positive and of negative positions.

    Args:
      logits: [...] f32; positive means yes.
      labels: [...] f32 or bool, 1 = yes.
      weights: [...] f32.

    Returns:
      {"positives", "negatives"}: [BINS] f32, additive over rows, microbatches and batches.
    """
    bins = jnp.clip(jnp.floor(logits.astype(jnp.float32) * PER_UNIT) + REACH * PER_UNIT, 0, BINS - 1)
    bins = bins.astype(jnp.int32).reshape(-1)

    def histogram(weights: Array) -> Array:
        return jnp.zeros(BINS, jnp.float32).at[bins].add(weights.reshape(-1))

    return {"positives": histogram(labels * weights), "negatives": histogram((1 - labels) * weights)}


def detection_metrics(sums: dict[str, Array]) -> dict[str, Array]:
    """Finish the histograms of ``detection_sums``.

    The area under the ROC curve is the probability that a positive scores above a negative, ties counting half
    (Mann & Whitney 1947); scores in one bin are a tie::

        auc = sum_b positives[b] * (negatives below b + negatives[b] / 2) / (all positives * all negatives)

    Args:
      sums: of ``detection_sums``, added up.

    Returns:
      auc, detection_accuracy, precision, recall (at probability 0.5) and positive_rate; 0 where there is nothing
      to count.

    >>> scores, labels = jnp.array([-2.0, 1.0, 1.0, 3.0]), jnp.array([0.0, 0.0, 1.0, 1.0])
    >>> float(detection_metrics(detection_sums(scores, labels, jnp.ones(4)))["auc"])
    0.875
    """
    positives, negatives = sums["positives"], sums["negatives"]
    positive, negative = positives.sum(), negatives.sum()
    # shares before products: counts of billions would not fit float32
    share, other = ratio(positives, positive), ratio(negatives, negative)
    found, wrong = positives[BINS // 2 :].sum(), negatives[BINS // 2 :].sum()
    return {
        "auc": jnp.sum(share * (jnp.cumsum(other) - other / 2)),
        "detection_accuracy": ratio(found + negative - wrong, positive + negative),
        "precision": ratio(found, found + wrong),
        "recall": ratio(found, positive),
        "positive_rate": ratio(positive, positive + negative),
    }
