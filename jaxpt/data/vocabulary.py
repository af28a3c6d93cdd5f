"""What tokens stand for: names of special tokens, and which tokens start a word."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Mapping, Sequence

from jaxpt.data.sentences import unspaced

SENTINELS = 100  # that every vocabulary has at least

# How vocabularies call their special tokens, in the order of preference. ("<|endoftext|>" begins and ends.)
NAMES: Mapping[str, tuple[str, ...]] = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|endofpad|>"),
    "unk": ("<unk>", "[UNK]"),
    "bos": ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<|endoftext|>"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
}


def starts_word(piece: bytes) -> bool:
    """Whether the text of a token starts a word: whitespace, punctuation or a character of an unspaced script.

    Apostrophes do not, so that "don't" stays one word. An incomplete character counts as of an unspaced script
    if its first byte leads to one (0xE3-0xE9: kana and Han, 0xF0: rarer Han and emoji).
    """
    if not piece:
        return False
    if piece[0] < 0x80:
        return chr(piece[0]) in string.whitespace or (chr(piece[0]) in string.punctuation and piece[0] != ord("'"))
    first = piece.decode("utf-8", "ignore")[:1]
    if not first or not piece.startswith(first.encode()):
        return 0xE3 <= piece[0] <= 0xE9 or piece[0] == 0xF0
    category = unicodedata.category(first)
    if category[0] in "PSZ":
        return first != "’"
    return unspaced(first) and category[0] != "M"


def find_special(
    pieces: Sequence[str], known: Mapping[str, int], named: Sequence[int] | None = None, least: int = SENTINELS
) -> tuple[dict[str, int], list[int], int]:
    """Ids of the special tokens, of the sentinels, and the size with those that had to be added.

    Args:
      pieces: the vocabulary, by id.
      known: ids that the tokenizer itself declares.
      named: ids among which special tokens are found by name; None for all.
      least: sentinels; those that are missing are added.
    """
    ids = range(len(pieces)) if named is None else named
    index = {pieces[i].lstrip("▁"): i for i in sorted(ids, reverse=True)}
    found = {
        name: known[name] if name in known else next((index[n] for n in names if n in index), None)
        for name, names in NAMES.items()
    }
    if found["cls"] is None and found["sep"] is None and {"<s>", "</s>", "<mask>"} <= index.keys():
        # RoBERTa, BART and XLM-R: <s> and </s> are what BERT calls [CLS] and [SEP]
        found["cls"], found["sep"] = found["bos"], found["eos"]
    sentinels = [index[name] for name in map("<extra_id_{}>".format, range(len(pieces))) if name in index]
    size = len(pieces)
    special = {}
    for name, at in found.items():
        if at is None:
            at, size = size, size + 1
        special[name] = at
    if len(sentinels) < least:
        extra = least - len(sentinels)
        sentinels += range(size, size + extra)
        size += extra
    return special, sentinels, size


def byte_level_table() -> dict[str, int]:
    """The character by which byte-level BPE writes a byte -> the byte (GPT-2: printable ones stand for themselves)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}
