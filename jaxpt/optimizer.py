"""Optax, put together for pre-training: schedules, weight decay by role, parameter groups, stacked layers."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxpt.types import FROZEN, ParamSpec, Role, Tree

ScheduleName = Literal["constant", "cosine", "linear", "inverse_sqrt", "wsd"]
Path = tuple[object, ...]


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

    name: Literal["adamw", "adafactor"] = "adamw"
    """"adamw" (Loshchilov & Hutter 2019) or "adafactor" (Shazeer & Stern 2018: factored second moments)."""
    learning_rate: float = 1e-3
    """The peak of the schedule. Adafactor multiplies it by the scale of each parameter."""
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
    """Decay of AdamW's first moment."""
    beta2: float = 0.999
    """Decay of AdamW's second moment."""
    epsilon: float = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay. AdamW scales it by the learning rate; so does our Adafactor."""
    decay_roles: tuple[Role, ...] = ("kernel", "embedding")
    """The roles of the parameters that decay; biases and norms do not by default."""
    clip_norm: float | None = 1.0
    """Clip the global norm of the gradient (over everything that is not frozen) to this; None leaves it alone."""
    averaging: float = 0.0
    """Decay of a moving average of the parameters, kept beside them and evaluated instead of them; 0 keeps none."""
    groups: tuple[ParameterGroup, ...] = ()
    """Parameter groups with settings of their own; the first match counts."""


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of applied updates.

    Args:
      config: peak, shape, warm-up and floor.
      steps: the run's length, where the configuration does not set the schedule's own.

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
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


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


def per_layer(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return a transformation of stacked leaves [N, ...] that treats each of the N layers as a tensor of its own."""

    def update(updates: Tree, state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        return jax.vmap(transform.update)(updates, state, params)

    return optax.GradientTransformation(jax.vmap(transform.init), update)


def _adafactor(config: OptimizerConfig, decay: float, rate: optax.Schedule) -> optax.GradientTransformation:
    # optax.adafactor in the same order, but with the weight decay scaled by the learning rate, as AdamW's is
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(rate),
    )


def _adamw(config: OptimizerConfig, decay: float, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, b1=config.beta1, b2=config.beta2, eps=config.epsilon, weight_decay=decay)


def make_optimizer(config: OptimizerConfig, specs: Tree, shapes: Tree, steps: int) -> optax.GradientTransformation:
    """Return the gradient transformation of a run, over the trainable part of the parameters.

    Args:
      config: the run's optimizer.
      specs: tree of ParamSpec with groups assigned.
      shapes: the parameters or their ShapeDtypeStructs.
      steps: the run's length.

    Raises:
      ValueError: settings that cannot be.
    """
    schedule = learning_rate_schedule(config, steps)
    groups = {group.match: group for group in config.groups}
    build = {"adamw": _adamw, "adafactor": _adafactor}[config.name]
    parts: dict[Hashable, optax.GradientTransformation] = {}

    def label(spec: ParamSpec, leaf: jax.ShapeDtypeStruct) -> str:
        group = groups.get(spec.group, ParameterGroup(spec.group))
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        decay = decay if spec.role in config.decay_roles else 0.0
        # Statistics over a whole tensor (Adafactor's) must be taken layer by layer where layers are stacked.
        stacked = leaf.shape[0] if config.name == "adafactor" and spec.axes[:1] == ("layers",) else 0
        name = f"{spec.group} decay={decay} layers={stacked}"
        if name not in parts:
            transform = build(config, decay, lambda step: group.learning_rate * schedule(step))
            parts[name] = per_layer(transform) if stacked else transform
        return name

    labels = jax.tree.map(lambda spec, leaf: None if spec.group == FROZEN else label(spec, leaf), specs, shapes)
    update = optax.partition(parts, labels)
    return update if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
