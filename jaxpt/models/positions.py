"""How order enters attention: rotary positions, and the buckets of distance of T5 and DeBERTa."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxpt.types import Array


def rotary_angles(positions: Array, width: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines of rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    Args:
      positions: [R, L] i32.
      width: of one head, even.
      theta: the base; pair i turns by ``position * theta ** (-2 i / width)``.

    Returns:
      Two [R, L, width / 2] f32 arrays.
    """
    frequency = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_RLHC: Array, angles: tuple[Array, Array]) -> Array:
    """Turn pair (i, i + C/2) of every head by its angle; dot products then depend on distance alone."""
    cos, sin = angles[0][:, :, None, :], angles[1][:, :, None, :]
    first, second = jnp.split(x_RLHC.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_RLHC.dtype)


def relative_buckets(distance: Array, *, is_causal: bool, buckets: int, max_distance: int) -> Array:
    """The bucket of ``key position - query position`` (T5, Raffel et al. 2020, arXiv:1910.10683).

    Half of the buckets hold one distance each, the others grow by a constant factor up to ``max_distance``.
    Looking both ways, the upper half of all buckets is for keys after the query.

    Args:
      distance: i32 of any shape.
      is_causal: keys after the query share bucket 0.
      buckets: how many there are.
      max_distance: everything at least this far shares the last one.

    Example:
      >>> relative_buckets(jnp.array([-3, 0, 3]), is_causal=False, buckets=8, max_distance=16)
      Array([2, 0, 6], dtype=int32)
    """
    if is_causal:
        offset, steps = 0, jnp.maximum(-distance, 0)
    else:
        buckets //= 2
        offset, steps = jnp.where(distance > 0, buckets, 0), jnp.abs(distance)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(steps, exact).astype(jnp.float32) / exact) / jnp.log(max_distance / exact)
    far = jnp.minimum(exact + (ratio * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return offset + jnp.where(steps < exact, steps, far)


def log_buckets(buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of every ``query position - key position`` (DeBERTa, He et al. 2021, arXiv:2006.03654).

    Half of the buckets of each direction hold one distance each, the others grow by a constant factor up to
    ``max_distance``; every later distance is in the last one.

    Args:
      buckets: how many there are for each direction.
      max_distance: see above; more than ``buckets``.

    Returns:
      [2 max_distance + 1] i32 in 0 .. 2 buckets - 1, for the distances -max_distance .. max_distance.

    Example:
      >>> log_buckets(4, 8)
      array([0, 1, 1, 1, 1, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7, 7, 7], dtype=int32)
    """
    distance = np.arange(-max_distance, max_distance + 1)
    exact, steps = buckets // 2, np.maximum(np.abs(distance), buckets // 2)
    grown = np.ceil(np.log(steps / exact) / np.log((max_distance - 1) / exact) * (exact - 1)) + exact
    bucket = np.where(np.abs(distance) <= exact, distance, np.sign(distance) * grown)
    return np.clip(bucket + buckets, 0, 2 * buckets - 1).astype(np.int32)
