"""Metrics of token prediction as additive sums, beside a unigram model on the very same positions."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy

from jaxpt.losses.cross_entropy import CrossEntropy
from jaxpt.types import Array, Vocab


class TokenTables(NamedTuple):
    """What the metrics know of each token."""

    unigram_nll: np.ndarray  # [V] f32, nats; 0 for special tokens
    is_special: np.ndarray  # [V] f32
    token_bytes: np.ndarray  # [V] f32, UTF-8 bytes


def token_tables(vocab: Vocab) -> TokenTables:
    """Return the tables, with the unigram model p(v) = (count(v) + 1) / sum over non-special u of (count(u) + 1)."""
    arrays = (vocab.unigram_counts, vocab.is_special, vocab.token_bytes)
    assert all(array.shape == (vocab.size,) for array in arrays), "the Vocab lacks its arrays"
    counts = np.where(vocab.is_special, 0.0, vocab.unigram_counts + 1.0)
    with np.errstate(divide="ignore"):
        nll = np.where(vocab.is_special, 0.0, np.log(counts.sum()) - np.log(counts))
    return TokenTables(
        nll.astype(np.float32), vocab.is_special.astype(np.float32), vocab.token_bytes.astype(np.float32)
    )


def token_sums(result: CrossEntropy, targets: Array, weights: Array, tables: TokenTables) -> dict[str, Array]:
    """Sum what ``token_metrics`` needs over all given positions, weighted as the loss is.

    Args:
      result: of ``cross_entropy``, shape [...].
      targets: [...] i32.
      weights: [...] f32.
      tables: of this vocabulary.

    Returns:
      {name: [] f32}, additive over rows, microbatches and batches.
    """
    per_position = {
        "tokens": 1.0,
        "nll": result.nll,
        "correct": result.correct,
        "unigram_nll": jnp.asarray(tables.unigram_nll)[targets],
        "special": jnp.asarray(tables.is_special)[targets],
        "bytes": jnp.asarray(tables.token_bytes)[targets],
    }
    return {name: jnp.sum(value * weights) for name, value in per_position.items()}


def ratio(numerator: Array, denominator: Array) -> Array:
    """Return the quotient, and 0 where the denominator is 0."""
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0)


def token_metrics(sums: dict[str, Array], likelihood: bool) -> dict[str, Array]:
    """Finish the sums of ``token_sums``.

    The unigram model knows ordinary tokens only. Special tokens that are scored (the end of a document) are
    charged to it at the frequency they have on these very positions, the best a constant guess can do, so
    ``unigram_loss`` is never too high::

        unigram_loss = mean of -log p(v) over ordinary tokens, + entropy of "special or ordinary"

    Args:
      sums: of ``token_sums``, added up.
      likelihood: whether the losses multiply to the likelihood of the text, so that bits per byte mean anything.

    Returns:
      nll (nats per token, unsmoothed), perplexity, accuracy, unigram_loss, and bits_per_byte.
    """
    tokens = sums["tokens"]
    nll = ratio(sums["nll"], tokens)
    special = ratio(sums["special"], tokens)
    entropy = -xlogy(special, special) - xlogy(1 - special, 1 - special)
    metrics = {
        "nll": nll,
        "perplexity": jnp.exp(nll),
        "accuracy": ratio(sums["correct"], tokens),
        "unigram_loss": ratio(sums["unigram_nll"], tokens) + entropy,
    }
    if likelihood:
        metrics["bits_per_byte"] = ratio(sums["nll"], sums["bytes"]) / np.log(2)
    return metrics
