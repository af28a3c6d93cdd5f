"""What every corruption asks of a row: its own key, what may be masked, and where words start."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.types import Array, Key, Vocab


class Row(NamedTuple):
    """The parts of one row that a selection looks at."""

    present: Array  # [L] bool: not padding
    candidates: Array  # [L] bool: neither padding nor a special token
    word_starts: Array  # [L] bool: the first token of a word; special tokens and padding are words of their own


def row_keys(key: Key, row_ids: Array) -> Array:
    """Return one key per row, which depends on the row's global index and on nothing else about the batch.

    Args:
      key: the key of this step (and of this use).
      row_ids: [R] u32, the rows' indices in the global batch.

    Returns:
      [R] typed keys.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, row_ids)


def starts_of(ids_L: Array) -> Array:
    """Mark the first token of every run of equal ids, for example of every packed document.

    >>> import jax.numpy as jnp
    >>> starts_of(jnp.array([1, 1, 2, 2, 0])).astype(int).tolist()
    [1, 0, 1, 0, 1]
    """
    return jnp.concatenate([jnp.ones(1, bool), ids_L[1:] != ids_L[:-1]])


def describe(tokens_L: Array, segment_ids_L: Array, sentence_ids_L: Array, vocab: Vocab) -> Row:
    """Say which tokens may be masked and where words start.

    A word starts where the tokenizer says so, and also at every document and sentence start, at every special
    token and after one: a word piece that a cut has left behind [SEP] never joins the word before it.

    Args:
      tokens_L: [L] i32.
      segment_ids_L: [L] i32, 0 = padding.
      sentence_ids_L: [L] i32.
      vocab: its ``is_special`` and ``starts_word`` are used.
    """
    assert vocab.is_special.shape == vocab.starts_word.shape == (vocab.size,), "the Vocab lacks its arrays"
    present_L = segment_ids_L > 0
    candidates_L = present_L & ~jnp.asarray(vocab.is_special)[tokens_L]
    word_starts_L = (
        jnp.asarray(vocab.starts_word)[tokens_L]
        | starts_of(segment_ids_L)
        | starts_of(sentence_ids_L)
        | ~candidates_L
        | jnp.concatenate([jnp.ones(1, bool), ~candidates_L[:-1]])
    )
    return Row(present_L, candidates_L, word_starts_L)


def unit_ids(starts_L: Array) -> Array:
    """Number the units (words, runs, documents) of a row from their first tokens: 0, 1, 2, ...

    >>> import jax.numpy as jnp
    >>> unit_ids(jnp.array([True, False, True, True, False])).tolist()
    [0, 0, 1, 2, 2]
    """
    return jnp.cumsum(starts_L, dtype=jnp.int32) - 1


def ordinary_ids(vocab: Vocab) -> np.ndarray:
    """Return the ids of all tokens that are not special: [M] i32."""
    assert vocab.is_special.shape == (vocab.size,), "the Vocab lacks its arrays"
    return np.flatnonzero(~vocab.is_special).astype(np.int32)
