"""The small parts of a network: dense, norm, dropout, activations, initializers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpt.models.params import Initializer, param
from jaxpt.types import Array, Key

Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def normal(deviation: float, truncate: float | None = None) -> Initializer:
    """Normal numbers of this standard deviation, cut off at ``truncate`` deviations where that is set."""

    def init(key: Key, shape: tuple[int, ...]) -> Array:
        if truncate is None:
            return deviation * jax.random.normal(key, shape, jnp.float32)
        return deviation * jax.random.truncated_normal(key, -truncate, truncate, shape, jnp.float32)

    return init


def zeros(key: Key, shape: tuple[int, ...]) -> Array:
    """All 0."""
    del key
    return jnp.zeros(shape, jnp.float32)


def ones(key: Key, shape: tuple[int, ...]) -> Array:
    """All 1."""
    del key
    return jnp.ones(shape, jnp.float32)


# --------------------------------------------------------------------------------------- functions


def dense(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """``x @ kernel + bias``: every linear layer of every network goes through here.

    The operands have the dtype of ``x``, sums are float32, the result has the dtype of ``x`` again.

    Args:
      x: [..., I].
      kernel: [I, O] f32.
      bias: [O] f32.
    """
    y = jax.lax.dot_general(
        x,
        kernel.astype(x.dtype),
        (((x.ndim - 1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return (y if bias is None else y + bias).astype(x.dtype)


def fold_keys(keys_R: Array | None, number: Array | int) -> Array | None:
    """Fold a number into every row's key; None stays None."""
    return None if keys_R is None else jax.vmap(jax.random.fold_in, (0, None))(keys_R, number)


def dropout(x: Array, keys_R: Array | None, rate: float, site: int) -> Array:
    """Zero a fraction of ``x`` and scale up the rest; the mask of a row depends on that row's key alone.

    Args:
      x: [R, ...].
      keys_R: one typed key per row (and layer), or None for no dropout.
      rate: the probability of 0, in [0, 1).
      site: which of the dropouts that share the keys this is.
    """
    if keys_R is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(fold_keys(keys_R, site))
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


# ----------------------------------------------------------------------------------------- modules


class Dense(nnx.Module):
    """A linear layer: kernel [I, O] and, if wanted, bias [O]."""

    def __init__(self, shape: tuple[int, int], axes: tuple[str | None, str | None], init: Initializer, *, bias: bool):
        self.kernel = param(shape, axes, "kernel", init)
        self.bias = param(shape[1:], axes[1:], "bias", zeros) if bias else None

    def __call__(self, x: Array) -> Array:
        """[..., O] from [..., I]."""
        return dense(x, self.kernel[...], None if self.bias is None else self.bias[...])


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016, arXiv:1607.06450) or RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467).

    In float32; epsilon is added to the variance, or the mean square, under the root.
    """

    def __init__(self, kind: Literal["layer", "rms"], width: int, epsilon: float, *, bias: bool):
        self.kind = kind
        self.epsilon = epsilon
        self.scale = param((width,), (None,), "norm", ones)
        self.bias = param((width,), (None,), "norm", zeros) if bias and kind == "layer" else None

    def __call__(self, x: Array) -> Array:
        """[..., I] from [..., I], of the same dtype."""
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y -= y.mean(-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        y *= self.scale[...]
        if self.bias is not None:
            y += self.bias[...]
        return y.astype(x.dtype)
