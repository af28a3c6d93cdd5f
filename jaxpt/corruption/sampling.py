"""Tokens that a network proposes: drawn from its logits, and put into the row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpt.types import Array, Key


def draw_token(key: Key, logits_V: Array, temperature: Array | float, top_k: int = 0) -> Array:
    """Draw one token from softmax(logits / temperature), by the largest of noisy logits (Gumbel 1954)::

        argmax over v of  logits[v] + temperature * g[v],   g standard Gumbel noise

    So temperature 0 is the likeliest token itself, and nothing is divided by it.

    Args:
      key: a key.
      logits_V: [V] f32; -inf where a token may not be drawn.
      temperature: [] f32, may be traced.
      top_k: only the k likeliest tokens may be drawn; 0 = all.

    Returns:
      [] i32.
    """
    ids_V = None
    if 0 < top_k < logits_V.shape[0]:
        logits_V, ids_V = jax.lax.top_k(logits_V, top_k)
    best = jnp.argmax(logits_V + temperature * jax.random.gumbel(key, logits_V.shape, jnp.float32))
    return (best if ids_V is None else ids_V[best]).astype(jnp.int32)


def draw_nearest(key: Key, scores_V: Array, nearest: int) -> Array:
    """Draw one of the ``nearest`` tokens of the highest scores, each equally likely.

    Args:
      key: a key.
      scores_V: [V] f32, for example cosines with the embedding of a token; -inf where one may not be drawn.
      nearest: how many are drawn from.

    Returns:
      [] i32.
    """
    scores_N, ids_N = jax.lax.top_k(scores_V, min(nearest, scores_V.shape[0]))
    allowed = jnp.maximum(jnp.sum(scores_N > -jnp.inf), 1)
    return ids_N[jax.random.randint(key, (), 0, allowed)].astype(jnp.int32)


def put_tokens(tokens_L: Array, positions_K: Array, used_K: Array, ids_K: Array) -> Array:
    """Write tokens at some positions of a row.

    Args:
      tokens_L: [L] i32.
      positions_K: [K] i32, of ``compact``: all different where used.
      used_K: [K] bool; the other slots write nothing.
      ids_K: [K] i32.

    >>> import jax.numpy as jnp
    >>> put_tokens(jnp.array([4, 7, 8, 9]), jnp.array([1, 3, 0]), jnp.array([True, True, False]), jnp.array([5, 9, 6]))
    Array([4, 5, 8, 9], dtype=int32)
    """
    outside_K = tokens_L.shape[0] + jnp.arange(positions_K.shape[0])  # all different, so that indices are unique
    return tokens_L.at[jnp.where(used_K, positions_K, outside_K)].set(ids_K, mode="drop", unique_indices=True)


def hardest(samples_CRK: Array, scores_CRK: Array, targets_RK: Array) -> Array:
    """Keep the hardest of several candidates: the wrong one of the lowest score.

    Where the first candidate hits the original it stays, so that mining changes which tokens replace, and not how
    many.

    Args:
      samples_CRK: [C, R, K] i32.
      scores_CRK: [C, R, K] f32, the discriminator's logits of "replaced".
      targets_RK: [R, K] i32, the original tokens.

    >>> import jax.numpy as jnp
    >>> samples = jnp.array([[[7, 8]], [[9, 7]], [[8, 9]]])
    >>> scores = jnp.array([[[2.0, 1.0]], [[0.5, 0.0]], [[0.1, -1.0]]])
    >>> hardest(samples, scores, jnp.array([[8, 8]])).tolist()
    [[9, 8]]
    """
    wrong_CRK = samples_CRK != targets_RK
    lowest_1RK = jnp.argmin(jnp.where(wrong_CRK, scores_CRK, jnp.inf), axis=0)[None]
    return jnp.where(wrong_CRK[0], jnp.take_along_axis(samples_CRK, lowest_1RK, axis=0)[0], targets_RK)
