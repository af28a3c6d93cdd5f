"""Readers: from files of many formats to documents, naming what cannot be read.

A piece is read in one pass and in bounded memory, and yields documents and problems in the order of the file.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import product, zip_longest
from typing import IO, Any, NamedTuple

from etils import epath

from jaxpt.data.files import DAMAGE, TABLES, Format, Piece, Unit, open_piece
from jaxpt.data.sentences import Document, Texts, join_sentences

LONGEST = 64 << 20  # bytes of a document read from a text file; a longer file is cut at line ends
LONGEST_COLUMN = 2**31 - 1  # characters, of .csv; Python's own limit is 131072


class Problem(NamedTuple):
    """Something that was skipped: where in the file, the kind of problem (counted) and what exactly."""

    where: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


class Fields(NamedTuple):
    """Where the texts of an example are.

    Args:
      names: the field of each text.
      each: a list in a field is alternatives, of which every one makes an example; else it is the sentences of a text.
      negatives: K, how many texts are taken of the last field, which may be a list of any number.
    """

    names: tuple[str, ...]
    each: bool = False
    negatives: int = 0


Item = Document | Texts | Problem
Field = str | Fields  # of a document, or of the texts of an example


def read_piece(
    piece: Piece, field: Field = "text", unit: Unit = "file", progress: Callable[[int], Any] = lambda n: None
) -> Iterator[Item]:
    """Read the documents of a piece.

    Args:
      piece: what to read.
      field: the field of JSON lines, or the column of a table or of Parquet; dots descend ("meta.body"). A
        list of strings is taken as the sentences of the document. ``Fields`` are the texts of examples.
      unit: what a document of a plain text file is.
      progress: told the number of stored bytes as they are read.

    Raises:
      ValueError: line-aligned files have different numbers of lines.
    """
    found = piece.start > 0
    try:
        if piece.format == "parquet":
            items = _read_parquet(piece, field, progress)
        elif piece.beside:
            items = _read_aligned(piece, progress)
        else:
            items = _read_stream(piece, field, unit, progress)
        for item in items:
            found = True
            yield item
        if not found:
            yield Problem("file", "empty file")
    except PermissionError as error:
        yield Problem("file", "not readable", str(error))


def _read_stream(piece: Piece, field: Field, unit: Unit, progress: Callable[[int], Any]) -> Iterator[Item]:
    with open_piece(piece, progress) as stream:
        if piece.format == "text" and unit == "file":
            yield from _read_files(stream)
        elif piece.format in TABLES:
            yield from _read_table(stream, piece, field)
        else:
            yield from _read_lines(stream, piece, field, unit)


def _read_files(stream: IO[bytes]) -> Iterator[Document | Problem]:
    """The file as one document, or several where it is longer than LONGEST."""
    position, rest = 0, b""
    while True:
        try:
            block = rest + stream.read(LONGEST - len(rest))
            more = stream.read(1)
        except DAMAGE as error:
            yield Problem(f"after byte {position}", "truncated or damaged archive", str(error))
            return
        cut = len(block)
        if more:
            cut = block.rfind(b"\n") + 1
            if not cut:  # before the last character, which may be incomplete
                cut = len(block) - 1
                while cut > 1 and block[cut] & 0xC0 == 0x80:
                    cut -= 1
        yield _plain(block[:cut], position, f"byte {position}" if position else "file", bom=position == 0)
        if not more:
            return
        position += cut
        rest = block[cut:] + more


def _plain(data: bytes, position: int, where: str, bom: bool) -> Document | Problem:
    """A document from bytes that begin at `position`, or what is wrong with them."""
    try:
        text = data.decode("utf-8-sig" if bom else "utf-8")
    except UnicodeDecodeError as error:
        utf16 = bom and data[:2] in (b"\xff\xfe", b"\xfe\xff")
        detail = f"0x{data[error.start]:02x} at byte {position + error.start}"
        return Problem(where, "not UTF-8", "this looks like UTF-16" if utf16 else detail)
    return check(Document(text.replace("\r\n", "\n")), where)


def check(document: Document, where: str) -> Document | Problem:
    """The document, unless it is empty or holds what UTF-8 cannot."""
    if not document.text or document.text.isspace():
        return Problem(where, "empty document")
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        return Problem(where, "not Unicode text", f"a lone surrogate at character {error.start}")
    return document


# ------------------------------------------------- lines: JSON lines, tables, FASTA, paragraphs, lines


def _read_lines(stream: IO[bytes], piece: Piece, field: Field, unit: Unit) -> Iterator[Item]:
    """Line by line; only a newline ends a line (JSON records may hold U+2028)."""
    kind = unit if piece.format == "text" else piece.format
    begins = {"fasta": lambda line: line.startswith(b">"), "paragraph": lambda line: not line.strip()}.get(
        kind, lambda line: True
    )
    last = ["the start"]

    def lines() -> Iterator[tuple[str, int, bytes]]:
        for number, position, line in _numbered(stream, piece, begins):
            last[0] = f"line {number}" if number else f"byte {position}"
            yield last[0], position, line

    try:
        if kind in ("fasta", "paragraph"):
            yield from _blocks(lines(), kind == "fasta")
            return
        for where, position, line in lines():
            if kind == "jsonl":
                if line.strip():
                    yield from _json_documents(line, position, where, field)
            elif line.strip():
                yield _plain(line.removesuffix(b"\n").removesuffix(b"\r"), position, where, bom=position == 0)
    except DAMAGE as error:
        yield Problem(f"after {last[0]}", "truncated or damaged archive", str(error))


def _numbered(
    stream: IO[bytes], piece: Piece, begins: Callable[[bytes], bool]
) -> Iterator[tuple[int | None, int, bytes]]:
    """(line number, byte position, line); numbers only where the file is read from its start.

    A piece owns what begins at the first line at or after its start that `begins` a record, up to the first such
    line at or after its end. Both neighbours apply the same rule, so nothing is lost or read twice.
    """
    position, number = 0, 0 if piece.start == 0 else None
    inside = piece.start == 0
    if piece.start:
        stream.seek(piece.start - 1)
        position = piece.start - 1 + len(stream.readline())
    while line := stream.readline():
        if number is not None:
            number += 1
        if piece.end is not None and position >= piece.end and begins(line):
            return
        inside = inside or begins(line)
        if inside:
            yield number, position, line
        position += len(line)


def _blocks(lines: Iterator[tuple[str, int, bytes]], fasta: bool) -> Iterator[Document | Problem]:
    """FASTA records or paragraphs."""
    where, start, block = "", 0, []
    name = b""

    def finish() -> Iterator[Document | Problem]:
        if fasta and name:
            data = b"".join(b"".join(line.split()) for line in block)
            yield _plain(data, start, f"{where} {name.decode('utf-8', 'replace')}", bom=False)
        elif not fasta and block:
            yield _plain(b"".join(block).rstrip(b"\r\n"), start, where, bom=start == 0)
        elif any(line.strip() for line in block):
            yield Problem(where, "no FASTA header before the sequence")

    for at, position, line in lines:
        if line.startswith(b">") if fasta else not line.strip():
            yield from finish()
            where, start, block = at, position, []
            name = line.split(maxsplit=1)[0][:80] if fasta else b""
        elif not (fasta and line.startswith(b";")):
            if not block and not name:
                where, start = at, position
            block.append(line)
    yield from finish()


def columns_of(lines: Iterable[str], format: Format) -> Iterator[tuple[str, list[str]]]:
    """Yield where each row of a table ends, and its columns.

    Args:
      lines: with their ends.
      format: "csv", where a quoted column may hold line ends, or "tsv", where quotes mean nothing.

    Raises:
      csv.Error: what cannot be CSV, as a quote that is never closed.

    >>> list(columns_of(['one,"two, three"'], "csv"))
    [('line 1', ['one', 'two, three'])]
    """
    if format == "tsv":
        for number, line in enumerate(lines, 1):
            yield f"line {number}", line.removesuffix("\n").removesuffix("\r").split("\t")
        return
    csv.field_size_limit(LONGEST_COLUMN)
    reader = csv.reader(lines, strict=True)  # else a quote that is never closed swallows the rest without a word
    for values in reader:
        yield f"line {reader.line_num}", values


def _read_table(stream: IO[bytes], piece: Piece, field: Field) -> Iterator[Item]:
    """The rows below a line of names."""
    # what is not UTF-8 becomes what ``check`` refuses, with its row
    lines = (line.decode("utf-8" if n else "utf-8-sig", "surrogateescape") for n, line in enumerate(stream))
    names: list[str] = []
    where, below = "the start", False
    try:
        for where, values in columns_of(lines, piece.format):
            if not any(value.strip() for value in values):
                continue
            if not names:
                names = values
                continue
            below = True
            if len(values) == len(names):
                yield from _from_record(dict(zip(names, values, strict=True)), field, where)
            else:
                told = f"{len(values)}, and the first line names {len(names)}"
                yield Problem(where, "another number of columns", told)
        if names and not below:
            yield Problem(where, "no row below the names of the columns", ", ".join(names))
    except csv.Error as error:
        yield Problem(f"after {where}", "not CSV, nothing more is read", str(error))
    except DAMAGE as error:
        yield Problem(f"after {where}", "truncated or damaged archive", str(error))


def _json_documents(line: bytes, position: int, where: str, field: Field) -> list[Item]:
    try:
        record = json.loads(line.decode("utf-8-sig" if position == 0 else "utf-8"))
    except UnicodeDecodeError as error:
        return [Problem(where, "not UTF-8", f"0x{line[error.start]:02x} at byte {position + error.start}")]
    except (ValueError, RecursionError) as error:
        return [Problem(where, "not JSON", str(error))]
    return _from_record(record, field, where)


def _from_record(record: Any, field: Field, where: str) -> list[Item]:
    """The document in a record's field, as a string or a list of sentences; or the examples in several fields."""
    if isinstance(field, str):
        return [_document_of(record, field, where)]
    last = len(field.names) - 1
    sides = [
        _texts_of(record, name, where)
        if field.each or (field.negatives and number == last)
        else [_document_of(record, name, where)]
        for number, name in enumerate(field.names)
    ]
    problem = next((item for side in sides for item in side if isinstance(item, Problem)), None)
    if problem:
        return [problem]
    texts = [[item.text for item in side if isinstance(item, Document)] for side in sides]
    return list(_examples(texts, field, where))


def _examples(texts: list[list[str]], field: Fields, where: str) -> Iterator[Texts | Problem]:
    """An example for every combination of alternatives; they take turns in the hard negatives, if there are some."""
    negatives = texts.pop() if field.negatives else []
    if not all(texts):
        name = field.names[[bool(side) for side in texts].index(False)]
        yield Problem(where, f"field {name!r} is not text", "it is an empty list")
        return
    for number, example in enumerate(product(*texts)):
        taken = min(field.negatives, len(negatives))
        own = (negatives[(number * field.negatives + each) % len(negatives)] for each in range(taken))
        # examples of one anchor stay on one side of the split
        yield Texts((*example, *own), where, example[0] if field.each else None)


def _texts_of(record: Any, name: str, where: str) -> list[Document | Problem]:
    """Every text of a field: one, a list, or none at all (null)."""
    value = _value_of(record, name, where)
    if isinstance(value, Problem):
        return [value]
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [_as_document(each, name, where) for each in values]


def _together(items: list[Document | Problem], where: str) -> Texts | Problem:
    """The texts of one example, or the first thing that is wrong with one of them."""
    documents = [item for item in items if isinstance(item, Document)]
    if len(documents) == len(items):
        return Texts(tuple(document.text for document in documents), where)
    return next(item for item in items if isinstance(item, Problem))


def _document_of(record: Any, field: str, where: str) -> Document | Problem:
    value = _value_of(record, field, where)
    return value if isinstance(value, Problem) else _as_document(value, field, where)


def _value_of(record: Any, field: str, where: str) -> Any:
    """What a record has in a field, or the problem that there is none."""
    value = record
    if isinstance(record, dict) and field in record:
        value = record[field]
    else:
        for key in field.split("."):
            if not isinstance(value, dict) or key not in value:
                known = ", ".join(map(repr, record)) if isinstance(record, dict) else f"a {type(record).__name__}"
                return Problem(
                    where, f"no field {field!r}", f"there is {known[:200]}; choose with --field (or --fields)"
                )
            value = value[key]
    return value


def _as_document(value: Any, field: str, where: str) -> Document | Problem:
    if isinstance(value, bytes):
        return _plain(value, 0, where, bom=False)
    if isinstance(value, str):
        return check(Document(value), where)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return check(join_sentences(value), where)
    return Problem(where, f"field {field!r} is not text", f"it is a {type(value).__name__}")


# ------------------------------------------------------------------------------------------- aligned files


def _read_aligned(piece: Piece, progress: Callable[[int], Any]) -> Iterator[Texts | Problem]:
    """The lines of several files, those of one number together."""
    paths = (piece.path, *piece.beside)
    number = 0
    with ExitStack() as stack:
        streams = [stack.enter_context(open_piece(piece._replace(path=path, name=path), progress)) for path in paths]
        try:
            for number, lines in enumerate(zip_longest(*streams), 1):
                if None in lines:
                    ended = ", ".join(path for path, line in zip(paths, lines, strict=True) if line is None)
                    raise ValueError(
                        f"{' and '.join(paths)} are not aligned: line {number} is behind the end of {ended}; they must "
                        f"have as many lines"
                    )
                bare = [line.removesuffix(b"\n").removesuffix(b"\r") for line in lines]
                where = f"line {number}"
                yield _together([_plain(line, 0, where, bom=number == 1) for line in bare], where)
        except DAMAGE as error:
            yield Problem(f"after line {number}", "truncated or damaged archive", str(error))


# ------------------------------------------------------------------------------------------- Parquet


def _read_parquet(piece: Piece, field: Field, progress: Callable[[int], Any]) -> Iterator[Item]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = "file"
    try:
        with epath.Path(piece.path).open("rb") as raw:
            file = pq.ParquetFile(raw)
            names = file.schema_arrow.names
            wanted = (field,) if isinstance(field, str) else field.names
            columns = [name if name in names else name.split(".")[0] for name in wanted]
            missing = [name for name, column in zip(wanted, columns, strict=True) if column not in names]
            if missing:
                there = f"there is {', '.join(names)}; choose with --field (or --fields)"
                yield Problem("file", f"no field {missing[0]!r}", there)
                return
            end = file.num_row_groups if piece.end is None else piece.end
            row = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
            for group in range(piece.start, end):
                for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=columns):
                    for record in batch.to_pylist():
                        row += 1
                        where = f"row {row}"
                        yield from _from_record(record, field, where)
                progress(piece.size // max(file.num_row_groups, 1))
    except (pa.ArrowException, OSError) as error:
        yield Problem(f"after {where}", "truncated or damaged Parquet file", str(error).splitlines()[0])
