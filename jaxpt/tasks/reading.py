"""Files of tasks: pairs of texts, with a score or without, one record per line."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxpt.data.files import DAMAGE, TABLES, Piece, format_of, list_inputs, open_piece
from jaxpt.data.text import Document, Problem, columns_of, read_piece


class Pairs(NamedTuple):
    """Pairs of texts."""

    first: list[str]
    second: list[str]
    scores: np.ndarray | None = None  # [N] f64, the higher the more alike


FIELDS = {2: ("source", "target"), 3: ("sentence1", "sentence2", "score")}  # of JSON lines
COLUMNS = {2: "--columns TEXT TEXT", 3: "--columns TEXT TEXT SCORE"}  # as they are asked for


def read_texts(file: str, field: str = "text") -> list[str]:
    """Return one text per line of a text file, per record of JSON lines or FASTA, or per row of a table or Parquet.

    Raises:
      ValueError: something is no text; a blank line is none, since vectors and lines would no longer agree.
    """
    (piece,) = _one_file(file)
    if piece.format == "text":
        texts = list(_lines(piece))
        for number, text in enumerate(texts, 1):
            if not text.strip():
                raise ValueError(f"{file}: line {number} is blank, and every line needs a text: take it out")
    else:
        texts = []
        for item in read_piece(piece, field):
            if not isinstance(item, Document):
                assert isinstance(item, Problem)  # of one field
                raise ValueError(f"{file}: {item}")
            texts.append(item.text)
    if not texts:
        raise ValueError(f"{file} holds no text")
    return texts


def read_pairs(files: Sequence[str], columns: Sequence[str] = ()) -> Pairs:
    """Return pairs of a source and a target: .tsv or .csv of two columns, JSON lines, or two line-aligned files.

    Args:
      files: several one after the other; two of lines are aligned.
      columns: names of the two texts, of a header line or of JSON fields; without them no line is a header.

    Raises:
      ValueError: a line is no pair.
    """
    kinds = {format_of(file) for file in files}
    if kinds == {"text"} and len(files) == 2:
        if columns:
            raise ValueError(f"{files[0]} and {files[1]} are line-aligned and have no columns: leave --columns out")
        sides = [list(_lines(_one_file(file)[0])) for file in files]
        if len(sides[0]) != len(sides[1]):
            raise ValueError(
                f"{files[0]} and {files[1]} are not aligned: {len(sides[0])} and {len(sides[1])} lines; line n of one "
                f"belongs to line n of the other"
            )
        records = [(f"line {number}", pair) for number, pair in enumerate(zip(*sides, strict=True), 1)]
        return Pairs(*_columns(records, f"{files[0]}, {files[1]}"))
    found = [Pairs(*_columns(list(_records(file, columns or None, 2)), file)) for file in files]
    return Pairs([text for each in found for text in each.first], [text for each in found for text in each.second])


def read_scored(files: Sequence[str], columns: Sequence[str] = ()) -> Pairs:
    """Return pairs with scores: .tsv, .csv or JSON lines; several files one after the other.

    Args:
      files: with three columns, of which the first or the last is the score, or the fields ``FIELDS[3]``.
      columns: names of the two texts and the score, of a header line or of JSON fields.

    Raises:
      ValueError: a line is no such pair.
    """
    first, second, scores = [], [], []
    for file in files:
        records = list(_records(file, columns or None, 3))
        if not records:
            raise ValueError(f"{file} holds no pair")
        if not columns and format_of(file) != "jsonl":
            records = _scores_last(records, file)
        for where, (_, _, score) in records:
            if _number(score) is None:
                raise ValueError(f"{file}: {where}: the score {score[:40]!r} is no number")
        one, two = _columns([(where, values[:2]) for where, values in records], file)
        first, second = first + one, second + two
        scores += [float(values[2]) for _, values in records]
    return Pairs(first, second, np.array(scores, np.float64))


def _scores_last(records: list[tuple[str, tuple[str, ...]]], file: str) -> list[tuple[str, tuple[str, ...]]]:
    """The records with their score at the end, without a header: it is first or last in all of them."""
    if _is_header(records[0][1]):
        print(f"{file}: {records[0][0]} is taken as a header: {' | '.join(records[0][1])[:120]}", file=sys.stderr)
        records = records[1:]
    if records and all(_number(values[2]) is not None for _, values in records):
        return records
    if records and all(_number(values[0]) is not None for _, values in records):
        return [(where, (*values[1:], values[0])) for where, values in records]
    shown = " | ".join(records[0][1])[:120] if records else "nothing but a header"
    raise ValueError(
        f"{file}: neither the first nor the last of the three columns is a number in every line, as in {shown!r}: "
        f"of a file with a header, name the columns: --columns TEXT TEXT SCORE"
    )


def _is_header(values: Sequence[str]) -> bool:
    """Whether these are names: none is blank, and where a score could be there is none, nor "nan"."""
    ends = (values[0].strip().lower(), values[2].strip().lower())
    return all(value.strip() for value in values) and all(
        _number(end) is None and end not in ("nan", "inf", "-inf") for end in ends
    )


def _number(value: str) -> float | None:
    try:
        found = float(value)
    except ValueError:
        return None
    return found if np.isfinite(found) else None


def _columns(records: Sequence[tuple[str, Sequence[str]]], file: str) -> tuple[list[str], list[str]]:
    if not records:
        raise ValueError(f"{file} holds no pair")
    for where, values in records:
        if not all(value.strip() for value in values):
            raise ValueError(f"{file}: {where}: a text is empty")
    return [values[0] for _, values in records], [values[1] for _, values in records]


# ----------------------------------------------------------------------------------------------- records


def _one_file(file: str) -> list[Piece]:
    pieces = list_inputs((file,), flag="the file")
    if len(pieces) != 1:
        raise ValueError(f"{file} names {len(pieces)} files: name one")
    return pieces


def _lines(piece: Piece) -> Iterator[str]:
    number = 0
    try:
        with open_piece(piece, lambda n: None) as stream:
            for number, line in enumerate(stream, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"{piece.name}: line {number} is not UTF-8: {error.reason}") from None
    except DAMAGE as error:
        raise ValueError(f"{piece.name}: damaged behind line {number}: {error}") from None


def _records(file: str, columns: Sequence[str] | None, count: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Where each record stands, and its values as text."""
    kind, (piece,) = format_of(file), _one_file(file)
    if kind == "jsonl":
        for number, line in enumerate(_lines(piece), 1):
            if line.strip():
                yield f"line {number}", _of_json(line, columns or FIELDS[count], f"{file}: line {number}")
        return
    if kind not in TABLES:
        raise ValueError(f"{file}: what it holds is told by its name: .tsv, .csv or .jsonl (and .gz, .xz, .bz2, .zst)")
    wanted: list[int] | None = None
    try:
        for where, values in columns_of((line + "\n" for line in _lines(piece)), kind):
            if not any(value.strip() for value in values):
                continue
            if columns and wanted is None:
                missing = [name for name in columns if name not in values]
                if missing:
                    known = ", ".join(values)
                    raise ValueError(
                        f"{file}: its first line has no column {missing[0]!r}: it has {known}{_tabs(kind, values)}"
                    )
                wanted = [values.index(name) for name in columns]
                continue
            if len(values) != count if wanted is None else len(values) <= max(wanted):
                asked = count if wanted is None else f"at least {max(wanted) + 1}"
                hint = f"; name those of its header: {COLUMNS[count]}" if wanted is None else ""
                raise ValueError(f"{file}: {where} has {len(values)} columns, not {asked}{_tabs(kind, values) or hint}")
            yield where, tuple(values if wanted is None else (values[place] for place in wanted))
    except csv.Error as error:
        raise ValueError(f"{file} is not CSV: {error}") from None


def _tabs(kind: str, values: Sequence[str]) -> str:
    """A hint, where what is called .csv holds tabs."""
    return "; is it separated by tabs? Call it .tsv" if kind == "csv" and any("\t" in each for each in values) else ""


def _of_json(line: str, fields: Sequence[str], where: str) -> tuple[str, ...]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    there = record if isinstance(record, dict) else {}
    missing = [name for name in fields if not isinstance(there.get(name), str | int | float)]
    if missing:
        known = ", ".join(there) or "no field"
        raise ValueError(f"{where}: no text or number in {missing[0]!r}; there is {known}")
    return tuple(str(there[name]) for name in fields)
