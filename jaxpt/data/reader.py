"""Reading rows: addresses become batches of packed tokens, ahead of the step and in the background."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import grain
import numpy as np

from jaxpt.data.manifest import Manifest
from jaxpt.data.order import Address, Stream
from jaxpt.data.packing import cut_piece, fill_rows
from jaxpt.data.shards import Documents
from jaxpt.types import Batch, RowSpec

DOCUMENT_IDS = "document_ids"  # a field that all data have: equal for the pieces of one document
PREFETCHED = 8  # batches that wait in memory for the step


class SourceReader:
    """Rows of one kind of one source of one phase: the documents and the order of the rows.

    Args:
      source: its place among the sources of the phase.
      documents: of the source.
      rows: how documents become rows, of one kind.
      length: tokens of a row.
      key: two numbers below 2**64 that name the order; None for the documents' own.
    """

    def __init__(self, source: int, documents: Documents, rows: RowSpec, length: int, key: tuple[int, int] | None):
        self.source, self.documents, self.length = source, documents, length
        self.fields = rows.fields
        self.prefix, self.suffix = np.array(rows.prefix, np.int32), np.array(rows.suffix, np.int32)
        added = len(rows.prefix) + len(rows.suffix)

        def lengths(start: int, stop: int) -> np.ndarray:
            found = self.documents.lengths(start, stop)
            return np.where(found > 0, found + added, 0)

        self.stream = Stream(len(self.documents), lengths, rows.packing, self.length, key)
        # of a stream, another pass is another text: a memory must not see it as the same document going on
        self.phase = (key[1] >> 32) + 1 if rows.packing == "stream" and key else 0


def open_readers(
    manifests: Sequence[Manifest], split: str, rows: RowSpec, length: int, key: tuple[int, int] | None
) -> list[SourceReader]:
    """Open the sources of a phase: one reader per kind of rows and source, all sources of the first kind first.

    Args:
      manifests: of the sources.
      split: "train" or "validation".
      rows: how documents become rows.
      length: the model's tokens per row.
      key: two numbers that name the random streams of the phase, the second a multiple of 2**32 below 2**48; None
        for the documents' own order.

    Raises:
      ValueError: there is no room for text in a row, or nothing to read in a source.
    """
    lengths = [kind.tokens(length) for kind in rows.each_kind()]
    if min(lengths) < 1:
        raise ValueError(
            f"a row of length {length} keeps {min(lengths)} tokens of text, since the objective reserves the rest: "
            f"raise the sequence length"
        )
    added = len(rows.prefix) + len(rows.suffix)
    for manifest in manifests if rows.texts else ():
        if manifest.texts["longest"] + added > min(lengths):
            raise ValueError(
                f"the longest example of {manifest.path} has {manifest.texts['longest']} tokens, and a row holds "
                f"{min(lengths) - added} of them: build the data again with --text-tokens, which leaves out or cuts "
                f"what is too long, or raise the sequence length"
            )
    stored = [name for name in rows.fields if name != DOCUMENT_IDS]
    documents = [Documents(manifest, split, keep_above=min(lengths), fields=stored) for manifest in manifests]
    return [
        SourceReader(k, found, spec, tokens, key and (key[0], kind << 48 | key[1] | k))
        for kind, (spec, tokens) in enumerate(zip(rows.each_kind(), lengths, strict=True))
        for k, found in enumerate(documents)
    ]


def read_batch(
    readers: Sequence[SourceReader], wanted: Sequence[tuple[int, Address] | None], row_ids: np.ndarray, pad: int
) -> Batch:
    """Read and lay out some rows: `wanted` says the reader and the address of each, None for a filler row."""
    pieces: list[Any] = [()] * len(wanted)  # by row: its pieces
    owners: list[Any] = [()] * len(wanted)  # by row: the documents that they are of
    by_block = sorted((k, address.epoch, address.block, r, address.row) for r, (k, address) in _present(wanted))
    for k, of_source in groupby(by_block, key=lambda item: item[0]):
        reader = readers[k]
        cuts = []  # (row of the batch, epoch, pieces: document, start, size)
        for (_, epoch, block), rows in groupby(of_source, key=lambda item: item[:3]):
            plan, first = reader.stream.plan(epoch, block), block * reader.stream.block_size
            for _, _, _, r, row in rows:
                of_row = slice(plan.row_starts[row], plan.row_starts[row + 1])
                documents = (first + plan.documents[of_row].astype(np.int64)).tolist()
                starts, sizes = plan.starts[of_row].tolist(), plan.lengths[of_row].tolist()
                cuts.append((r, epoch, list(zip(documents, starts, sizes, strict=True))))
        indices = sorted({document for *_, cut in cuts for document, _, _ in cut})
        texts = dict(zip(indices, reader.documents.read(indices), strict=True))
        for r, epoch, cut in cuts:
            passed = (epoch + reader.phase) * 0x9E3779B1 if reader.phase else 0
            owners[r] = [reader.source << 28 ^ d ^ passed for d, _, _ in cut]
            pieces[r] = [cut_piece(texts[d], start, size, reader.prefix, reader.suffix) for d, start, size in cut]
    row_P = np.repeat(np.arange(len(wanted)), [len(of_row) for of_row in pieces])
    flat = [piece for of_row in pieces for piece in of_row]
    fields = readers[0].fields
    dtypes = {name: readers[0].documents.dtypes[name] for name in fields if name != DOCUMENT_IDS}
    width = max(reader.length for reader in readers)
    tokens, segment_ids, positions, sentence_ids, *values = fill_rows(
        len(wanted), width, pad, row_P, flat, list(dtypes.values())
    )
    extras: dict[str, Any] = {
        name: value if value.dtype == bool else value.astype(np.float32) / 255
        for name, value in zip(dtypes, values, strict=True)
    }
    if DOCUMENT_IDS in fields:
        table = np.array([document for of_row in owners for document in of_row] or [0], np.int64)
        first = np.searchsorted(row_P, np.arange(len(wanted)))[:, None]
        index = np.minimum(first + np.maximum(segment_ids - 1, 0), len(table) - 1)
        extras[DOCUMENT_IDS] = np.where(segment_ids > 0, table[index] & 0x7FFFFFFF, -1).astype(np.int32)
    arrays: dict[str, Any] = {
        "tokens": tokens,
        "segment_ids": segment_ids,
        "positions": positions,
        "sentence_ids": sentence_ids,
        "row_ids": row_ids,
        "source_ids": np.array([0 if item is None else readers[item[0]].source for item in wanted], np.int32),
        "valid": np.array([item is not None for item in wanted], np.float32),
    }
    return Batch(**arrays, extras=extras)


def _present(wanted: Sequence[tuple[int, Address] | None]) -> Iterator[tuple[int, tuple[int, Address]]]:
    return ((r, item) for r, item in enumerate(wanted) if item is not None)


class _Steps:
    """Steps as the records of a Grain data source: item i is the batch of step `start` + i."""

    def __init__(self, read: Callable[[int], Batch], start: int, stop: int | None):
        self._read, self._start = read, start
        self._length = (1 << 62) if stop is None else max(stop - start, 0)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        return self._read(self._start + int(index))


def read_ahead(read: Callable[[int], Batch], start: int, stop: int | None) -> Iterator[Batch]:
    """One background thread, since the work is Python's; a few batches wait, so that a step does not."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED)
    iterator = iter(grain.MapDataset.source(_Steps(read, start, stop)).to_iter_dataset(options))

    def generate() -> Iterator[Batch]:
        try:
            yield from iterator
        finally:
            iterator.close()

    return generate()
