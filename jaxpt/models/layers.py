"""The small parts of a network: dense, norm, dropout, activations, initializers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxpt.models.params import Initializer, param, platform
from jaxpt.types import Array, Key

PRODUCT = "product"  # what linear layers give, for the rematerialisation that keeps it
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

    The operands have the dtype of ``x``, also in the backward pass; sums are float32, and so are the gradients of
    kernel and bias. The result has the dtype of ``x`` again.

    Args:
      x: [..., I].
      kernel: [I, O] f32.
      bias: [O] f32.

    Example:
      >>> dense(jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.ones(4))[0]
      Array([4., 4., 4., 4.], dtype=float32)
    """
    return _products(x, ((kernel, bias),))[0]


def _product(x: Array, y: Array, left: tuple[int, ...], right: tuple[int, ...]) -> Array:
    """Contract these axes, with float32 sums."""
    return jax.lax.dot_general(x, y, ((left, right), ((), ())), preferred_element_type=jnp.float32)


Weights = tuple[tuple[Array, Array | None], ...]  # (kernel, bias) of layers that read the same input


def _products(x: Array, layers: Weights) -> tuple[Array, ...]:
    # named, since rematerialisation cannot look into a function with a gradient of its own for products to keep
    return tuple(checkpoint_name(y, PRODUCT) for y in _dense(x, layers))


def _affine(x: Array, layers: Weights) -> tuple[Array, ...]:
    products = [_product(x, kernel.astype(x.dtype), (x.ndim - 1,), (0,)) for kernel, _ in layers]
    return tuple(
        (y if bias is None else y + bias).astype(x.dtype) for y, (_, bias) in zip(products, layers, strict=True)
    )


def _dense_backward(saved: tuple[Array, Weights], dys: tuple[Array, ...]) -> tuple[Array, Weights]:
    # JAX's own rule multiplies with dy in float32, which is off the fast path of every platform. All leading axes
    # are contracted as they are: a flattened, transposed operand is slow on a CPU. The parts of dx are added
    # before they are rounded, so that tensor parallelism adds them up over the devices once.
    x, layers = saved
    leading = tuple(range(x.ndim - 1))
    dx, gradients = 0.0, []
    for dy, (kernel, bias) in zip(dys, layers, strict=True):
        dx += _product(dy, kernel.astype(x.dtype), (x.ndim - 1,), (1,))
        dbias = None
        if bias is not None:  # a sum over rows is slow on a CPU, a product is not
            ones = jnp.ones(dy.shape[:-1], dy.dtype)
            dbias = _product(ones, dy, leading, leading) if platform() == "cpu" else dy.sum(leading, dtype=jnp.float32)
        gradients.append((_product(x, dy, leading, leading), dbias))
    return jnp.asarray(dx).astype(x.dtype), tuple(gradients)


# the forward rule has no rule of its own inside, so that a gradient can be differentiated forward, too (diagnostics.py)
_dense = jax.custom_vjp(_affine)
_dense.defvjp(lambda x, layers: (_affine(x, layers), (x, layers)), _dense_backward)


def fold_keys(keys_R: Array | None, number: Array | int) -> Array | None:
    """Fold a number into every row's key; None stays None."""
    return None if keys_R is None else jax.vmap(jax.random.fold_in, (0, None))(keys_R, number)


def _scramble(x: Array) -> Array:
    """A bijection of 32-bit integers whose every output bit depends on every input bit (Wellons' lowbias32)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def dropout(x: Array, keys_R: Array | None, rate: float, site: int) -> Array:
    """Zero a fraction of ``x`` and scale up the rest; the mask of a row depends on that row's key alone.

    The bits are a hash of (key, site, place in the row): threefry, which makes the keys, costs about a tenth
    of a small model's training step on a CPU (docs/benchmarks.md).

    Args:
      x: [R, ...].
      keys_R: one typed key per row (and layer), or None for no dropout.
      rate: the probability of 0, in [0, 1).
      site: which of the dropouts that share the keys this is.
    """
    if keys_R is None or rate == 0:
        return x
    words_R2 = jax.random.key_data(keys_R)
    first, second = (words_R2[:, i].reshape(-1, *[1] * (x.ndim - 1)) for i in range(2))
    place = jnp.zeros((1, *x.shape[1:]), jnp.uint32)
    stride = 1
    for axis in range(x.ndim - 1, 0, -1):  # the place in the row, without a flat array: any axis may be sharded
        place += jnp.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, place.shape, axis)
        stride *= x.shape[axis]
    bits = _scramble(_scramble(place + _scramble(first + jnp.uint32(site))) ^ second)
    keep = bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


# ----------------------------------------------------------------------------------------- modules


class Dense(nnx.Module):
    """A linear layer: kernel [I, O] and, if wanted, bias [O]."""

    def __init__(self, shape: tuple[int, int], axes: tuple[str | None, str | None], init: Initializer, *, bias: bool):
        self.kernel = param(shape, axes, "kernel", init)
        self.bias = param(shape[1:], axes[1:], "bias", zeros) if bias else None

    def __call__(self, x: Array) -> Array:
        """[..., O] from [..., I]."""
        return project(x, self)[0]


def project(x: Array, *layers: Dense) -> tuple[Array, ...]:
    """What several linear layers make of the same input; the backward pass adds up its gradient once.

    Args:
      x: [..., I].
      layers: of I inputs each.
    """
    weights = [(layer.kernel[...], None if layer.bias is None else layer.bias[...]) for layer in layers]
    return _products(x, tuple(weights))


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
        with jax.named_scope("norm"):
            return self._normalise(x)

    def _normalise(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y -= y.mean(-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        y *= self.scale[...]
        if self.bias is not None:
            y += self.bias[...]
        return y.astype(x.dtype)
