"""Attention by JAX's Splash kernel on TPU: whole segments and causal order, windows, grouped queries.

Splash wants the mask while tracing, so the pattern's maker must have said its order (``AttentionPattern.order``).
Segments stay arrays. The kernel is imported where it is made: its module is experimental, and only TPUs need it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.types import Array, AttentionPattern, Everyone, RowOrder

LANES = 128  # lengths and widths that the kernel reads are multiples of it
TILE = 512  # queries and keys of a tile at most


def splash_kernel(
    order: Everyone | RowOrder,
    heads: int,
    queries: np.ndarray,
    keys: int,
    window: int | None,
    *,
    shards: int = 1,
    interpret: bool = False,
) -> Any:
    """The kernel for one static mask, a pytree that ``shard_map`` can cut over the queries.

    Args:
      order: what the pattern's maker said.
      heads: query heads of a device.
      queries: [Q] the places in the row of the queries, as the devices hold them one after the other.
      keys: of a row.
      window: of places, None = none.
      shards: pieces into which the queries are cut.
      interpret: run it as plain JAX, for tests.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    shape = len(queries), keys
    after = 0 if isinstance(order, RowOrder) else window
    if window is None and after is None:
        mask = kernels.FullMask(shape)
    else:
        mask = kernels.CausalMask(shape) if window is None else kernels.LocalMask(shape, (window, after), 0)
        mask.q_sequence = queries.astype(np.int32)
    tile_q, tile_k = _tile(len(queries) // shards), _tile(keys)
    sizes = kernels.BlockSizes(
        block_q=tile_q,
        block_kv=tile_k,
        block_q_dkv=tile_q,
        block_kv_dkv=tile_k,
        block_q_dq=tile_q,
        block_kv_dq=tile_k,
    )
    return kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=shards,
        interpret=interpret,
    )


def _tile(size: int) -> int:
    """The largest multiple of LANES up to TILE that divides the size."""
    return max(tile for tile in range(LANES, min(size, TILE) + 1, LANES) if size % tile == 0)


def splash(kernel: Any, query: Array, key: Array, value: Array, pattern: AttentionPattern, *, scale: float) -> Array:
    """``attend`` with a kernel of ``splash_kernel``; Args as there."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    heads_first = [jnp.swapaxes(x, 1, 2) for x in (query * scale, key, value)]
    segments = SegmentIds(pattern.query_segments, pattern.key_segments)
    out_RHQC = jax.vmap(kernel)(heads_first[0], heads_first[1], heads_first[2], segments)
    return jnp.swapaxes(out_RHQC, 1, 2).astype(query.dtype)


def places_are_positions(pattern: AttentionPattern) -> Array:
    """Whether positions rise by one with the place in every segment, so that a window may be one of places: [] bool.

    Padding does not count: it reads nothing that matters.
    """
    segments, positions = pattern.key_segments, pattern.key_positions
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    return jnp.all(~inside | (positions[:, 1:] - positions[:, :-1] == 1))
