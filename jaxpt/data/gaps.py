"""How much each sentence matters to its document, for gap sentences (PEGASUS, Zhang et al. 2020, arXiv:1912.08777).

The score of a sentence is its ROUGE-1 F against all other sentences of the document: with c the counts of words,

    F = 2 sum over words w of min(c_sentence[w], c_rest[w]) / (words of the sentence + words of the rest)

Words are runs of tokens, as for phrases; case makes no difference, and words without letters and digits do not count.
What is kept is the score as a share of the document's highest, in steps of 1 / 255: only order and ratios within a
document matter, and in a long one all scores are small (the rest has many more words than any sentence).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxpt.data.manifest import decode_document
from jaxpt.data.phrases import SPELLINGS, TABLES, words_of


def rouge_scores(words_W: np.ndarray, sentences_W: np.ndarray, count: int) -> np.ndarray:
    """Return the ROUGE-1 F of each sentence against the rest of its document: [count] float64, in [0, 1].

    Args:
      words_W: [W] the words of the document, as numbers.
      sentences_W: [W] the sentence of each, 0 .. count - 1.
      count: sentences.

    >>> words = np.array([1, 2, 3, 1, 2, 4, 5, 6])  # "1 2 3", "1 2 4", "5 6"
    >>> rouge_scores(words, np.array([0, 0, 0, 1, 1, 1, 2, 2]), 3).tolist()  # 2 * 2 / 8 and nothing in common
    [0.5, 0.5, 0.0]
    """
    if not len(words_W):
        return np.zeros(count)
    types, word_W = np.unique(words_W, return_inverse=True)
    in_document_T = np.bincount(word_W)
    pairs, count_P = np.unique(sentences_W.astype(np.int64) * len(types) + word_W, return_counts=True)
    sentence_P, type_P = np.divmod(pairs, len(types))
    common_P = np.minimum(count_P, in_document_T[type_P] - count_P)
    return 2 * np.bincount(sentence_P, common_P, minlength=count) / len(words_W)


def encoded_gap_scores(records: Sequence[bytes], token_dtype: str, work: Path) -> list[bytes]:
    """The scores of encoded documents, a byte per token, the same for all tokens of a sentence; 255 = the highest."""
    (starts_word, letters), spellings = np.load(work / TABLES), np.load(work / SPELLINGS)
    spoken_by_spelling = np.zeros(spellings.max() + 1, bool)
    spoken_by_spelling[spellings[letters]] = True
    nothing = np.zeros_like(spoken_by_spelling)
    encoded = []
    for record in records:
        tokens, sentences = decode_document(record, token_dtype)
        spelt = spellings[tokens]
        starts = starts_word[tokens] | (np.diff(sentences, prepend=-1) > 0)
        starts[1:] |= spelt[:-1] < 0
        inside = spelt >= 0
        words = words_of(spelt[inside], starts[inside], nothing, spoken_by_spelling)
        spoken = np.logical_or.reduceat(spoken_by_spelling[spelt[inside]], words.first)
        of_word = sentences[inside][words.first]
        scores = rouge_scores(words.hashes[spoken], of_word[spoken], int(sentences[-1]) + 1)
        encoded.append(np.rint(255 * scores / (scores.max() or 1.0)).astype(np.uint8)[sentences].tobytes())
    return encoded
