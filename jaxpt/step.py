"""The one train step: corrupt, losses, reduce, gradients, update, metrics.

    loss = sum over terms of  scale[term](step) * sum(losses[term] * weights[term]) / sum(counts[term])

with both sums over the GLOBAL batch.

Every denominator belongs to the example, so it is known before any microbatch runs: accumulation, packing and
sharding are right by construction. No objective is named here.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpt.corruption.rows import row_keys
from jaxpt.optimizer import evaluated_params, restore_frozen, trainable
from jaxpt.sharding import constrain_rows
from jaxpt.types import Array, Batch, Example, Guard, Key, Objective, Out, Params, Snapshot, Sums, TrainState, Tree

NORM_DECAY = 0.98  # of the moving average of gradient norms: about the last 50 updates
SPIKE_AFTER = 20  # updates before an average is worth comparing with


class Measured(NamedTuple):
    """What one step measured, as scalars on the device."""

    loss: Array
    metrics: dict[str, Array]  # "loss/<term>" and what the objective's summary makes
    grad_norm: Array  # before clipping
    tokens: Array  # [] f32: non-padding tokens of the batch
    guard: Guard
    ok: Array  # [] bool: the update was applied


def seed_key(seed: int, purpose: str) -> Key:
    """Return the key of one purpose of a run; purposes never share random numbers."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


def make_example(objective: Objective, snapshot: Snapshot, batch: Batch, key: Key) -> Example:
    """Corrupt the global batch under stop_gradient and complete the counts.

    Args:
      objective: whose ``corrupt`` runs.
      snapshot: what it may look at.
      batch: the global batch; rows with ``valid`` 0 get weight and count 0.
      key: ``fold_in(seed key, step)``.

    Returns:
      The example, with a count [R] for every term.
    """
    example = jax.lax.stop_gradient(objective.corrupt(jax.lax.stop_gradient(snapshot), batch, key))
    valid = batch.valid

    def masked(array: Array) -> Array:
        return array.astype(jnp.float32) * valid.reshape(-1, *[1] * (array.ndim - 1))

    weights = {term: masked(weight) for term, weight in example.weights.items()}
    summed = {term: weight.reshape(weight.shape[0], -1).sum(1) for term, weight in weights.items()}
    counts = summed | {term: masked(count) for term, count in example.counts.items()}
    return constrain_rows(example._replace(weights=weights, counts=counts))


def term_factors(objective: Objective, example: Example, step: Array) -> dict[str, Array]:
    """Return scale / global count per term: what every weighted loss is multiplied with."""
    factors = {}
    for term, count in example.counts.items():
        scale = objective.scale[term]
        value = scale(step) if callable(scale) else scale
        total = count.sum()
        factors[term] = jnp.where(total > 0, value / jnp.where(total > 0, total, 1.0), 0.0)
    return factors


def weighted_sums(losses: dict[str, Array], example: Example) -> dict[str, Array]:
    """Return sum(losses * weights) per term, where a position of weight 0 adds 0 whatever its loss is."""

    def one(term: str) -> Array:
        loss, weight = losses[term], example.weights[term]
        assert loss.shape == weight.shape, f"term {term}: losses {loss.shape}, weights {weight.shape}"
        return jnp.sum(jnp.where(weight != 0, loss.astype(jnp.float32), 0.0) * weight)

    return {term: one(term) for term in losses}


def total_loss(sums: dict[str, Array], factors: dict[str, Array]) -> Array:
    """Return the scalar that is differentiated."""
    return sum((factors[term] * value for term, value in sums.items()), jnp.zeros((), jnp.float32))


def split_rows(tree: Tree, microbatches: int) -> Tree:
    """Return leaves [R, ...] as [microbatches, R / microbatches, ...]: microbatch i takes the rows i, i + M, ...

    Strided, so that every device keeps the rows that it has.
    """
    tree = jax.tree.map(
        lambda leaf: leaf.reshape(leaf.shape[0] // microbatches, microbatches, *leaf.shape[1:]).swapaxes(0, 1), tree
    )
    return constrain_rows(tree, axis=1)


def join_rows(tree: Tree) -> Tree:
    """Undo ``split_rows``."""
    return constrain_rows(jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:]), tree))


def finish(objective: Objective, sums: Sums) -> dict[str, Array]:
    """Return every metric of some additive sums: ``loss/<term>`` and the objective's own."""
    means = {f"loss/{term}": value / jnp.maximum(sums.counts[term], 1e-9) for term, value in sums.losses.items()}
    return means | (objective.summary(sums) if objective.summary else {})


class Gradient(NamedTuple):
    """A gradient over the trainable parameters and what was summed on the way."""

    grads: Tree
    losses: dict[str, Array]
    stats: dict[str, Array]
    features: dict[str, Array]


def batch_gradient(
    objective: Objective, specs: Tree, snapshot: Snapshot, example: Example, keys: Array, microbatches: int
) -> Gradient:
    """Return the exact gradient of the global loss, in one pass or, for coupled terms in chunks, in two.

    Args:
      objective: whose ``loss`` and ``couple`` run.
      specs: tree of ParamSpec; frozen leaves are not differentiated.
      snapshot: parameters, carry, step.
      example: the whole batch, with counts.
      keys: [R] row keys.
      microbatches: M; the rows are cut into M strided slices whose gradients are summed in float32.

    The two-pass form is GradCache (Gao et al. 2021): with features f_m of chunk m and G = dL/df of the coupled
    terms, the gradient is that of  sum_m [row losses_m + <stop_gradient(G_m), f_m>]  plus the coupled terms' own.
    """
    factors = term_factors(objective, example, snapshot.step)
    variable = trainable(specs, snapshot.params)

    def look(part: Tree) -> Snapshot:
        return snapshot._replace(params=restore_frozen(part, snapshot.params))

    def rows(part: Tree, chunk: Example, chunk_keys: Array) -> tuple[Array, tuple[dict, Out]]:
        out = objective.loss(look(part), chunk, chunk_keys)
        sums = weighted_sums(out.losses, chunk)
        return total_loss(sums, factors), (sums, out)

    def coupled(part: Tree, features: dict[str, Array]) -> tuple[Array, tuple[dict, dict]]:
        assert objective.couple is not None
        losses, stats = objective.couple(look(part), features, example)
        sums = weighted_sums(losses, example)
        return total_loss(sums, factors), (sums, stats)

    if microbatches == 1:

        def whole(part: Tree) -> tuple[Array, tuple]:
            value, (sums, out) = rows(part, example, keys)
            if objective.couple is None:
                return value, (sums, out.stats, out.features)
            more, (more_sums, more_stats) = coupled(part, out.features)
            return value + more, (sums | more_sums, out.stats | more_stats, out.features)

        grads, (sums, stats, features) = jax.grad(whole, has_aux=True)(variable)
        return Gradient(grads, sums, stats, features)

    chunks = (split_rows(example, microbatches), split_rows(keys, microbatches))
    features: dict[str, Array] = {}
    outer = Gradient(jax.tree.map(jnp.zeros_like, variable), {}, {}, {})
    pull: dict[str, Array] = {}
    if objective.couple is not None:
        features = join_rows(jax.lax.map(lambda chunk: rows(variable, *chunk)[1][1].features, chunks))
        (grads, pull), (sums, stats) = jax.grad(coupled, argnums=(0, 1), has_aux=True)(variable, features)
        outer = Gradient(grads, sums, stats, {})
        pull = split_rows(pull, microbatches)

    def chunk_loss(part: Tree, chunk: Example, chunk_keys: Array, chunk_pull: dict) -> tuple[Array, tuple]:
        value, (sums, out) = rows(part, chunk, chunk_keys)
        towards = [jnp.vdot(chunk_pull[name], out.features[name]).astype(jnp.float32) for name in chunk_pull]
        return value + sum(towards, jnp.zeros(())), (sums, out.stats, out.features)

    def chunk_gradient(chunk: tuple) -> tuple[tuple, dict[str, Array]]:
        grads, (sums, stats, chunk_features) = jax.grad(chunk_loss, has_aux=True)(variable, *chunk)
        return (grads, sums, stats), chunk_features

    def accumulate(total: tuple, chunk: tuple) -> tuple[tuple, dict[str, Array]]:
        more, chunk_features = chunk_gradient(chunk)
        return jax.tree.map(jnp.add, total, more), chunk_features

    scanned = (*chunks, pull)
    shapes, _ = jax.eval_shape(chunk_gradient, jax.tree.map(lambda leaf: leaf[0], scanned))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (grads, sums, stats), stacked = jax.lax.scan(accumulate, zeros, scanned)
    grads = jax.tree.map(jnp.add, grads, outer.grads)
    return Gradient(grads, sums | outer.losses, stats | outer.stats, features or join_rows(stacked))


def watch(guard: Guard, loss: Array, norm: Array, spike_factor: float) -> tuple[Array, Guard]:
    """Say whether a step may be applied, and remember.

    Args:
      guard: what was seen so far.
      loss, norm: scalars of this step.
      spike_factor: refuse a gradient norm beyond this multiple of its moving average; 0 refuses only
        what is not finite.

    Returns:
      (ok, the new guard). The average follows a refused norm at its allowed bound, so that a lasting change of
      the norm is accepted after a while.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    bound = jnp.where(spike_factor > 0, spike_factor * guard.norm_average, jnp.inf)
    bound = jnp.where(guard.applied >= SPIKE_AFTER, bound, jnp.inf)
    ok = finite & (norm <= bound)
    seen = jnp.where(finite, jnp.minimum(norm, bound), guard.norm_average)
    # an ordinary mean at first, a moving average later
    decay = jnp.minimum(NORM_DECAY, guard.applied / (guard.applied + 1.0))
    one = jnp.asarray(ok, jnp.int32)
    return ok, Guard(
        norm_average=decay * guard.norm_average + (1 - decay) * seen,
        applied=guard.applied + one,
        skipped=guard.skipped + 1 - one,
        failing=(guard.failing + 1) * (1 - one),
    )


def initial_state(
    objective: Objective, optimizer: optax.GradientTransformation, specs: Tree, *, seed: int, averaging: float = 0.0
) -> TrainState:
    """Return the state before the first step; run it under jit with ``out_shardings``, so that it is born sharded."""
    params = objective.init(seed_key(seed, "params"))
    carry = objective.start(params, seed_key(seed, "carry")) if objective.start else {}
    opt_state = optimizer.init(trainable(specs, params))
    keeps = averaging or evaluated_params(opt_state, trainable(specs, params)) is not None
    # every scalar is an array of its own: a buffer that stands twice in the state cannot be donated
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=opt_state,
        carry=carry,
        averaged=jax.tree.map(jnp.copy, params) if keeps else None,
        guard=Guard(jnp.zeros((), jnp.float32), *(jnp.zeros((), jnp.int32) for _ in range(3))),
    )


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    specs: Tree,
    *,
    seed: int,
    microbatches: int = 1,
    spike_factor: float = 0.0,
    averaging: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Measured]]:
    """Return the pure function (state, batch) -> (state, measured) of one update.

    Args:
      objective: what is trained.
      optimizer: over the trainable part of the parameters (``make_optimizer``).
      specs: tree of ParamSpec with groups assigned.
      seed: the run's seed.
      microbatches: slices of the batch whose gradients are accumulated.
      spike_factor: see ``watch``.
      averaging: decay of the parameters' moving average; 0 keeps none, but for schedule-free, which has its own.
    """
    corrupt_key, loss_key = seed_key(seed, "corrupt"), seed_key(seed, "loss")

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Measured]:
        snapshot = Snapshot(state.params, state.carry, state.step)
        example = make_example(objective, snapshot, batch, jax.random.fold_in(corrupt_key, state.step))
        keys = row_keys(jax.random.fold_in(loss_key, state.step), example.row_ids)
        out = batch_gradient(objective, specs, snapshot, example, keys, microbatches)

        sums = Sums(out.losses, {term: count.sum() for term, count in example.counts.items()}, out.stats)
        loss = total_loss(out.losses, term_factors(objective, example, state.step))
        norm = optax.tree.norm(out.grads)
        ok, guard = watch(state.guard, loss, norm, spike_factor)

        variable = trainable(specs, state.params)
        updates, opt_state = optimizer.update(out.grads, state.opt_state, variable)
        params = restore_frozen(optax.apply_updates(variable, updates), state.params)
        carry, moved = state.carry, False
        if objective.advance is not None:
            after = Snapshot(params, state.carry, state.step)
            params, carry = objective.advance(after, jax.lax.stop_gradient(out.features), example)
            moved = any(a is not b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(after.params), strict=True))
        averaged, own = state.averaged, evaluated_params(opt_state, trainable(specs, params))
        if own is not None:  # schedule-free
            if moved:  # its average is told from where gradients are taken, and would run away from a bound
                raise ValueError(
                    "optimizer.name schedule_free averages what it trains, and this objective changes parameters after "
                    "an update: choose another optimizer, or take the objective's bound away (max_scale None)"
                )
            averaged = restore_frozen(own, params)
        elif averaging:
            # young averages forget faster, so that the initial values do not linger
            decay = jnp.minimum(averaging, (1.0 + guard.applied) / (10.0 + guard.applied))
            averaged = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.averaged, params)

        new = (params, opt_state, carry, averaged)
        old = (state.params, state.opt_state, state.carry, state.averaged)
        params, opt_state, carry, averaged = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
        tokens = jnp.sum((batch.segment_ids != 0) * batch.valid[:, None])
        measured = Measured(loss, finish(objective, sums), norm, tokens, guard, ok)
        return TrainState(state.step + 1, params, opt_state, carry, averaged, guard), measured

    return train_step


def make_eval_step(objective: Objective, *, seed: int) -> Callable[[Params, Tree, Array, Batch], Sums]:
    """Return the pure function (params, carry, step, batch) -> Sums; keys depend on (seed, row) alone."""
    corrupt_key, loss_key = seed_key(seed, "evaluation corrupt"), seed_key(seed, "evaluation loss")

    def eval_step(params: Params, carry: Tree, step: Array, batch: Batch) -> Sums:
        snapshot = Snapshot(params, carry, step)
        example = make_example(objective, snapshot, batch, corrupt_key)
        out = objective.loss(snapshot, example, row_keys(loss_key, example.row_ids))
        sums, stats = weighted_sums(out.losses, example), out.stats
        if objective.couple is not None:
            losses, more = objective.couple(snapshot, out.features, example)
            sums, stats = sums | weighted_sums(losses, example), stats | more
        return Sums(sums, {term: count.sum() for term, count in example.counts.items()}, stats)

    return eval_step
