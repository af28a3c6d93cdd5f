"""A memory of the row before: what every layer read of its last tokens (Dai et al. 2019, arXiv:1901.02860).

It is kept in the carry, without gradient: row r of a step goes on where row r of the step before ended, which rows
packed as a stream do.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpt.models.config import TransformerConfig
from jaxpt.objectives.parts import check
from jaxpt.types import ROW_STATE, Array, AttentionPattern, Batch, Snapshot, Tree

NEVER = -2  # the step of a memory that no row has written


def forgotten(config: TransformerConfig, rows: int, size: int) -> Tree:
    """Return the carry before the first step: of ``rows`` rows and ``size`` tokens, none of which is seen."""
    hidden = jnp.zeros((rows, config.depth, size, config.width), config.dtype)
    return remembered(hidden, jnp.full((rows, size), -1, jnp.int32), jnp.int32(NEVER))


def remembered(hidden: Array, documents: Array, step: Array) -> Tree:
    """Return the carry after a step.

    Args:
      hidden: [R, N, M, D], what every layer read of the last M tokens.
      documents: [R, M] i32, their documents.
      step: [] i32.
    """
    return {ROW_STATE: {"hidden": hidden, "documents": documents}, "step": step}


def recall(size: int, pattern: AttentionPattern, snapshot: Snapshot, batch: Batch) -> dict[str, Tree]:
    """Let a row look at the end of the row before, as far as its first document reaches back into it.

    The memory of a step that was skipped is not used in the next.

    Args:
      size: tokens of the memory, M.
      pattern: of the row.
      snapshot: whose carry holds what every layer read of those tokens, and their documents.
      batch: rows; fewer than there are memories where only some are looked at.

    Raises:
      ValueError: there are more rows than memories.

    Returns:
      memory ([R, N, M, D]), pattern with M keys before the others, documents ([R, M] i32, of this row's last tokens).
    """
    documents_RL, carry = batch.extras["document_ids"], snapshot.carry
    kept = carry[ROW_STATE]
    lanes, rows = kept["documents"].shape[0], documents_RL.shape[0]
    check(
        rows <= lanes,
        f"a memory of {lanes} rows and a batch of {rows}: set rows to the batch size, which cannot change between "
        f"phases",
    )
    if lanes != rows:
        kept = jax.tree.map(lambda leaf: jnp.take(leaf, batch.row_ids, axis=0, mode="clip"), kept)
    first_R1, segment_R1 = documents_RL[:, :1], batch.segment_ids[:, :1]
    goes_on_RM = (kept["documents"] == first_R1) & (segment_R1 > 0) & (carry["step"] == snapshot.step - 1)
    positions_RM = batch.positions[:, :1] - size + jnp.arange(size, dtype=jnp.int32)
    pattern = pattern._replace(
        key_segments=join(jnp.where(goes_on_RM, segment_R1, -1), pattern.key_segments),
        key_ranks=join(jnp.full_like(positions_RM, -1), pattern.key_ranks),
        key_positions=join(positions_RM, pattern.key_positions),
    )
    return {"memory": kept["hidden"], "pattern": pattern, "documents": documents_RL[:, -size:]}


def key_places(pattern: AttentionPattern, places: slice) -> AttentionPattern:
    """Return the pattern of some of the keys."""
    return pattern._replace(
        key_segments=pattern.key_segments[:, places],
        key_ranks=pattern.key_ranks[:, places],
        key_positions=pattern.key_positions[:, places],
    )


def join(content: Array, queries: Array) -> Array:
    """Return [content ; queries] along the row."""
    return jnp.concatenate([content, queries], axis=1)
