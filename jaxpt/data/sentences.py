"""Where sentences end, in spaced and unspaced scripts, and documents that come as a list of sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Document(NamedTuple):
    """One document to be encoded.

    Args:
      text: the whole document, with some text that is not whitespace.
      ends: offsets (characters) at which a sentence ends and another follows, ascending; None to have them found.
    """

    text: str
    ends: tuple[int, ...] | None = None


class Texts(NamedTuple):
    """The texts of one example, a source and a target: each is encoded by itself, and numbered as a sentence."""

    texts: tuple[str, ...]
    where: str  # in its file
    split_by: str | None = None  # what decides between training and validation instead of all texts

    @property
    def text(self) -> str:
        """All of them, one after the other."""
        return "\n".join(self.texts)


_CLOSERS = "\"'”’»)\\]」』）】》〉〕"
_OPENERS = "\"'“‘«([「『（【《〈〔¿¡"
# Possessive quantifiers keep this linear in a text of a million dots, closing brackets or spaces.
_END = re.compile(
    rf"(?P<hard>[。！？｡।॥۔؟։።။។]++[{_CLOSERS}]*+)"  # ends a sentence, with or without a space after it
    rf"|(?P<soft>(?<![.!?…])[.!?…]++[{_CLOSERS}]*+)\s++"  # ends one if what follows looks like a beginning
    r"|(?P<blank>\n[ \t]*+\n)"  # a blank line
)
_BLANK = re.compile(r"\n[ \t]*+\n")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'“‘])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Gen|Col|Capt|Lt|Sgt|Rev|Hon|Gov|Sen|Rep|Pres|vs|cf|al|"
    r"e\.g|i\.e|viz|approx|ca|Fig|Figs|Eq|Eqs|Sec|Ch|Vol|No|Nos|pp|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)$"
)


def sentence_ends(text: str) -> tuple[int, ...]:
    """Offsets at which a sentence ends and another one follows.

    A sentence ends after 。！？ and their like in other scripts; after . ! ? … where whitespace and something
    other than a small letter follow and the word is no common abbreviation or initial; and at a blank line.
    The whitespace between two sentences belongs to the second.

    >>> text = 'Dr. Jones met J. Smith. "Why?" he said. 你好！再见。'
    >>> [text[a:b] for a, b in zip((0, *sentence_ends(text)), (*sentence_ends(text), None))]
    ['Dr. Jones met J. Smith.', ' "Why?" he said.', ' 你好！', '再见。']
    """
    ends = []
    last = len(text.rstrip())
    for match in _END.finditer(text):
        kind = match.lastgroup
        assert kind is not None
        end = match.start() if kind == "blank" else match.end(kind)
        if kind == "soft" and not _begins(text, match.end(), match.start(), end):
            continue
        if end < last and end > (ends[-1] if ends else 0) and not text[ends[-1] if ends else 0 : end].isspace():
            ends.append(end)
    return tuple(ends)


def _begins(text: str, following: int, stop: int, end: int) -> bool:
    """Whether a sentence begins at `following`, after the full stop at `stop` and its closers up to `end`."""
    if _BLANK.search(text, end, following):
        return True
    first = text[following : following + 1]
    if not (first.isalnum() or first in _OPENERS) or first.islower():
        return False
    return not (text[stop] == "." and _ABBREVIATION.search(text, max(0, stop - 12), stop))


def document_starts(document: Document, begins: np.ndarray) -> np.ndarray:
    """Which tokens start a sentence [n] bool: the first, and the first that begins at or after a sentence's end.

    Args:
      document: the document.
      begins: [n] the characters at which its tokens begin, ascending.
    """
    starts = np.zeros(len(begins), bool)
    ends = np.array(sentence_ends(document.text) if document.ends is None else document.ends, np.int64)
    first = np.searchsorted(begins, ends)
    starts[first[first < len(begins)]] = True
    starts[:1] = True
    return starts


def join_sentences(sentences: Iterable[str]) -> Document:
    """A document from its sentences: joined by a space, but by nothing next to whitespace or between unspaced scripts.

    >>> join_sentences(["It rains.", "It pours."])
    Document(text='It rains. It pours.', ends=(9,))
    >>> join_sentences(["秦川雄帝宅，", "函谷壯皇居。"]).text
    '秦川雄帝宅，函谷壯皇居。'
    """
    parts: list[str] = []
    ends: list[int] = []
    length = 0
    for sentence in filter(str.strip, sentences):
        if parts:
            ends.append(length)
            last, first = parts[-1][-1], sentence[0]
            if not (last.isspace() or first.isspace() or unspaced(last) or unspaced(first)):
                parts.append(" ")
                length += 1
        parts.append(sentence)
        length += len(sentence)
    return Document("".join(parts), tuple(ends))


_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x30FF),  # CJK radicals and punctuation, Hiragana, Katakana
    (0x31F0, 0x4DBF),  # Katakana extensions, enclosed and compatibility CJK, Han extension A
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),  # Han compatibility
    (0xFF00, 0xFFDF),  # full-width forms, half-width Katakana
    (0x20000, 0x3FFFF),  # further Han
)


def unspaced(character: str) -> bool:
    """Whether a character belongs to a script that writes no spaces between words."""
    point = ord(character)
    return point >= 0x0E00 and any(low <= point <= high for low, high in _UNSPACED)
