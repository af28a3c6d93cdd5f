"""Row keys, word starts and compacting."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpt.corruption.compact import compact
from jaxpt.corruption.rows import describe, ordinary_ids, row_keys, unit_ids
from jaxpt.types import Vocab

# ids: 0 pad, 1 cls, 2 sep, 3 mask, 4 "dog" (starts a word), 5 "##s" (goes on)
VOCAB = Vocab(
    size=6, pad=0, cls=1, sep=2, mask=3, is_special=np.arange(6) < 4, starts_word=np.array([1, 1, 1, 1, 1, 0], bool)
)


def test_a_row_key_depends_on_the_row_id_alone():
    key = jax.random.key(7)
    whole = jax.random.key_data(row_keys(key, jnp.arange(8, dtype=jnp.uint32)))
    part = jax.random.key_data(row_keys(key, jnp.array([6, 2], jnp.uint32)))
    assert (part == whole[jnp.array([6, 2])]).all()
    assert len({tuple(row) for row in np.asarray(whole)}) == 8
    np.testing.assert_array_equal(whole[3], jax.random.key_data(jax.random.fold_in(key, 3)))


def test_words_do_not_cross_special_tokens_documents_or_sentences():
    #                   cls dog  s sep cls  s  dog  s   s  sep pad pad
    tokens = jnp.array([1, 4, 5, 2, 1, 5, 4, 5, 5, 2, 0, 0])
    segments = jnp.array([1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0])
    sentences = jnp.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0])
    row = describe(tokens, segments, sentences, VOCAB)
    assert row.candidates.astype(int).tolist() == [0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0]
    # "##s" after [CLS] (a cut word) and "##s" at a sentence start are words of their own.
    assert row.word_starts.astype(int).tolist() == [1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1]
    assert unit_ids(row.word_starts).tolist() == [0, 1, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9]
    assert row.present.sum() == 10


def test_documents_without_special_tokens_are_apart_too():
    row = describe(jnp.array([4, 5, 5, 5]), jnp.array([1, 1, 2, 2]), jnp.zeros(4, int), VOCAB)
    assert row.word_starts.astype(int).tolist() == [1, 0, 1, 0]


def test_ordinary_ids():
    assert ordinary_ids(VOCAB).tolist() == [4, 5]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.booleans(), min_size=7, max_size=7), st.integers(1, 9))
def test_compact_lists_the_marked_in_order(marked, size):
    positions, used = compact(jnp.array(marked), size)
    wanted = [i for i, mark in enumerate(marked) if mark][:size]
    assert used.sum() == len(wanted)
    assert positions.tolist() == wanted + [0] * (size - len(wanted))
