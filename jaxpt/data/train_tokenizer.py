"""Training a SentencePiece model on a bounded, reproducible sample of the text."""

from __future__ import annotations

import hashlib
import heapq
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

from jaxpt.data.vocabulary import SENTINELS

Model = Literal["unigram", "bpe", "char"]

_CHUNK = 512  # characters of one training example
_COVERAGE = 0.9995  # of the characters of the text that get a token of their own; the rest is written in bytes
_FIXED = 7 + 1 + 256  # special tokens, the newline, bytes; sentinels beside them
_THREADS = 4  # the model depends on it, in the last digits of a sum, and must not depend on the machine


class Sample:
    """The chunks of text with the smallest hashes, up to a number of bytes: the same whatever the order of `add`."""

    def __init__(self, budget: int):
        self.budget = budget
        self._bytes = 0
        self._heap: list[tuple[int, str]] = []  # (-hash, chunk): the largest hash first
        self._seen: set[int] = set()

    def add(self, chunk: str) -> None:
        """Take a chunk of text into account."""
        data = chunk.encode()
        rank = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
        if rank in self._seen or (self._bytes >= self.budget and rank > -self._heap[0][0]):
            return
        self._seen.add(rank)
        heapq.heappush(self._heap, (-rank, chunk))
        self._bytes += len(data)
        while self._bytes - len(self._heap[0][1].encode()) >= self.budget:
            largest, dropped = heapq.heappop(self._heap)
            self._bytes -= len(dropped.encode())
            self._seen.remove(-largest)

    def chunks(self) -> list[str]:
        """The sample, in the order of the hashes."""
        return [chunk for _, chunk in sorted(self._heap, reverse=True)]


def chunked(text: str) -> Iterator[str]:
    """Cut a text into training examples, between words where it has such.

    >>> [len(chunk) for chunk in chunked("four " * 200)]
    [509, 490]
    """
    start = 0
    while start < len(text):
        stop = start + _CHUNK
        if stop < len(text):
            stop = max(text.rfind(" ", start + _CHUNK // 2, stop), text.rfind("\n", start + _CHUNK // 2, stop))
            stop = start + _CHUNK if stop < 0 else stop
        yield text[start:stop]
        start = stop + (text[stop : stop + 1] == " ")  # SentencePiece puts a space before every example


def check_vocab_size(vocab_size: int, sentinels: int = SENTINELS) -> None:
    """Raise ValueError where a vocabulary has no room for pieces beside what every trained model holds."""
    fixed = _FIXED + sentinels
    if vocab_size < fixed + 36:
        raise ValueError(
            f"--vocab-size {vocab_size} is too small: {fixed} ids go to the special tokens, {sentinels} sentinels and "
            f"the 256 bytes; take at least {fixed + 36} (or --model byte)"
        )


def train_sentencepiece(chunks: Iterable[str], vocab_size: int, model: Model, sentinels: int = SENTINELS) -> bytes:
    """Train a SentencePiece model with every special token and byte fallback; text is not normalised.

    The ids are pad 0, unk 1, bos 2, eos 3, cls 4, sep 5, mask 6, the sentinels, the newline, 256 bytes, pieces.

    Args:
      chunks: examples of text, at most a few thousand bytes each.
      vocab_size: ids in all; where the text has not that many pieces, the vocabulary is smaller.
      model: the kind of model.
      sentinels: how many.

    Returns:
      The serialised model.

    Raises:
      ValueError: the vocabulary is too small, or there is no text.
    """
    from sentencepiece import SentencePieceTrainer

    examples = list(chunks)
    characters = Counter("".join(examples))
    for separate in "\n\t\0\r":  # a token of their own, or a byte; the trainer reserves some
        del characters[separate]
    if not characters:
        raise ValueError("there is no text to train a tokenizer on")
    check_vocab_size(vocab_size, sentinels)
    kept = _frequent(characters, vocab_size - _FIXED - sentinels, model)
    others = dict.fromkeys((ord(c) for c in set("".join(examples)) - kept), "\n")
    writer = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=(example.translate(others) for example in examples),
            model_writer=writer,
            model_type=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=model != "char",  # a character model has the space as a token of its own
            allow_whitespace_only_pieces=True,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            control_symbols=["<cls>", "<sep>", "<mask>", *(f"<extra_id_{i}>" for i in range(sentinels))],
            user_defined_symbols=["\n"],
            max_sentence_length=1 << 16,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(f"SentencePiece could not train a {model} model of {vocab_size} ids: {error}") from None
    return writer.getvalue()


def _frequent(characters: Counter[str], room: int, model: Model) -> set[str]:
    """The characters that get tokens: of a character model as many as fit, else all but the rarest of the text."""
    total = sum(characters.values())
    wanted, room = (total, room) if model == "char" else (_COVERAGE * total, room // 2)
    kept = {" "}  # as the space that SentencePiece puts before a text
    covered = characters[" "]
    for character, count in characters.most_common():
        if covered >= wanted or len(kept) == room:
            break
        if character not in kept:
            covered += count
            kept.add(character)
    return kept
