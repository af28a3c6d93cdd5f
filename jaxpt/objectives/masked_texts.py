"""Masked LM beside objectives of text vectors, on texts that each have a row of their own."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from jaxpt.corruption.selection import Informative, fields_of
from jaxpt.losses.cross_entropy import linear_cross_entropy
from jaxpt.losses.token_metrics import TokenTables, token_sums
from jaxpt.models.transformer import embedding_table
from jaxpt.objectives.masked_lm import MaskedLM, mask_rows
from jaxpt.objectives.parts import at, check
from jaxpt.objectives.text_vectors import Texts
from jaxpt.types import Array, Batch, Key, Network, Params, Vocab


def check_masked(masked: MaskedLM | None, name: str) -> None:
    """Refuse settings that need more than texts, or a head of their own."""
    if masked is None:
        return
    plain = masked.boundary is None and not masked.z_loss and masked.predict_from == "same"
    check(
        plain and not isinstance(masked.selection, Informative) and not fields_of(masked.selection),
        f"{name}: masked does without boundary, z_loss, predict_from, phrases and the Informative selection; train "
        f"them in masked_lm, and {name} beside it with multitask",
    )


def mask_texts(
    masked: MaskedLM, vocab: Vocab, texts: Texts, row_ids_R: Array, key: Key, step: Array
) -> tuple[dict[str, Array], Array]:
    """Hide tokens of texts and say what is to be predicted where.

    Args:
      masked: how.
      vocab: of the tokens.
      texts: [R, T, L].
      row_ids_R: [R] u32.
      key: of this step and this use.
      step: [] i32.

    Returns:
      {"masked_tokens" [R, T, L] i32, "targets" and "target_positions" [R, T, K] i32}, and their weights [R, T, K] f32.
    """
    shape, count = texts.tokens.shape, texts.tokens.shape[1]
    tokens, segment_ids = (array.reshape(-1, shape[-1]) for array in texts)
    ids = (row_ids_R[:, None] * count + jnp.arange(count, dtype=jnp.uint32)).reshape(-1)
    nothing = jnp.zeros_like(tokens)
    rows = Batch(tokens, segment_ids, nothing, nothing, ids, nothing[:, 0], jnp.ones(len(ids)))
    made, weights = mask_rows(masked, vocab, rows, key, step)
    made = {"masked_tokens": made["tokens"], "targets": made["targets"], "target_positions": made["target_positions"]}
    return {name: array.reshape(*shape[:2], -1) for name, array in made.items()}, weights["mlm"].reshape(*shape[:2], -1)


def predict_tokens(
    head: Network, params: Params, hidden: Array, inputs: Mapping[str, Array], weights: Array, tables: TokenTables
) -> tuple[Array, dict[str, Array]]:
    """Return the losses [R, T, K] of hidden tokens and the sums of ``token_metrics``.

    Args:
      head: of token prediction.
      params: of all networks, by name: "trunk" has the token table, "head" is the head's.
      hidden: [R, T, L, D] of the masked texts.
      inputs: "targets" and "target_positions" of ``mask_texts``.
      weights: [R, T, K] f32.
      tables: of the vocabulary.
    """
    targets, places = (inputs[name].reshape(-1, weights.shape[-1]) for name in ("targets", "target_positions"))
    states = at(hidden.reshape(-1, *hidden.shape[-2:]), places)
    result = linear_cross_entropy(head.apply(params["head"], states, embedding_table(params["trunk"])), targets)
    return result.loss.reshape(weights.shape), token_sums(result, targets, weights.reshape(targets.shape), tables)
