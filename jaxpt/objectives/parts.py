"""What several objectives have in common.

A network that objectives can share has the same name in all of them, so that one can start from the parameters of
another and mixtures can train one network: "trunk" is the Transformer, "head" what predicts from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from zlib import crc32

import jax
import jax.numpy as jnp

from jaxpt.models.config import TransformerConfig
from jaxpt.types import Array, Key, Network, Params, Schedule, Tree


def specs_of(networks: Mapping[str, Network]) -> Tree:
    """Return the parameter specs of an objective's networks, by name."""
    return {name: network.specs for name, network in networks.items()}


def initializer_of(networks: Mapping[str, Network]) -> Callable[[Key], Params]:
    """Return ``init(key)`` of an objective's networks: network ``name`` draws from ``fold_in(key, crc32(name))``.

    So its first numbers do not depend on which networks stand beside it.
    """

    def init(key: Key) -> Params:
        return {name: network.init(jax.random.fold_in(key, crc32(name.encode()))) for name, network in networks.items()}

    return init


def linear(start: float, end: float | None, steps: int) -> Schedule:
    """Return the schedule from ``start`` to ``end`` over ``steps`` steps, ``end`` after them.

    Args:
      start: value at step 0.
      end: last value; None keeps ``start``.
      steps: steps in between.

    >>> import jax.numpy as jnp
    >>> round(float(linear(0.3, 0.15, 100)(jnp.int32(50))), 4)
    0.225
    """
    if end is None:
        return lambda step: jnp.float32(start)
    return lambda step: jnp.float32(start) + (end - start) * jnp.clip(step / max(steps, 1), 0, 1)


def at(hidden_RLD: Array, positions_RK: Array) -> Array:
    """Gather the hidden states at some positions of each row: [R, K, D]."""
    return jnp.take_along_axis(hidden_RLD, positions_RK[..., None], axis=1)


def without_dropout(config: TransformerConfig) -> TransformerConfig:
    """Return the network as it is evaluated."""
    return replace(config, dropout=0.0, attention_dropout=0.0, mlp_dropout=0.0)


def check_length(config: TransformerConfig, length: int, name: str) -> None:
    """Refuse rows that a learned position table does not reach, which would read as NaN."""
    check(
        config.positions != "learned" or length <= config.max_length,
        f"{name}: rows of {length} tokens, but the learned position table has max_length={config.max_length}: "
        f"raise max_length or shorten the rows (--seq-len)",
    )


def check(ok: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless ``ok``."""
    if not ok:
        raise ValueError(message)
