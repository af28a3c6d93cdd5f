"""What a model makes of the tokens of a batch while they are hidden from it, for a selection by such scores."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpt.corruption.choose import draw_subset
from jaxpt.corruption.compact import compact
from jaxpt.corruption.rows import describe, row_keys
from jaxpt.corruption.selection import Informative
from jaxpt.losses.cross_entropy import cross_entropy, map_logits
from jaxpt.types import Array, Batch, Key, Readout, Vocab


def token_scores(
    selection: Informative, predict: Callable[[Array, Array], Readout], vocab: Vocab, batch: Batch, key: Key
) -> Array:
    """Score every ordinary token by a prediction that did not see it.

    A bidirectional model must not score a token that it can see: each pass hides a random half of the tokens of a
    row, and the second pass hides the other half.

    Args:
      selection: what to score and in how many passes.
      predict: from tokens [R, L] and places [R, K] to the readout of the tokens at these places.
      vocab: for the mask and the ordinary tokens.
      batch: the global batch.
      key: of this step and this use.

    Returns:
      [R, L] f32, nats: 0 or more; -1 for what was not scored.
    """
    length = batch.tokens.shape[1]
    mask_id = vocab.require("mask", "selection by scores")

    def halves(row_key: Key, tokens_L: Array, segment_ids_L: Array, sentence_ids_L: Array) -> tuple[Array, Array]:
        candidates_L = describe(tokens_L, segment_ids_L, sentence_ids_L, vocab).candidates
        bits_L = jax.random.bits(row_key, (length,), jnp.uint32)
        first_L = draw_subset(bits_L, candidates_L, (jnp.sum(candidates_L) + 1) // 2)
        return first_L, candidates_L & ~first_L

    def score(hidden_RL: Array) -> Array:
        places_RK, used_RK = jax.vmap(lambda hidden_L: compact(hidden_L, (length + 1) // 2))(hidden_RL)
        readout = predict(jnp.where(hidden_RL, mask_id, batch.tokens), places_RK)
        targets_RK = jnp.take_along_axis(batch.tokens, places_RK, axis=1)
        scores_RK = jnp.maximum(map_logits(SCORES[selection.score], readout, targets_RK), 0)
        nowhere = jnp.where(used_RK, places_RK, length)  # an unused slot is dropped
        return jax.vmap(lambda places, scores: jnp.full(length, -1.0).at[places].set(scores, mode="drop"))(
            nowhere, scores_RK
        )

    keys = row_keys(key, batch.row_ids)
    both = jax.vmap(halves)(keys, batch.tokens, batch.segment_ids, batch.sentence_ids)
    return jax.lax.map(score, jnp.stack(both[: selection.passes])).max(axis=0)


def _entropy(logits: Array, targets: Array) -> Array:
    del targets
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


SCORES = {"surprisal": lambda logits, targets: cross_entropy(logits, targets).nll, "entropy": _entropy}
