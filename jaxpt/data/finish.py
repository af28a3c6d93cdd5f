"""The end of a build: shards from the encoded parts, and everything that the manifest names; or its tokenizer alone."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from jaxpt.data import parts
from jaxpt.data.corpus import versions
from jaxpt.data.files import Piece
from jaxpt.data.jobs import run
from jaxpt.data.manifest import Manifest, Shard, Split, is_local, write_atomically
from jaxpt.data.tokenizer import Tokenizer
from jaxpt.types import Vocab

KEY = "build.json"  # what a build was made from
_HASHES = 1 << 26  # hashes that are sorted at once to count duplicates


def part_arrays(work: Path, count: int, name: str) -> Iterator[np.ndarray]:
    """An array of each part, one after the other."""
    for part in range(count):
        with np.load(work / f"part-{part:05d}.npz") as arrays:
            yield arrays[name]


def write_shards(
    out: epath.Path,
    work: Path,
    token_dtype: str,
    extras: dict[str, str],
    count: int,
    limits: tuple[int, int],
    workers: int,
) -> dict[str, tuple[Shard, ...]]:
    """Write the documents of `count` parts into shards, at their place; the shards of each split.

    Args:
      out: the folder of the build.
      work: the folder of its parts.
      token_dtype: of the documents.
      extras: name -> dtype of the further values per token.
      count: the number of parts.
      limits: the bytes and the documents of a shard, at most.
      workers: processes.
    """
    jobs = parts.plan_shards(count, work, token_dtype, extras, *limits)
    total = sum(parts.part_file(work, i, split).stat().st_size for i in range(count) for split in parts.SPLITS)
    records = run("writing shards", parts.write_shard, jobs, workers, total)
    shards: dict[str, list[Shard]] = {split: [] for split in parts.SPLITS}
    for job, record in zip(jobs, records, strict=True):
        for name in (record["file"], record["lengths"]):
            if is_local(out):
                (work / name).replace(Path(out) / name)
            else:
                (out / name).write_bytes((work / name).read_bytes())
                (work / name).unlink()
        shards[job.split].append(Shard(**record))
    return {split: tuple(found) for split, found in shards.items()}


def write_rest(
    out: epath.Path,
    work: Path,
    tokenizer: Tokenizer,
    splits: dict[str, Split],
    problems: dict[str, Any],
    sources: Sequence[Piece],
    digests: dict[str, str],
    count: int,
    extras: dict[str, str],
    texts: dict[str, int],
) -> Manifest:
    """Write everything but manifest.json itself.

    Args:
      out: the folder of the build.
      work: the folder of its parts.
      tokenizer: the tokenizer.
      splits: totals and shards.
      problems: what was skipped.
      sources: the input files.
      digests: SHA-256 of the input files, by name.
      count: the number of parts.
      extras: further values per token that the shards have.
      texts: of a build of pairs.

    Returns:
      The manifest, to be saved.
    """

    def write(name: str, data: bytes) -> dict[str, str]:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out / name, data)
        return {"file": name, "sha256": hashlib.sha256(data).hexdigest()}

    inputs = [{"name": p.name, "bytes": p.size, "sha256": digests.get(p.name)} for p in sources]
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in inputs)
    key = json.loads((work / KEY).read_text())
    write(KEY, json.dumps(key, indent=1).encode())
    return Manifest(
        path=out,
        tokenizer={
            "kind": tokenizer.kind,
            **write(f"tokenizer/{tokenizer.file_name}", tokenizer.data),
            **tokenizer.options,
        },
        vocab=tokenizer.vocab,
        token_dtype=parts.token_dtype(tokenizer),
        splits=splits,
        unigram=write("unigram.npy", _npy(np.sum(list(part_arrays(work, count, "unigram")), axis=0))),
        vocab_arrays=write(
            "vocab.npz",
            _npz(is_special=tokenizer.is_special, starts_word=tokenizer.starts_word, token_bytes=tokenizer.token_bytes),
        ),
        extras=extras,
        texts=texts,
        provenance={
            "settings": {name: value for name, value in key.items() if name != "files"},
            "versions": _versions(),
            "inputs": {
                "files": len(inputs),
                "bytes": sum(p.size for p in sources),
                **write("inputs.jsonl", lines.encode()),
            },
            "duplicates": _duplicates(work, count),
        },
        skipped=problems,
    )


def keep_vocab(manifest: Manifest, vocab: Vocab, folder: str | os.PathLike[str]) -> None:
    """Write a build that has a tokenizer and no documents: what it takes to use a model without its data.

    Args:
      manifest: of a build with the tokenizer.
      vocab: of the model, whose unigram counts may be those of several builds.
      folder: where.
    """
    out = epath.Path(os.fspath(folder))
    for name in (manifest.tokenizer["file"], manifest.vocab_arrays["file"]):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out / name, (manifest.path / name).read_bytes())
    counts = _npy(vocab.unigram_counts)
    unigram = {"file": manifest.unigram["file"], "sha256": hashlib.sha256(counts).hexdigest()}
    write_atomically(out / unigram["file"], counts)
    nothing: dict[str, Any] = {name: {} for name in ("splits", "extras", "texts", "provenance", "skipped")}
    dataclasses.replace(manifest, path=out, unigram=unigram, **nothing).save()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _versions() -> dict[str, str]:
    found = versions()
    for package in ("jaxpt", "sentencepiece", "tokenizers", "array-record", "pyarrow"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _duplicates(work: Path, count: int) -> int:
    """How many documents equal an earlier one; the hashes are sorted a range at a time."""
    total = sum(len(hashes) for hashes in part_arrays(work, count, "hashes"))
    bits = max(0, (total // _HASHES).bit_length())
    unique = 0
    for bucket in range(1 << bits):
        chosen = [h[h >> np.uint64(64 - bits) == bucket] if bits else h for h in part_arrays(work, count, "hashes")]
        unique += len(np.unique(np.concatenate(chosen)))
    return total - unique
