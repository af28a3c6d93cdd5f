"""What every corruption asks of a row: its own key, what may be masked, and where words start."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.types import Array, Key, Vocab

Unit: TypeAlias = Literal["token", "word", "phrase"]


class Row(NamedTuple):
    """The parts of one row that a selection looks at."""

    present: Array  # [L] bool: not padding
    candidates: Array  # [L] bool: neither padding nor a special token
    word_starts: Array  # [L] bool: the first token of a word; special tokens and padding are words of their own
    phrase_starts: Array | None = None  # [L] bool: likewise of phrases, where the data have them
    tokens: Array | None = None  # [L] i32
    shares: Array | None = None  # [V] f32: how often each token occurs in the training data; 0 for special tokens
    scores: Array | None = None  # [L] f32: what a model makes of each token; below 0 where it was not asked

    def starts(self, unit: Unit) -> Array:
        """Mark the first token of every unit: [L] bool."""
        if unit == "token":
            return jnp.ones_like(self.word_starts)
        if unit == "word":
            return self.word_starts
        if self.phrase_starts is None:
            raise ValueError(
                "a selection by phrases reads the field phrase_starts, which these rows lack: build the data with "
                "`jaxpt data build --phrases`, and ask for it with RowSpec(fields=fields_of(selection))"
            )
        return self.phrase_starts


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


def describe(
    tokens_L: Array, segment_ids_L: Array, sentence_ids_L: Array, vocab: Vocab, phrase_starts_L: Array | None = None
) -> Row:
    """Say which tokens may be masked and where words and phrases start.

    A word starts where the tokenizer says so, and also at every document and sentence start, at every special
    token and after one: a word piece that a cut has left behind [SEP] never joins the word before it. So do phrases.

    Args:
      tokens_L: [L] i32.
      segment_ids_L: [L] i32, 0 = padding.
      sentence_ids_L: [L] i32.
      vocab: its ``is_special``, ``starts_word`` and ``unigram_counts`` are used.
      phrase_starts_L: [L] bool or i32, ``Batch.extras["phrase_starts"]`` where the data have it.
    """
    assert vocab.is_special.shape == vocab.starts_word.shape == (vocab.size,), "the Vocab lacks its arrays"
    present_L = segment_ids_L > 0
    candidates_L = present_L & ~jnp.asarray(vocab.is_special)[tokens_L]
    breaks_L = (
        starts_of(segment_ids_L)
        | starts_of(sentence_ids_L)
        | ~candidates_L
        | jnp.concatenate([jnp.ones(1, bool), ~candidates_L[:-1]])
    )
    word_starts_L = jnp.asarray(vocab.starts_word)[tokens_L] | breaks_L
    if phrase_starts_L is not None:
        phrase_starts_L = phrase_starts_L.astype(bool) | breaks_L
    shares_V = jnp.asarray(smoothed_shares(vocab), jnp.float32)
    return Row(present_L, candidates_L, word_starts_L, phrase_starts_L, tokens_L, shares_V)


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


def smoothed_shares(vocab: Vocab) -> np.ndarray:
    """Return the share [V] of each token in the training data, every count plus one; 0 for special tokens."""
    counts = np.where(vocab.is_special, 0.0, 1.0)
    counts += np.where(vocab.is_special, 0, vocab.unigram_counts) if vocab.unigram_counts.size else 0
    return counts / max(counts.sum(), 1)
