"""The same objective on held-out batches, its sums added up and finished once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import numpy as np

from jaxpt.step import finish
from jaxpt.types import Array, Batch, Objective, Params, Sums, Tree


def evaluate(
    objective: Objective,
    eval_step: Callable[[Params, Tree, Array, Batch], Sums],
    params: Params,
    carry: Tree,
    step: Array,
    batches: Iterable[Batch],
) -> dict[str, float]:
    """Return the metrics of an objective over held-out batches.

    Args:
      objective: built from the run's configuration with its evaluation overrides.
      eval_step: the jitted ``make_eval_step`` of that objective.
      params, carry, step: what is evaluated; schedules are frozen at ``step``.
      batches: batches on the devices; filler rows weigh nothing.

    Returns:
      {"loss": the total as it is trained, "loss/<term>", and what the objective's summary makes}.

    Raises:
      ValueError: there was no batch.
    """
    total: Sums | None = None
    for batch in batches:
        sums = eval_step(params, carry, step, batch)
        # float64 on the host: a float32 total of millions of terms would depend on how many batches there are
        sums = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    if total is None:
        raise ValueError("there is nothing to evaluate on: the held-out split holds no rows")
    loss = 0.0
    for term, value in total.losses.items():
        scale = objective.scale[term]
        scale = float(scale(step)) if callable(scale) else scale
        loss += scale * float(value) / max(float(total.counts[term]), 1e-9)
    return {"loss": loss} | {name: float(value) for name, value in finish(objective, total).items()}
