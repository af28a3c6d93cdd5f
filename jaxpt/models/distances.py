"""Transformer-XL's relative positions (Dai et al. 2019, arXiv:1901.02860), with which XLNet reads.

    score[q, k] = (query[q] + u) . key[k] + (query[q] + v) . (W r[d])        d = position of q - position of k

r[d] are sines and cosines of the distance, which need no table and reach as far as one asks; u and v are learned, per
layer. So a key may stand in a memory, before position 0.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from jaxpt.models.layers import Dense
from jaxpt.models.params import Initializer, param
from jaxpt.types import Array, AttentionPattern


def sines_of_distances(reach: int, width: int) -> Array:
    """The vectors r of the distances -reach .. reach: sines, then cosines, of wavelengths from 2 pi to 20,000 pi.

    Args:
      reach: the longest distance.
      width: of a vector.

    Returns:
      [2 reach + 1, width] f32.

    >>> (100 * sines_of_distances(1, 4)).astype(int).tolist()
    [[-84, 0, 54, 99], [0, 0, 100, 100], [84, 0, 54, 99]]
    """
    frequency = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = jnp.arange(-reach, reach + 1, dtype=jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[:, :width]


def rows_of_distances(pattern: AttentionPattern, reach: int) -> Array:
    """The row of ``sines_of_distances`` for each pair of query and key: [R, Q, L] i32."""
    distance_RQL = pattern.query_positions[:, :, None] - pattern.key_positions[:, None, :]
    return jnp.clip(distance_RQL, -reach, reach) + reach


class DistanceScores(nnx.Module):
    """The parameters u, v and W of one layer."""

    def __init__(self, width: int, queries: int, init: Initializer):
        self.content = param((queries,), ("heads",), "bias", init)  # u
        self.distance = param((queries,), ("heads",), "bias", init)  # v
        self.project = Dense((width, queries), ("embed", "heads"), init, bias=False)  # W

    def __call__(self, query_RQHC: Array, vectors_PD: Array, rows_RQL: Array) -> tuple[Array, Array]:
        """The queries that meet the keys, and what the distances add to the scores, before their scale.

        Args:
          query_RQHC: of the tokens.
          vectors_PD: one per distance, ``sines_of_distances``.
          rows_RQL: [R, Q, L] i32, ``rows_of_distances``.

        Returns:
          [R, Q, H, C] and [R, H, Q, L] f32. Memory and time grow with Q * L.
        """
        shape, dtype = query_RQHC.shape[2:], query_RQHC.dtype
        key_PHC = self.project(vectors_PD.astype(dtype)).reshape(-1, *shape)
        asking_RQHC = query_RQHC + self.distance[...].reshape(shape).astype(dtype)
        scores_RHQP = jnp.einsum("rqhc,phc->rhqp", asking_RQHC, key_PHC, preferred_element_type=jnp.float32)
        scores_RHQL = jnp.take_along_axis(scores_RHQP, rows_RQL[:, None], axis=3)
        return query_RQHC + self.content[...].reshape(shape).astype(dtype), scores_RHQL
