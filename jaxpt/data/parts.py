"""The work of a build that runs in parallel: reading parts of the input, encoding them, writing shards.

A part is a group of small files or a piece of a large one; parts follow from the inputs alone, never from the
number of workers. Every function here takes a job, a NamedTuple, and can run in any process.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpt.data.corpus import read_prose
from jaxpt.data.files import Piece, Unit, compressed, split_piece
from jaxpt.data.gaps import encoded_gap_scores
from jaxpt.data.infilling import cut_document, draw_cut
from jaxpt.data.jobs import advance
from jaxpt.data.manifest import encode_document, extra_bytes, sha256
from jaxpt.data.phrases import encoded_phrase_starts
from jaxpt.data.sentences import Document, Texts, document_starts
from jaxpt.data.text import Field, Item, Problem, read_piece
from jaxpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxpt.data.train_tokenizer import Sample, chunked

EXAMPLES = 10  # problems of a kind that are kept in full
SPLITS = ("train", "validation")
COUNTS = ("documents", "tokens", "bytes", "sentences")
PART_BYTES = (1 << 20, 64 << 20)  # the smallest and the largest part
EXTRA_BYTES = 1 << 20  # of encoded documents whose extras are made together
EXTRACTED = ".extracted"  # what prose extraction writes: JSON lines of [text, sentence ends]


class Part(NamedTuple):
    """A part of the input and how to read it.

    Args:
      number: its place in the order of the input.
      pieces: what it reads.
      field: the field or column that holds the text; or those of the texts of examples.
      unit: what a document of a text file is.
      work: the folder for what is made of it.
      validation: fraction of documents for validation.
      strict: refuse problems instead of counting them.
      infilling: share of documents cut for fill-in-the-middle, share of those with the suffix first, seed.
      limits: of an example, the most tokens of each text, of those that it has; empty = any number.
      cut: cut longer texts instead of leaving their examples out.
      tokenizer: digest of the tokenizer that `work` holds.
    """

    number: int
    pieces: tuple[Piece, ...]
    field: Field
    unit: Unit
    work: str
    validation: float
    strict: bool
    infilling: tuple[float, float, int] = (0.0, 0.0, 0)
    limits: tuple[int, ...] = ()
    cut: bool = False
    tokenizer: str = ""


def plan(pieces: Sequence[Piece], unit: Unit) -> list[tuple[Piece, ...]]:
    """Group the input into parts of similar size."""
    sizes = [_weight(piece) for piece in pieces]
    target = min(max(sum(sizes) // 32, PART_BYTES[0]), PART_BYTES[1])
    parts: list[tuple[Piece, ...]] = []
    group: list[Piece] = []
    filled = 0
    for piece in (part for whole in pieces for part in split_piece(whole, unit, target)):
        group.append(piece)
        if piece.format == "parquet" and piece.end is not None:
            filled += target  # row groups were counted out already
        else:
            filled += _weight(piece) if piece.end is None else piece.end - piece.start
        if filled >= target:
            parts.append(tuple(group))
            group, filled = [], 0
    return [*parts, tuple(group)] if group else parts


def _weight(piece: Piece) -> int:
    return piece.size * (4 if compressed(piece.name) else 1)


def documents(part: Part) -> Iterator[tuple[Piece, Item]]:
    """What is read from a part, in order.

    Raises:
      ValueError: something cannot be read, and the build is strict.
    """
    for piece in part.pieces:
        if piece.name.endswith(EXTRACTED):
            with Path(piece.path).open(encoding="utf-8", newline="\n") as file:
                for line in file:
                    text, ends = json.loads(line)
                    yield piece, Document(text, tuple(ends))
            advance(piece.size)
            continue
        for item in read_piece(piece, part.field, part.unit, advance):
            if part.strict and isinstance(item, Problem):
                raise ValueError(f"{piece.name}: {item}. (Without --strict it would be skipped and counted.)")
            yield piece, item


def extract_prose(part: Part) -> tuple[Piece, dict[str, str]]:
    """Write the prose of some source files to one file; its piece, and the digests of the sources."""
    path = Path(part.work) / f"prose-{part.number:05d}{EXTRACTED}"
    digests = {}
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for piece in part.pieces:
            digests[piece.name] = sha256(piece.path)
            for document in read_prose(piece):
                file.write(json.dumps(document, ensure_ascii=False) + "\n")
            advance(piece.size)
    return Piece(str(path), path.name, "text", path.stat().st_size), digests


# ------------------------------------------------------------------------------------------ sampling


class SampleJob(NamedTuple):
    """A part to be sampled for the training of a tokenizer, and how many bytes are wanted and looked at."""

    part: Part
    budget: int
    limit: int


def sample_part(job: SampleJob) -> list[str]:
    """The chunks of a part that can belong to the sample of the whole input."""
    sample = Sample(job.budget)
    seen = 0
    for _, item in documents(job.part._replace(strict=False)):
        if not isinstance(item, Problem):
            for chunk in chunked(item.text):
                sample.add(chunk)
            seen += len(item.text)
            if seen > job.limit:
                break
    return sample.chunks()


# ------------------------------------------------------------------------------------------ encoding


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer where `encode_part` finds it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / tokenizer.file_name).write_bytes(tokenizer.data)
    record = {"kind": tokenizer.kind, "file": tokenizer.file_name, "options": dict(tokenizer.options)}
    (folder / "kind.json.tmp").write_text(json.dumps(record))
    (folder / "kind.json.tmp").replace(folder / "kind.json")


@functools.lru_cache(maxsize=1)
def saved_tokenizer(folder: Path, digest: str = "") -> Tokenizer:
    """The tokenizer that `save_tokenizer` wrote, loaded once per process and `digest`."""
    record = json.loads((folder / "kind.json").read_text())
    return load_tokenizer((folder / record["file"]).read_bytes(), record["kind"], record["options"])


def token_dtype(tokenizer: Tokenizer) -> str:
    """The smallest dtype that holds every id."""
    return "uint16" if tokenizer.size <= 1 << 16 else "uint32"


def encode_part(part: Part) -> dict[str, Any]:
    """Encode the documents of a part into one file per split; what was made before is kept.

    Returns:
      The part's statistics, which are also written, last, to its .json file.
    """
    base = Path(part.work) / f"part-{part.number:05d}"
    finished = base.with_suffix(".json")
    if finished.exists():
        advance(sum(piece.size if piece.end is None else piece.end - piece.start for piece in part.pieces))
        return json.loads(finished.read_text())
    tokenizer = saved_tokenizer(Path(part.work) / "tokenizer", part.tokenizer)
    hashes: list[int] = []
    unigram = np.zeros(tokenizer.size, np.int64)
    problems: dict[str, dict[str, Any]] = {}
    cut = 0
    counts = {split: dict.fromkeys(COUNTS, 0) for split in SPLITS}
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    train_file, validation_file = (part_file(Path(part.work), part.number, split) for split in SPLITS)
    with train_file.open("wb") as train, validation_file.open("wb") as validation:
        for piece, item in documents(part):
            if isinstance(item, Texts):
                encoded = _encode_texts(tokenizer, item, part.limits, part.cut)
                cut += not isinstance(encoded, Problem) and len(encoded[0]) < encoded[3]
            else:
                encoded = _encode(tokenizer, item, part.infilling) if isinstance(item, Document) else item
            if isinstance(encoded, Problem):
                entry = problems.setdefault(encoded.reason, {"count": 0, "examples": []})
                entry["count"] += 1
                if len(entry["examples"]) < EXAMPLES:
                    entry["examples"].append(f"{piece.name}: {encoded}")
                continue
            tokens, starts, data, *_ = encoded
            hashes.append(content_hash(data))
            by = item.split_by if isinstance(item, Texts) else None
            share = hashes[-1] if by is None else content_hash(by.encode())
            split = "validation" if share < int(part.validation * 2.0**64) else "train"
            (train if split == "train" else validation).write(encode_document(tokens, starts))
            lengths[split].append(len(tokens))
            for name, value in zip(COUNTS, (1, len(tokens), len(data), int(starts.sum())), strict=True):
                counts[split][name] += value
            if split == "train":
                np.add.at(unigram, tokens, 1)
    arrays: dict[str, Any] = {split: np.array(lengths[split], np.uint32) for split in SPLITS}
    with base.with_suffix(".npz").open("wb") as file:
        np.savez(file, hashes=np.array(hashes, np.uint64), unigram=unigram, **arrays)
    sources = [piece for piece in part.pieces if piece.start == 0 and not piece.name.endswith(EXTRACTED)]
    digests = {piece.name: sha256(piece.path) for piece in sources}
    digests |= {path: sha256(path) for piece in sources for path in piece.beside}
    longest = max((max(of_split, default=0) for of_split in lengths.values()), default=0)
    result = {"splits": counts, "problems": problems, "digests": digests, "longest": longest, "cut": cut}
    temporary = base.with_suffix(".tmp")
    temporary.write_text(json.dumps(result))
    temporary.replace(finished)
    return result


def content_hash(data: bytes) -> int:
    """The 64-bit hash of a document's text in UTF-8 that decides its split: a function of the content alone."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def _encode(
    tokenizer: Tokenizer, document: Document, infilling: tuple[float, float, int]
) -> tuple[np.ndarray, np.ndarray, bytes] | Problem:
    """Tokens [n], sentence starts [n] bool, and the text in UTF-8."""
    tokens, begins = tokenizer.encode(document.text)
    if not len(tokens):
        return Problem("document", "no tokens", document.text[:40])
    starts, cut = document_starts(document, begins), draw_cut(document.text, *infilling)
    if cut is not None:
        tokens, starts = cut_document(tokenizer, document, cut)
    return tokens.astype(token_dtype(tokenizer)), starts, document.text.encode()


def _encode_texts(
    tokenizer: Tokenizer, example: Texts, limits: tuple[int, ...], cut: bool
) -> tuple[np.ndarray, np.ndarray, bytes, int] | Problem:
    """Tokens [n], text starts [n] bool, all texts in UTF-8, and how many tokens there were before some were cut."""
    texts = [tokenizer.encode(text)[0] for text in example.texts]
    empty = next((text for text, tokens in zip(example.texts, texts, strict=True) if not len(tokens)), None)
    if empty is not None:
        return Problem(example.where, "a text without tokens", empty[:40])
    whole = sum(map(len, texts))
    if limits:
        limited = list(zip(texts, limits, strict=False))  # the last texts may be absent
        long = [len(tokens) > limit for tokens, limit in limited]
        if any(long) and not cut:
            return Problem(example.where, "longer than --text-tokens", example.texts[long.index(True)][:40])
        texts = [tokens[:limit] for tokens, limit in limited]
    starts = np.concatenate([np.arange(len(tokens)) == 0 for tokens in texts])
    return np.concatenate(texts).astype(token_dtype(tokenizer)), starts, example.text.encode(), whole


def part_file(work: Path, part: int, split: str) -> Path:
    """The file of the encoded documents of a part and split."""
    return work / f"part-{part:05d}-{split}.bin"


# -------------------------------------------------------------------------------------------- shards


class ShardJob(NamedTuple):
    """A shard to be written: its split, its number, and the ranges (part, first document, last) it is made of."""

    split: str
    number: int
    ranges: tuple[tuple[int, int, int], ...]
    work: str
    token_dtype: str
    extras: dict[str, str]  # name -> dtype, in the order of the records


def plan_shards(
    part_count: int, work: Path, token_dtype: str, extras: dict[str, str], shard_bytes: int, shard_documents: int
) -> list[ShardJob]:
    """Cut the documents of all parts, in order, into shards of at most so many bytes and documents."""
    jobs = []
    for split in SPLITS:
        ranges: list[tuple[int, int, int]] = []
        index = filled = count = 0
        for part in range(part_count):
            sizes = _record_bytes(_lengths(work, part, split), token_dtype, extras)
            start = 0
            while start < len(sizes):
                ends = np.cumsum(sizes[start:])
                stop = start + int(np.searchsorted(ends, shard_bytes - filled, "right"))
                stop = min(stop, start + shard_documents - count, len(sizes))
                if stop == start and not ranges:
                    stop = start + 1  # a document larger than a shard has one of its own
                if stop > start:
                    ranges.append((part, start, stop))
                    filled += int(ends[stop - start - 1])
                    count += stop - start
                if stop < len(sizes):
                    jobs.append(ShardJob(split, index, tuple(ranges), str(work), token_dtype, extras))
                    ranges, index, filled, count = [], index + 1, 0, 0
                start = stop
        if ranges:
            jobs.append(ShardJob(split, index, tuple(ranges), str(work), token_dtype, extras))
    return jobs


def _lengths(work: Path, part: int, split: str) -> np.ndarray:
    with np.load(work / f"part-{part:05d}.npz") as arrays:
        return arrays[split]


def _record_bytes(lengths: np.ndarray, token_dtype: str, extras: Mapping[str, str] = {}) -> np.ndarray:
    n = lengths.astype(np.int64)
    return 4 + n * np.dtype(token_dtype).itemsize + sum(extra_bytes(n, kind) for kind in ("bool", *extras.values()))


def _records(job: ShardJob) -> Iterator[bytes]:
    """The documents of a shard as the parts have them, without extras."""
    for part, first, last in job.ranges:
        sizes = _record_bytes(_lengths(Path(job.work), part, job.split), job.token_dtype)
        with part_file(Path(job.work), part, job.split).open("rb") as file:
            file.seek(int(sizes[:first].sum()))
            for size in sizes[first:last]:
                yield file.read(int(size))
                advance(int(size))


_EXTRAS = {"gap_scores": encoded_gap_scores, "phrase_starts": encoded_phrase_starts}


def _with_extras(job: ShardJob) -> Iterator[bytes]:
    def extend(records: list[bytes]) -> Iterator[bytes]:
        found = [_EXTRAS[name](records, job.token_dtype, Path(job.work)) for name in job.extras]
        return map(b"".join, zip(records, *found, strict=True))

    records: list[bytes] = []
    size = 0
    for record in _records(job):
        records.append(record)
        size += len(record)
        if size > EXTRA_BYTES:
            yield from extend(records)
            records, size = [], 0
    if records:
        yield from extend(records)


def write_shard(job: ShardJob) -> dict[str, Any]:
    """Write one ArrayRecord file and its lengths into the work folder; the fields of `manifest.Shard`.

    Raises:
      OSError: the file could not be written whole.
    """
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    work = Path(job.work)
    name = f"{job.split}-{job.number:05d}"
    shard, lengths_file = work / f"{name}.array_record", work / f"{name}.lengths.npy"
    # one record per group: a reader that jumps about decodes no more than it asked for
    writer = ArrayRecordWriter(str(shard), "group_size:1,uncompressed")
    for record in _with_extras(job) if job.extras else _records(job):
        writer.write(record)
    writer.close()
    lengths = np.concatenate([_lengths(work, part, job.split)[first:last] for part, first, last in job.ranges])
    np.save(lengths_file, lengths)
    reader = ArrayRecordReader(str(shard))
    if reader.num_records() != len(lengths):
        raise OSError(f"{shard} could not be written whole: is the disk full?")
    reader.close()
    for path in (shard, lengths_file):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    return {
        "file": shard.name,
        "lengths": lengths_file.name,
        "documents": len(lengths),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "sha256": sha256(shard),
        "lengths_sha256": sha256(lengths_file),
    }
