"""The documents of one split of a data build, read by index from shards that are verified when first opened."""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from etils import epath

from jaxpt.data.manifest import Manifest, check_digest, decode_document, is_local, sha256

Document = tuple[np.ndarray, ...]  # tokens [n], sentence ids [n], and the extras that are read, [n] each

OPEN_DOCUMENTS = 1 << 19  # an open shard costs about 40 bytes of index per document, so only recent ones stay open
OPEN_SHARDS = 8
KEPT_BYTES = 1 << 26  # of documents that span several rows and will be asked for again


class Documents:
    """The documents of one split by their index, shard after shard.

    Safe to use from several threads. Lengths are memory-mapped; shards open when a document of theirs is read.

    Args:
      manifest: the data build.
      split: "train" or "validation".
      keep_above: documents with more tokens than this are kept in memory for a while once read.
      fields: which extras of the manifest are read.

    Raises:
      ValueError: there is no such split, or it holds no token.
    """

    def __init__(self, manifest: Manifest, split: str, keep_above: int, fields: Sequence[str] = ()):
        found = manifest.splits.get(split)
        if found is None or found.tokens == 0:
            raise ValueError(
                f"{manifest.path} has no documents in its {split} split: build it again with more input"
                + (" or a larger --validation FRACTION" if split == "validation" else "")
                + ", or leave it out of the sources"
            )
        self._manifest, self._shards, self._keep_above = manifest, found.shards, keep_above
        self.dtypes = manifest.extras
        self._fields = [2 + list(manifest.extras).index(name) for name in fields]  # their places in a document
        self._starts = np.concatenate([[0], np.cumsum([shard.documents for shard in found.shards])])
        self._readers: OrderedDict[int, array_record_module.ArrayRecordReader] = OrderedDict()
        self._kept: OrderedDict[int, Document] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def lengths(self, start: int, stop: int) -> np.ndarray:
        """Tokens per document, [stop - start] int64.

        Raises:
          ValueError: a file of lengths does not match its digest.
        """
        parts = []
        for index in range(self._shard_of(start), self._shard_of(stop - 1) + 1):
            shard, first = self._shards[index], int(self._starts[index])
            mapped = np.load(self._open(shard.lengths, shard.lengths_sha256), mmap_mode="r")
            assert len(mapped) == shard.documents, shard.lengths
            parts.append(mapped[max(start - first, 0) : stop - first])
        return np.concatenate(parts, dtype=np.int64)

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Document]:
        """Tokens, sentence ids and extras of some documents.

        Args:
          indices: of documents, in any order.

        Raises:
          ValueError: a shard does not match its digest.
        """
        wanted = np.asarray(indices, np.int64)
        with self._lock:
            found = {index: self._kept[index] for index in wanted.tolist() if index in self._kept}
            missing = np.array([index for index in wanted.tolist() if index not in found], np.int64)
            shards = np.searchsorted(self._starts, missing, side="right") - 1
            for shard in np.unique(shards):
                of_shard = missing[shards == shard]
                records = self._reader(int(shard)).read((of_shard - self._starts[shard]).tolist())
                for index, record in zip(of_shard.tolist(), records, strict=True):
                    document = decode_document(record, self._manifest.token_dtype, self._manifest.extras.values())
                    found[index] = (*document[:2], *(document[place] for place in self._fields))
            for index, document in found.items():
                self._keep(index, document)
            return [found[index] for index in wanted.tolist()]

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _open(self, file: str, digest: str) -> str:
        return _verified(os.fspath(self._manifest.path / file), digest)

    def _reader(self, index: int) -> array_record_module.ArrayRecordReader:
        if index not in self._readers:
            shard = self._shards[index]
            path = self._open(shard.file, shard.sha256)
            self._readers[index] = array_record_module.ArrayRecordReader(
                path, options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15
            )
        self._readers.move_to_end(index)
        while (
            len(self._readers) > OPEN_SHARDS and sum(self._shards[i].documents for i in self._readers) > OPEN_DOCUMENTS
        ):
            self._readers.popitem(last=False)[1].close()
        return self._readers[index]

    def _keep(self, index: int, document: Document) -> None:
        """Remember a long document: other rows will ask for its other pieces."""
        if index in self._kept:
            self._kept.move_to_end(index)
        elif len(document[0]) > self._keep_above:
            self._kept[index] = document
            self._kept_bytes += sum(array.nbytes for array in document)
            while self._kept_bytes > KEPT_BYTES:
                self._kept_bytes -= sum(array.nbytes for array in self._kept.popitem(last=False)[1])


@functools.cache
def _verified(path: str, digest: str) -> str:
    """A local path of a file that has this SHA-256, checked once per process.

    A file of a remote store is copied first, into a cache that is named by digest, so that it is fetched once.
    """
    remote = epath.Path(path)
    if is_local(remote):
        check_digest(path, digest)
        return path
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxpt" / "shards"
    copy = folder / digest
    if copy.exists() and sha256(copy) == digest:
        return os.fspath(copy)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = copy.with_name(f"{digest}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        found = _fetch(remote, temporary)
        if found != digest:
            raise ValueError(
                f"{path} does not match its digest in manifest.json ({found[:12]}..., wanted {digest[:12]}...): "
                f"the file was damaged or replaced; copy it again or build the data again"
            )
        temporary.replace(copy)
    finally:
        temporary.unlink(missing_ok=True)
    return os.fspath(copy)


def _fetch(remote: epath.Path, to: Path) -> str:
    """Copy a file and return the SHA-256 of what was copied."""
    digest = hashlib.sha256()
    try:
        with remote.open("rb") as source, to.open("wb") as target:
            while piece := source.read(1 << 20):
                digest.update(piece)
                target.write(piece)
    except FileNotFoundError:
        raise ValueError(f"{remote} is missing from the data build: build the data again") from None
    return digest.hexdigest()
