"""What stands at a selected position: [MASK], a random token, or the token itself (BERT's 80/10/10)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.corruption.choose import uniform
from jaxpt.types import Array, Key

KEEP, MASK, RANDOM = 0, 1, 2


class Replacement(NamedTuple):
    """The decisions for every position of a row, used where it is selected."""

    action: Array  # [L] i32: KEEP, MASK or RANDOM
    ids: Array  # [L] i32: what RANDOM puts there


def draw_replacement(key: Key, unit_ids_L: Array, mask: float, random: float, ids_M: np.ndarray | Array) -> Replacement:
    """Decide what each unit becomes: one uniform number per unit, cut at ``mask`` and ``mask + random``.

    Args:
      key: a key.
      unit_ids_L: [L] i32 in 0 .. L-1; tokens of one unit share the action (SpanBERT: a span), not the random id.
      mask: probability of [MASK].
      random: probability of a random token; the rest stays.
      ids_M: [M] i32, what a random token is drawn from, uniformly; the original may be drawn.
    """
    action_bits_L, id_bits_L = jax.random.bits(key, (2, unit_ids_L.shape[0]), jnp.uint32)
    draw_L = uniform(action_bits_L)[unit_ids_L]
    action_L = jnp.where(draw_L < mask, MASK, jnp.where(draw_L < mask + random, RANDOM, KEEP)).astype(jnp.int32)
    index_L = id_bits_L % ids_M.shape[0]  # the remainder favours no id by more than M / 2**32
    return Replacement(action_L, jnp.asarray(ids_M, jnp.int32)[index_L])


def replace(tokens_L: Array, selected_L: Array, replacement: Replacement, mask_id: int) -> Array:
    """Apply the decisions at the selected positions.

    >>> import jax.numpy as jnp
    >>> tokens, selected = jnp.array([5, 6, 7, 8]), jnp.array([True, True, False, True])
    >>> decisions = Replacement(jnp.array([MASK, RANDOM, MASK, KEEP]), jnp.array([9, 9, 9, 9]))
    >>> replace(tokens, selected, decisions, mask_id=4).tolist()
    [4, 9, 7, 8]
    """
    action_L = jnp.where(selected_L, replacement.action, KEEP)
    return jnp.where(action_L == MASK, mask_id, jnp.where(action_L == RANDOM, replacement.ids, tokens_L))
