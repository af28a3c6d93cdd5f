"""Input files: which there are, which format they have, how they are cut into pieces and decompressed."""

from __future__ import annotations

import bz2
import fnmatch
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import zstandard
from etils import epath

Format = Literal["auto", "text", "jsonl", "csv", "tsv", "parquet", "fasta"]  # "auto" goes by the file's name
Unit = Literal["file", "paragraph", "line"]

DAMAGE = (EOFError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError)  # what a broken archive raises
_COMPRESSED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": None}
_FORMATS: dict[str, Format] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".fasta", ".fa", ".faa", ".fna"), "fasta"),
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}

TABLES = ("csv", "tsv")  # whose first line names the columns


class Piece(NamedTuple):
    """A file, or the part of it that begins in [start, end): bytes, or row groups of a Parquet file."""

    path: str
    name: str  # how the manifest calls it
    format: Format
    size: int  # bytes of the whole file
    modified: int = 0  # seconds since 1970
    start: int = 0
    end: int | None = None
    beside: tuple[str, ...] = ()  # files whose line n belongs to line n of this one


def list_aligned(inputs: tuple[str, ...]) -> tuple[list[Piece], list[Piece]]:
    """Line-aligned files: one piece for the files of each set, and all files by themselves.

    Args:
      inputs: a file for each text of an example, or patterns that name as many files each, paired in their order.

    Raises:
      ValueError: a file does not exist, or patterns name different numbers of files.
    """
    sides = [list_inputs((given,), "text", flag="--aligned") for given in inputs]
    if len({len(side) for side in sides}) > 1:
        counts = ", ".join(f"{given}: {len(side)}" for given, side in zip(inputs, sides, strict=True))
        raise ValueError(
            f"--aligned pairs the files of each pattern in their order, but they are not as many ({counts})"
        )
    sets = [
        first._replace(size=sum(p.size for p in (first, *rest)), beside=tuple(p.path for p in rest))
        for first, *rest in zip(*sides, strict=True)
    ]
    return sets, [piece for side in sides for piece in side]


def list_inputs(
    inputs: tuple[str, ...], format: Format = "auto", include: tuple[str, ...] = (), flag: str = "--input"
) -> list[Piece]:
    """Every file under `inputs`, in a fixed order; directories are read recursively, without hidden files.

    Args:
      inputs: files, directories or patterns such as `shards/*.jsonl.gz`; local or of an object store.
      format: the format of all files, or "auto" to go by their names.
      include: patterns for names of files in directories, for example `*.py`; none takes every file.
      flag: the option that names them, for messages.

    Raises:
      ValueError: an input does not exist or holds no file.
    """
    pieces: dict[str, Piece] = {}
    for given in inputs:
        root = epath.Path(given)
        if root.is_dir():
            found = [p for p in _walk(root) if not include or any(fnmatch.fnmatch(p.name, i) for i in include)]
        elif root.exists():
            found = [root]
        else:
            found = sorted((p for p in root.parent.glob(root.name) if p.is_file()), key=os.fspath)
        if not found:
            wanted = f" that matches {' or '.join(include)}" if include and root.is_dir() else ""
            raise ValueError(f"{flag} {given}: there is no such file, or no file{wanted} in it")
        for path in found:
            name = os.fspath(path)
            kind = format_of(name) if format == "auto" else format
            stat = path.stat()
            pieces.setdefault(name, Piece(name, name, kind, stat.length, int(stat.mtime or 0)))
    return list(pieces.values())


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    """The files below a folder, without hidden ones; links to folders are not followed, they may go in circles."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
        elif not os.path.islink(path):  # noqa: PTH114  of an object store nothing is
            yield from _walk(path)


def format_of(name: str) -> Format:
    """The format that a file name stands for; what is not known is plain text.

    >>> format_of("c4.00000-of-01024.json.gz"), format_of("proteins.fa"), format_of("README")
    ('jsonl', 'fasta', 'text')
    """
    path = Path(name.lower())
    return _FORMATS.get(Path(path.stem).suffix if compressed(name) else path.suffix, "text")


def split_piece(piece: Piece, unit: Unit, size: int) -> list[Piece]:
    """Cut a large file into pieces of about `size` bytes, where its format allows to begin in the middle."""
    if piece.format == "parquet":
        return _split_parquet(piece, size)
    whole = bool(piece.beside) or piece.format in TABLES or (piece.format == "text" and unit == "file")
    if whole or compressed(piece.name) or piece.size < 2 * size:
        return [piece]
    starts = list(range(0, piece.size - size // 2, size))
    return [piece._replace(start=start, end=end) for start, end in zip(starts, [*starts[1:], piece.size], strict=True)]


def _split_parquet(piece: Piece, size: int) -> list[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with epath.Path(piece.path).open("rb") as file:
            groups = pq.ParquetFile(file).num_row_groups
    except (pa.ArrowException, OSError):
        return [piece]  # reading it will name the damage
    step = max(1, -(-groups * size // max(piece.size, 1)))
    return [piece._replace(start=a, end=min(a + step, groups)) for a in range(0, groups, step)] or [piece]


def compressed(name: str) -> bool:
    """Whether a file name says that the file is compressed."""
    return Path(name.lower()).suffix in _COMPRESSED


def open_piece(piece: Piece, progress: Callable[[int], Any]) -> IO[bytes]:
    """The decompressed bytes of a piece's file; `progress` is told the number of stored bytes as they are read."""
    return _decompress(_Counted(epath.Path(piece.path).open("rb"), progress), piece.name)


class _Counted(io.RawIOBase):
    """A file that tells how many bytes were read from it."""

    def __init__(self, file: IO[bytes], progress: Callable[[int], Any]):
        self._file = file
        self._progress = progress

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._progress(len(data))
        return len(data)


class _Zstandard(io.RawIOBase):
    """Zstandard frames, one after another; unlike the library's own reader it notices a truncated one."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._frame: Any = None
        self._input = b""
        self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input:
                self._input = self._file.read(1 << 16)
                if not self._input:
                    if self._frame is not None:
                        raise EOFError("the file ends inside a Zstandard frame")
                    return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._output = self._frame.decompress(self._input)
            self._input = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        piece, self._output = self._output[: len(buffer)], self._output[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)


def _decompress(file: io.RawIOBase, name: str) -> IO[bytes]:
    suffix = Path(name.lower()).suffix
    buffered: Any = io.BufferedReader(file, 1 << 18)
    if suffix == ".zst":
        return io.BufferedReader(_Zstandard(buffered), 1 << 18)
    opener = _COMPRESSED.get(suffix)
    return opener(buffered, "rb") if opener else buffered  # type: ignore[return-value]
