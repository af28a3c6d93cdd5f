"""Optax, put together for pre-training: schedules, weight decay by role, parameter groups, stacked layers."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxpt.types import FROZEN, Params, ParamSpec, Role, Tree

OptimizerName = Literal["adamw", "adafactor", "lamb", "lion", "muon", "schedule_free"]
ScheduleName = Literal["constant", "cosine", "linear", "inverse_sqrt", "wsd"]
Path = tuple[object, ...]
Transformation = optax.GradientTransformation


@dataclass(frozen=True)
class ParameterGroup:
    """Settings of their own for some of the parameters."""

    match: str
    """A pattern over parameter paths ("trunk/embed/*") or the name of a group that the objective declares."""
    learning_rate: float = 1.0
    """The group's learning rate as a multiple of the run's."""
    weight_decay: float | None = None
    """The group's weight decay, where it differs from the run's."""
    frozen: bool = False
    """Leave these parameters as they are: they get no gradient, no optimizer state and no update."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated."""

    name: OptimizerName = "adamw"
    """adamw (Loshchilov & Hutter 2019), adafactor (Shazeer & Stern 2018: factored second moments), lamb (You et al.
    2020: big batches), lion (Chen et al. 2023: one moment), muon (Jordan 2024: matrices orthogonalised; all else by
    AdamW) or schedule_free (Defazio et al. 2024: AdamW without a decaying rate; its averages are evaluated)."""
    learning_rate: float = 1e-3
    """The peak of the schedule. Adafactor and LAMB multiply it by the scale of each parameter; Lion wants 3 to 10
    times less than AdamW (and as much more weight decay)."""
    schedule: ScheduleName = "cosine"
    """What follows the linear warm-up: constant, cosine, linear, inverse_sqrt, or wsd (warm-up, stable, decay)."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly to its peak."""
    decay_steps: int = 0
    """The length of wsd's final linear decay, in updates."""
    final_fraction: float = 0.0
    """The last learning rate as a fraction of the peak (cosine, linear and wsd)."""
    schedule_steps: int | None = None
    """The update at which the schedule ends; None takes the run's `steps`. Set it when a run may be prolonged."""
    beta1: float = 0.9
    """Decay of the first moment (AdamW, LAMB, Lion); schedule_free's share of the average where gradients are taken."""
    beta2: float | None = None
    """Decay of the second moment, of Lion's momentum; None takes the paper's: 0.99 for Lion, 0.999 for the others."""
    epsilon: float | None = None
    """Added to the root of the second moment; None takes the paper's: 1e-6 for LAMB, 1e-8 for the others."""
    momentum: float = 0.95
    """Decay of Muon's Nesterov momentum."""
    muon_rms: float | None = 0.2
    """Muon's updates have about this root mean square at learning rate 1, so that AdamW's learning rate and decay serve
    both (Liu et al. 2025). None scales by sqrt(max(1, out / in)) instead (Jordan 2024), with rates of about 0.02."""
    weight_decay: float = 0.01
    """Decoupled weight decay, scaled by the learning rate."""
    decay_roles: tuple[Role, ...] = ("kernel", "embedding")
    """The roles of the parameters that decay; biases and norms do not by default."""
    clip_norm: float | None = 1.0
    """Clip the global norm of the gradient (over everything that is not frozen) to this; None leaves it alone."""
    averaging: float = 0.0
    """Decay of a moving average of the parameters, kept beside them and evaluated instead of them; 0 keeps none."""
    groups: tuple[ParameterGroup, ...] = ()
    """Parameter groups with settings of their own; the first match counts."""


def check_optimizer(config: OptimizerConfig, steps: int) -> None:
    """Raise ValueError, with the cause and the fix, for settings that cannot be.

    Args:
      config: the run's optimizer.
      steps: the run's length.
    """
    learning_rate_schedule(config, steps)
    if config.name == "schedule_free":
        if config.schedule != "constant":
            raise ValueError(
                f"optimizer.schedule is {config.schedule}, but schedule_free averages instead of lowering the learning "
                f"rate: set --optimizer.schedule constant, with --optimizer.warmup-steps"
            )
        if config.averaging:
            raise ValueError("optimizer.averaging must be 0 with schedule_free: it keeps an average of its own")
        if not 0 < config.beta1 < 1:
            raise ValueError(f"optimizer.beta1 is {config.beta1}: schedule_free needs it between 0 and 1")
    if config.muon_rms is not None and config.muon_rms <= 0:
        raise ValueError(f"optimizer.muon_rms is {config.muon_rms}: it must be positive, 0.2 for example, or None")


Changes = Sequence[tuple[int, float]]  # (update, factor): from that update on, the schedule's rate times the factor


def learning_rate_schedule(config: OptimizerConfig, steps: int, changes: Changes = ()) -> optax.Schedule:
    """Return the learning rate as a function of the number of applied updates.

    Args:
      config: peak, shape, warm-up and floor.
      steps: the run's length, where the configuration does not set the schedule's own.
      changes: factors upon the schedule, in order; each replaces the one before.

    Raises:
      ValueError: warm-up and decay do not fit into the schedule.

    >>> rate = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=2, schedule="linear"), 6)
    >>> [round(float(rate(step)), 2) for step in range(8)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    end = steps if config.schedule_steps is None else config.schedule_steps
    if warmup < 0 or warmup > end:
        raise ValueError(f"optimizer.warmup_steps is {warmup}, but the schedule has {end} steps: lower the warm-up")
    rest, floor = max(end - warmup, 1), config.final_fraction
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=floor)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, peak * floor, rest)
    elif config.schedule == "inverse_sqrt":
        # peak * sqrt(warmup / step), continuous at the end of the warm-up (Vaswani et al. 2017)
        base = max(warmup, 1)
        after = lambda step: peak * jnp.sqrt(base / (base + jnp.asarray(step, jnp.float32)))  # noqa: E731
    else:
        decay = config.decay_steps
        if not 0 < decay <= rest:
            raise ValueError(
                f"optimizer.schedule wsd needs 0 < decay_steps <= {rest} (the steps after the warm-up), not {decay}"
            )
        after = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, peak * floor, decay)], [rest - decay]
        )
    whole = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after
    if not changes:
        return whole
    begins, factors = [begin for begin, _ in changes], [1.0, *(factor for _, factor in changes)]
    return lambda count: whole(count) * jnp.array(factors)[jnp.sum(count >= jnp.array(begins))]


def path_name(path: Path) -> str:
    """Return a tree path as "trunk/layers/mlp/up/kernel"."""
    return "/".join(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)


def assign_groups(config: OptimizerConfig, specs: Tree) -> Tree:
    """Return the specs with the group that the configuration gives each parameter.

    Args:
      config: its ``groups`` are tried in order against the path and the declared group of each parameter.
      specs: tree of ParamSpec.

    Raises:
      ValueError: a group matches no parameter.
    """
    used: set[int] = set()

    def assign(path: Path, spec: ParamSpec) -> ParamSpec:
        for index, group in enumerate(config.groups):
            if group.match == spec.group or fnmatch.fnmatchcase(path_name(path), group.match):
                used.add(index)
                return dataclasses.replace(spec, group=FROZEN if group.frozen else group.match)
        return spec

    assigned = jax.tree_util.tree_map_with_path(assign, specs)
    for index, group in enumerate(config.groups):
        if index not in used:
            names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(specs)]
            raise ValueError(
                f"optimizer.groups: {group.match!r} matches no parameter; they are {', '.join(names[:12])}"
                f"{', ...' if len(names) > 12 else ''}"
            )
    return assigned


def trainable(specs: Tree, params: Tree) -> Tree:
    """Return the parameters with None in the place of every frozen leaf (JAX skips None: no gradient, no state)."""
    return jax.tree.map(lambda spec, leaf: None if spec.group == FROZEN else leaf, specs, params)


def restore_frozen(part: Tree, params: Tree) -> Tree:
    """Return the whole tree again: ``part`` where it has a leaf, ``params`` where it has None."""
    return jax.tree.map(lambda a, b: b if a is None else a, part, params, is_leaf=lambda leaf: leaf is None)


def per_layer(transform: Transformation) -> Transformation:
    """Return a transformation of stacked leaves [N, ...] that treats each of the N layers as a tensor of its own."""

    def update(updates: Tree, state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        return jax.vmap(transform.update)(updates, state, params)

    return Transformation(jax.vmap(transform.init), update)


def _transform(config: OptimizerConfig, method: str, decay: float, rate: optax.Schedule) -> Transformation:
    """Return one method of Optax, its weight decay scaled by the learning rate.

    The methods that look at a whole tensor (adafactor, lamb) take one layer; muon takes matrices with any axes before.
    """
    beta2 = (0.99 if method == "lion" else 0.999) if config.beta2 is None else config.beta2
    epsilon = (1e-6 if config.name == "lamb" else 1e-8) if config.epsilon is None else config.epsilon
    if method == "adafactor":
        # optax.adafactor in the same order, but with the weight decay scaled by the learning rate, as AdamW's is
        return optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
            optax.add_decayed_weights(decay),
            optax.scale_by_learning_rate(rate),
        )
    if method == "lamb":
        return optax.lamb(rate, b1=config.beta1, b2=beta2, eps=epsilon, weight_decay=decay)
    if method == "lion":
        return optax.lion(rate, b1=config.beta1, b2=beta2, weight_decay=decay)
    if method == "muon":
        # Optax by itself takes every rank-2 leaf for a matrix, so it would miss stacked layers and hit stacked norms
        matrices = lambda params: jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), params)  # noqa: E731
        return optax.contrib.muon(
            rate,
            beta=config.momentum,
            weight_decay=decay,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=config.muon_rms,
        )
    if method == "schedule_free":  # what it wraps: AdamW without a first moment
        return optax.chain(
            optax.scale_by_rms(decay=beta2, eps=epsilon, eps_in_sqrt=False, bias_correction=True),
            optax.add_decayed_weights(decay),
            optax.scale_by_learning_rate(rate),
        )
    return optax.adamw(rate, b1=config.beta1, b2=beta2, eps=epsilon, weight_decay=decay)


def _method(config: OptimizerConfig, spec: ParamSpec) -> str:
    """Return how a parameter is updated: as the run's optimizer says, or by AdamW where that is not meant for it."""
    if config.name == "muon":
        matrix = spec.role == "kernel" and sum(name != "layers" for name in spec.axes) >= 2
        return "muon" if matrix and "vocab" not in spec.axes else "adamw"  # an output table is an embedding, too
    if config.name == "lamb" and spec.role not in config.decay_roles:
        return "adamw"  # as in the authors' code: under a trust ratio, biases that begin at 0 could hardly grow
    return config.name


def make_optimizer(
    config: OptimizerConfig, specs: Tree, shapes: Tree, steps: int, changes: Changes = ()
) -> Transformation:
    """Return the gradient transformation of a run, over the trainable part of the parameters.

    Args:
      config: the run's optimizer.
      specs: tree of ParamSpec with groups assigned.
      shapes: the parameters or their ShapeDtypeStructs.
      steps: the run's length.
      changes: of the learning rate, as in ``learning_rate_schedule``.

    Raises:
      ValueError: settings that cannot be.
    """
    check_optimizer(config, steps)
    schedule = learning_rate_schedule(config, steps, changes)
    groups = {group.match: group for group in config.groups}
    parts: dict[Hashable, Transformation] = {}

    def label(spec: ParamSpec, leaf: jax.ShapeDtypeStruct) -> str:
        group = groups.get(spec.group, ParameterGroup(spec.group))
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        decay = decay if spec.role in config.decay_roles else 0.0
        method = _method(config, spec)
        # Statistics over a whole tensor must be taken layer by layer where layers are stacked.
        stacked = leaf.shape[0] if method in ("adafactor", "lamb") and spec.axes[:1] == ("layers",) else 0
        name = f"{spec.group} {method} decay={decay} layers={stacked}"
        if name not in parts:
            transform = _transform(config, method, decay, lambda step: group.learning_rate * schedule(step))
            parts[name] = per_layer(transform) if stacked else transform
        return name

    labels = jax.tree.map(lambda spec, leaf: None if spec.group == FROZEN else label(spec, leaf), specs, shapes)
    update = optax.partition(parts, labels)
    if config.clip_norm is not None:
        update = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
    if config.name == "schedule_free":
        # outermost: one average over all groups, whose weights do not change with a group's multiple of the rate
        update = optax.contrib.schedule_free(update, schedule, b1=config.beta1)
    return update


def evaluated_params(opt_state: Tree, params: Params) -> Params | None:
    """Return the parameters that schedule-free evaluates, x = (y - (1 - beta1) z) / beta1; None for other optimizers.

    Args:
      opt_state: the state after an update.
      params: the trainable parameters y after it, where the next gradient is taken.
    """
    if not isinstance(opt_state, optax.contrib.ScheduleFreeState):
        return None
    return optax.contrib.schedule_free_eval_params(opt_state, params)
