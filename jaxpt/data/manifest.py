"""What a finished data build is: `manifest.json`, the format of its records, and how they are checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from etils import epath

from jaxpt.types import Vocab

FORMAT = 1
NAME = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One ArrayRecord file of documents, and the file of its document lengths; names are relative to the build."""

    file: str
    lengths: str
    documents: int
    tokens: int
    sha256: str
    lengths_sha256: str


@dataclass(frozen=True)
class Split:
    """Totals of one split (`bytes` are UTF-8 bytes of the documents' text) and its shards, in order."""

    documents: int
    tokens: int
    bytes: int
    sentences: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """A finished data build.

    Args:
      path: the folder of the build; not stored in the file.
      tokenizer: "kind", "file" (relative to the build) and "sha256".
      vocab: "size", the ids of the special tokens (None where absent) and "sentinels".
      token_dtype: "uint16" or "uint32", how tokens are stored in the records.
      splits: "train" and "validation".
      unigram: "file" and "sha256" of the token counts of the training split, int64 [V].
      vocab_arrays: "file" and "sha256" of is_special, starts_word and token_bytes, each [V].
      extras: name -> dtype of further values per token, in the order of the records: "bool" (``phrase_starts``) or
        "uint8", in steps of 1 / 255 (``gap_scores``).
      texts: of a build of pairs: "count" texts per example, "longest" example in tokens, "cut" texts; else empty.
      provenance: configuration, versions, inputs with sizes and digests.
      skipped: what could not be read, by reason, with examples.
    """

    path: epath.Path
    tokenizer: Mapping[str, str]
    vocab: Mapping[str, Any]
    token_dtype: str
    splits: Mapping[str, Split]
    unigram: Mapping[str, str]
    vocab_arrays: Mapping[str, str]
    extras: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, int] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Manifest:
        """Read the manifest of the build in folder `path`.

        Raises:
          ValueError: no finished build is there, or it was made by another version of the format.
        """
        folder = epath.Path(os.fspath(path))
        file = folder / NAME
        try:
            text = file.read_text()
        except FileNotFoundError:
            state = "an unfinished build; run the same `jaxpt data build` again" if folder.exists() else "nothing"
            raise ValueError(
                f"{folder} holds no finished data build (no {NAME}): there is {state}. "
                f"Build one with `jaxpt data build {folder} --input FILES` or `--corpus prose`."
            ) from None
        try:
            record = json.loads(text)
            if record["format"] != FORMAT:
                raise ValueError(
                    f"{file} is of format {record['format']} and this jaxpt reads format {FORMAT}: build the data again"
                )
            splits = {
                name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
                for name, split in record["splits"].items()
            }
            record.setdefault("texts", {})  # which builds from before there were pairs lack
            fields = {f.name for f in dataclasses.fields(Manifest)} - {"path", "splits"}
            return Manifest(path=folder, splits=splits, **{name: record[name] for name in fields})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error!r}): build the data again") from None

    def save(self) -> None:
        """Write `manifest.json`, last and in one piece: its presence says that the build is finished."""
        record = {"format": FORMAT, **dataclasses.asdict(dataclasses.replace(self, path=None))}  # type: ignore[arg-type]
        del record["path"]
        write_atomically(self.path / NAME, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())

    @property
    def digest(self) -> str:
        """SHA-256 of what training sees: the token shards, the vocabulary and their format; not the provenance."""
        seen = dataclasses.asdict(dataclasses.replace(self, path=None, provenance={}, skipped={}))  # type: ignore[arg-type]
        if not self.texts:
            del seen["texts"]  # the digest of a build is what it was before there were pairs
        return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()

    def load_vocab(self) -> Vocab:
        """The tokenizer as objectives see it.

        Raises:
          ValueError: a file does not match its digest.
        """
        for part in (self.unigram, self.vocab_arrays):
            check_digest(self.path / part["file"], part["sha256"])
        with (self.path / self.unigram["file"]).open("rb") as file:
            unigram_counts = np.load(file)
        with (self.path / self.vocab_arrays["file"]).open("rb") as file, np.load(file) as arrays:
            return Vocab(
                **{**self.vocab, "sentinels": tuple(self.vocab["sentinels"])},
                unigram_counts=unigram_counts,
                is_special=arrays["is_special"],
                starts_word=arrays["starts_word"],
                token_bytes=arrays["token_bytes"],
            )


def load_vocab(path: str | os.PathLike[str]) -> Vocab:
    """The tokenizer of the build in folder `path`, as objectives see it; raises ValueError as `Manifest.load` does."""
    return Manifest.load(path).load_vocab()


def encode_document(tokens: np.ndarray, sentence_starts: np.ndarray, *extras: np.ndarray) -> bytes:
    """One record: the number of tokens n, the tokens, a bit per token for sentence starts, and the extras.

    Args:
      tokens: [n], of the build's token dtype (uint16 or uint32), no special tokens added.
      sentence_starts: [n] bool; the first token always starts a sentence.
      extras: [n] bool (a bit per token) or uint8 (a byte), in the order of `Manifest.extras`.

    >>> tokens, starts = np.array([5, 6, 7], np.uint16), np.array([True, False, True])
    >>> record = encode_document(tokens, starts)
    >>> len(record), [a.tolist() for a in decode_document(record, "uint16")]
    (11, [[5, 6, 7], [0, 0, 1]])
    """
    assert tokens.ndim == 1 and tokens.shape == sentence_starts.shape and len(tokens) > 0, "a document has tokens"
    assert tokens.dtype in (np.uint16, np.uint32) and sentence_starts[0]
    body = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False)
    rest = [np.packbits(x).tobytes() if x.dtype == bool else x.tobytes() for x in (sentence_starts, *extras)]
    return b"".join((np.array(len(tokens), "<u4").tobytes(), body.tobytes(), *rest))


def extra_bytes(n: Any, dtype: str) -> Any:
    """Bytes of an extra of n tokens (or of an array of such numbers)."""
    return n if dtype == "uint8" else (n + 7) // 8


def decode_document(record: bytes, token_dtype: str, extras: Iterable[str] = ()) -> tuple[np.ndarray, ...]:
    """The tokens [n] (of `token_dtype`, read-only), sentence ids [n] int32 (0, 1, ...) and extras [n] of a record.

    Args:
      record: of `encode_document`.
      token_dtype: "uint16" or "uint32".
      extras: the dtypes of the extras that the records of the build have, "bool" or "uint8".

    Raises:
      ValueError: the record's size does not fit its number of tokens.
    """
    dtype = np.dtype(token_dtype).newbyteorder("<")
    n = int.from_bytes(record[:4], "little")
    kinds = ("bool", *extras)
    ends = 4 + n * dtype.itemsize + np.cumsum([0, *(extra_bytes(n, kind) for kind in kinds)])
    if n == 0 or len(record) != ends[-1]:
        raise ValueError(f"a record of {len(record)} bytes cannot hold a document of {n} {token_dtype} tokens")
    tokens = np.frombuffer(record, dtype, n, 4)
    parts = [np.frombuffer(record[begin:end], np.uint8) for begin, end in pairwise(ends.tolist())]
    starts, *values = (
        np.unpackbits(part, count=n).astype(bool) if kind == "bool" else part
        for kind, part in zip(kinds, parts, strict=True)
    )
    return tokens, np.cumsum(starts, dtype=np.int32) - 1, *values


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, read in pieces, as hexadecimal digits."""
    digest = hashlib.sha256()
    with epath.Path(os.fspath(path)).open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def check_digest(path: str | os.PathLike[str], wanted: str) -> None:
    """Refuse a file that is not what the manifest says.

    Raises:
      ValueError: the file is absent or its SHA-256 is another one.
    """
    try:
        found = sha256(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing from the data build: build the data again") from None
    if found != wanted:
        raise ValueError(
            f"{path} does not match its digest in {NAME} ({found[:12]}..., wanted {wanted[:12]}...): "
            f"the file was damaged or replaced; copy it again or build the data again"
        )


def is_local(path: epath.Path) -> bool:
    """Whether `path` is a file of this machine rather than an object of a store (gs://, s3://, ...)."""
    return "://" not in os.fspath(path)


def write_atomically(path: epath.Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all; on local disks also after a power failure."""
    if not is_local(path):  # an object store shows an object only when it is whole
        path.write_bytes(data)
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
