"""Which token reaches which place of a network, found by changing one token after the other."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from support import tiny_vocab

from jaxpt.models.config import TransformerConfig
from jaxpt.models.transformer import transformer
from jaxpt.types import Array, AttentionPattern

DECODER = TransformerConfig(depth=3, width=16, heads=2, norm="rms", positions="rotary", layers="unroll")
NETWORK = transformer(DECODER, tiny_vocab().size)


@functools.cache
def network_params() -> dict:
    return jax.jit(NETWORK.init)(jax.random.key(3))


@jax.jit
def _read(params: dict, tokens: Array, pattern: AttentionPattern, positions: Array) -> Array:
    return NETWORK.apply(params, tokens, pattern, positions)


def influence(tokens_L: np.ndarray, pattern: AttentionPattern, positions_L: np.ndarray) -> np.ndarray:
    """[L, L] bool: changing token i changes, through three layers, what the network says at place q.

    ``pattern`` is of one row, [1, L].
    """
    length = len(tokens_L)
    changed = np.tile(tokens_L, (length + 1, 1))
    for place in range(length):
        changed[place, place] = 10 + (changed[place, place] + 7) % 40
    wide = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (length + 1, length)), pattern)
    hidden = np.asarray(_read(network_params(), changed, wide, np.broadcast_to(positions_L, changed.shape)))
    return (hidden[:-1] != hidden[-1:]).any(-1)
