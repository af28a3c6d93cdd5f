"""Fill-in-the-middle at the level of characters (Bavarian et al. 2022, arXiv:2207.14255), at the data build.

    PSM: PRE prefix SUF suffix MID middle        SPM: PRE SUF suffix MID prefix middle

A document is cut at two characters and its three parts are tokenised each by itself, so that a model meets the
fragments of words that stand at an editor's cursor. PRE, SUF and MID are the first three sentinels of the vocabulary,
as in the objective `fill_in_the_middle`, which cuts between tokens, on the device. A causal language model that
trains on these shards needs nothing else.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from jaxpt.data.sentences import Document, document_starts, sentence_ends
from jaxpt.data.tokenizer import Tokenizer


class Cut(NamedTuple):
    """Where the middle begins and ends, in characters, and whether the suffix comes first."""

    begin: int
    end: int
    suffix_first: bool


def draw_cut(text: str, rate: float, spm_rate: float, seed: int) -> Cut | None:
    """Draw the cut of a document: two places, independent and uniform over 0 .. n, so that any part may be empty.

    Args:
      text: the document; the same text and seed have the same cut in every build.
      rate: probability that the document is cut at all.
      spm_rate: probability that the suffix comes first.
      seed: a whole number.

    Returns:
      The cut, or None.
    """
    if rate == 0:
        return None
    digest = hashlib.sha256(f"{seed}\0{text}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:16], "big"))
    whether, order = rng.random(2)
    begin, end = sorted(rng.integers(0, len(text) + 1, 2).tolist())
    return Cut(begin, end, bool(order < spm_rate)) if whether < rate else None


def cut_document(tokenizer: Tokenizer, document: Document, cut: Cut) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n] and sentence starts [n] bool of a document in the order of fill-in-the-middle.

    A sentence starts where it does in the text, and at PRE, SUF and MID.

    >>> from jaxpt.data.tokenizer import byte_tokenizer
    >>> tokenizer = byte_tokenizer()
    >>> pre, suf, mid = tokenizer.sentinels[:3]
    >>> shown = {pre: "<", suf: "|", mid: ">"} | {107 + ord(c): c for c in "abcdef"}
    >>> orders = [cut_document(tokenizer, Document("abcdef"), Cut(2, 3, first))[0] for first in (False, True)]
    >>> ["".join(shown[i] for i in tokens.tolist()) for tokens in orders]
    ['<ab|def>c', '<|def>abc']
    """
    ends = sentence_ends(document.text) if document.ends is None else document.ends
    pre, suf, mid = tokenizer.sentinels[:3]

    def part(begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        text = document.text[begin:end]
        tokens, begins = tokenizer.encode(text)
        starts = document_starts(Document(text, tuple(e - begin for e in ends if begin < e < end)), begins)
        starts[:1] = begin in ends
        return tokens, starts

    def sentinel(token: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array([token], np.int32), np.ones(1, bool)

    prefix, middle, suffix = part(0, cut.begin), part(cut.begin, cut.end), part(cut.end, len(document.text))
    if cut.suffix_first:
        order = [sentinel(pre), sentinel(suf), suffix, sentinel(mid), prefix, middle]
    else:
        order = [sentinel(pre), prefix, sentinel(suf), suffix, sentinel(mid), middle]
    tokens, starts = (np.concatenate(arrays) for arrays in zip(*order, strict=True))
    return tokens, starts
