"""The area under the ROC curve and its companions from histograms, against pairs counted one by one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpt.losses.detection import BINS, PER_UNIT, REACH, detection_metrics, detection_sums

metrics_of = jax.jit(lambda *arrays: detection_metrics(detection_sums(*arrays)))


def brute_force(scores, labels, weights) -> dict[str, float]:
    """Every pair of a positive and a negative, ties half; every other metric by its definition."""
    yes, no = labels * weights, (1 - labels) * weights
    better = (scores[:, None] > scores[None, :]) + 0.5 * (scores[:, None] == scores[None, :])
    said = scores >= 0
    return {
        "auc": (better * yes[:, None] * no[None, :]).sum() / (yes.sum() * no.sum()),
        "detection_accuracy": (yes[said].sum() + no[~said].sum()) / weights.sum(),
        "precision": yes[said].sum() / weights[said].sum(),
        "recall": yes[said].sum() / yes.sum(),
        "positive_rate": yes.sum() / weights.sum(),
    }


@pytest.mark.parametrize("seed", range(3))
def test_scores_on_the_grid_are_exact(seed):
    """Scores that are bins' edges: many ties, nothing lost."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(300) < 0.2).astype(np.float32)
    scores = np.round(rng.normal(labels, 1.5) * 4) / 4
    weights = (rng.random(300) < 0.8).astype(np.float32)
    got = metrics_of(scores.astype(np.float32), labels, weights)
    for name, want in brute_force(scores, labels, weights).items():
        assert float(got[name]) == pytest.approx(want, rel=1e-5), name


def test_two_normal_laws():
    """Positives N(d, 1), negatives N(0, 1): the area is Phi(d / sqrt 2)."""
    rng = np.random.default_rng(0)
    labels = np.repeat([1.0, 0.0], 20_000).astype(np.float32)
    scores = rng.normal(labels, 1.0).astype(np.float32)
    want = 0.76025  # Phi(1 / sqrt 2)
    assert float(metrics_of(scores, labels, np.ones_like(labels))["auc"]) == pytest.approx(want, abs=0.01)  # 4 sigma


def test_sums_are_additive_and_extreme_scores_are_kept():
    scores = jnp.array([-99.0, -16.0, 0.0, 15.99, 1e9])
    sums = detection_sums(scores, jnp.array([0.0, 1.0, 0.0, 1.0, 1.0]), jnp.ones(5))
    assert sums["positives"].shape == (BINS,)
    assert np.flatnonzero(sums["positives"]).tolist() == [0, BINS - 1]
    assert np.flatnonzero(sums["negatives"]).tolist() == [0, REACH * PER_UNIT]
    halves = [detection_sums(scores[i : i + 1], jnp.array([0.0, 1, 0, 1, 1])[i : i + 1], jnp.ones(1)) for i in range(5)]
    for name, value in sums.items():
        np.testing.assert_array_equal(sum(half[name] for half in halves), value)


@pytest.mark.parametrize("labels", [[0.0, 0.0], [1.0, 1.0]])
def test_one_class_or_nothing_gives_finite_numbers(labels):
    got = metrics_of(jnp.array([1.0, -1.0]), jnp.array(labels), jnp.ones(2))
    assert all(np.isfinite(value) for value in got.values())
    assert float(got["auc"]) == 0
    nothing = metrics_of(jnp.array([1.0, -1.0]), jnp.array(labels), jnp.zeros(2))
    assert all(float(value) == 0 for value in nothing.values())
