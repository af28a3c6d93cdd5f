"""From token shards to batches: a batch is a pure function of (seed, step), so the data position is the step.

step -> phase -> kind of the row, slot of the kind -> source and row number (Mixture) -> epoch, block, row (Stream)
     -> pieces of documents (Plan) -> tokens (Documents) -> Batch
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from jaxpt.data.manifest import Manifest
from jaxpt.data.order import Address, Mixture
from jaxpt.data.reader import DOCUMENT_IDS, open_readers, read_ahead, read_batch
from jaxpt.types import Batch, RowSpec, Vocab

Indices = slice | Sequence[int] | np.ndarray
Rows = Indices | Callable[[int], Indices]  # rows of the global batch; a function of the batch size where phases differ

ORDER = 1  # raise it when the same seed and step would give another batch: old runs are then refused, not spoiled


@dataclass(frozen=True)
class Source:
    """A data build and its weight among the sources of a phase.

    Args:
      path: folder of a finished `jaxpt data build`, local or of a store that etils/epath opens.
      weight: rows of the batch in proportion; any positive number.
    """

    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class Phase:
    """What is read from a step on: a grown data set, a longer context or a bigger batch is a new phase.

    Args:
      from_step: the first step of the phase.
      sources: what is mixed.
      length: the model's tokens per row.
      batch_size: rows per step, over all processes.
    """

    from_step: int
    sources: tuple[Source, ...]
    length: int
    batch_size: int


class Pipeline:
    """The batches of a run.

    Args:
      phases: rising in `from_step`, the first at 0.
      rows: how documents become rows, from the objective.
      seed: of the order of everything; the same seed gives the same batches for ever, on any number of processes.
      split: "train" or "validation".

    Raises:
      ValueError: phases, sources or rows that cannot be, with what to do.
    """

    def __init__(self, phases: Sequence[Phase], rows: RowSpec, seed: int, split: str = "train"):
        _check_phases(phases)
        _check_stream(phases, rows)
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"the data seed is {seed}: choose one from 0 to 2**64 - 1")
        self._phases, self._rows, self._seed, self._split = tuple(phases), rows, seed, split
        paths = [source.path for phase in phases for source in phase.sources]
        self._manifests = load_manifests(paths, rows)
        self._mixtures = [Mixture([source.weight for source in phase.sources]) for phase in phases]
        self.vocab: Vocab = _load_vocab([self._manifests[source.path] for source in phases[0].sources])
        self.tokenizer: str = self._manifests[paths[0]].tokenizer["sha256"]
        self._readers = [
            open_readers(
                [self._manifests[source.path] for source in phase.sources], split, rows, phase.length, (seed, i << 32)
            )
            for i, phase in enumerate(phases)
        ]
        self._kinds = [rows.kind_ranges(phase.batch_size) for phase in phases]

    def phase_at(self, step: int) -> Phase:
        """The phase that `step` belongs to."""
        return self._phases[self._phase_index(step)]

    def batch(self, step: int, rows: Rows = slice(None)) -> Batch:
        """The batch of a step.

        Args:
          step: 0 or more.
          rows: which rows of the global batch; a function of the batch size where that differs between phases.

        Returns:
          numpy arrays [R, L]; each row is the same whichever rows it is asked for with.
        """
        index = self._phase_index(step)
        phase = self._phases[index]
        row_ids = np.arange(phase.batch_size, dtype=np.uint32)[rows(phase.batch_size) if callable(rows) else rows]
        readers, wanted = self._readers[index], []
        for row in row_ids.tolist():
            kind, own = next((kind, own) for kind, own in enumerate(self._kinds[index]) if row < own.stop)
            if self._rows.packing == "stream":
                wanted.append((0, readers[0].stream.follow(row, phase.batch_size, step - phase.from_step)))
                continue
            slot = (step - phase.from_step) * (own.stop - own.start) + row - own.start
            k, number = self._mixtures[index].pick(slot)
            k += kind * len(phase.sources)
            wanted.append((k, readers[k].stream.locate(number)))
        return read_batch(readers, wanted, row_ids, self.vocab.pad)

    def batches(self, start: int, stop: int | None = None, rows: Rows = slice(None)) -> Iterator[Batch]:
        """The batches of steps start, start + 1, ..., stop - 1 (without end if None), read ahead in the background.

        Close the iterator, or drop it, to stop the reading; an error of the reading is raised by `next`.
        """
        return read_ahead(lambda step: self.batch(step, rows), start, stop)

    def fingerprint(self) -> dict[str, Any]:
        """What must not change on resume, as JSON; see `check_continues`."""
        fields = {"fields": list(self._rows.fields)} if self._rows.fields else {}
        return fields | {
            "order": ORDER,
            "seed": self._seed,
            "split": self._split,
            "packing": self._rows.packing,
            "prefix": list(self._rows.prefix),
            "suffix": list(self._rows.suffix),
            "phases": [
                {
                    "from_step": phase.from_step,
                    "length": phase.length,
                    "tokens_per_row": self._rows.tokens(phase.length),
                    "batch_size": phase.batch_size,
                    "sources": [
                        {"data": self._manifests[source.path].digest, "weight": source.weight}
                        for source in phase.sources
                    ],
                }
                | self._kinds_of(phase)
                for phase in self._phases
            ],
        }

    def _kinds_of(self, phase: Phase) -> dict[str, Any]:
        kinds = [[kind.share, kind.raw_length(phase.length)] for kind in self._rows.kinds]
        return {"kinds": kinds} if kinds else {}

    def _phase_index(self, step: int) -> int:
        if step < 0:
            raise ValueError(f"there is no step {step}: steps count from 0")
        return sum(phase.from_step <= step for phase in self._phases) - 1


def check_continues(saved: dict[str, Any], current: dict[str, Any], step: int) -> None:
    """Refuse to resume with data that would not continue the run; new phases may start at `step` or later.

    Args:
      saved: the fingerprint of the run so far.
      current: the fingerprint of the pipeline that is to continue it.
      step: the first step that is still to do.

    Raises:
      ValueError: names what differs.

    >>> old = {"seed": 0, "phases": [{"from_step": 0, "length": 128}]}
    >>> check_continues(old, {"seed": 0, "phases": [*old["phases"], {"from_step": 9, "length": 512}]}, step=9)
    >>> check_continues(old, {"seed": 1, "phases": old["phases"]}, step=9)
    Traceback (most recent call last):
    ...
    ValueError: this run cannot be resumed with other data: seed was 0 and is now 1. Restore ...
    """
    changes = [
        f"{name} was {saved.get(name)!r} and is now {current.get(name)!r}"
        for name in sorted((saved.keys() | current.keys()) - {"phases"})
        if saved.get(name) != current.get(name)
    ]
    before, now = ([phase for phase in side["phases"] if phase["from_step"] < step] for side in (saved, current))
    for i in range(max(len(before), len(now))):
        old, new = (side[i] if i < len(side) else {} for side in (before, now))
        changes += [
            f"phase {i}: {name} was {_told(old.get(name))} and is now {_told(new.get(name))}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]
    if changes:
        raise ValueError(
            f"this run cannot be resumed with other data: {'; '.join(changes)}. Restore what changed, let a new phase "
            f"with from_step >= {step} begin what is new, or start another run"
        )


def _told(value: Any) -> str:
    """A value of a fingerprint for an error message; of a list of sources the weights and short digests."""
    if isinstance(value, list) and all(isinstance(source, dict) for source in value):
        return " + ".join(f"{source['weight']:g} x data of digest {source['data'][:12]}" for source in value)
    return repr(value)


def held_out(
    sources: Sequence[Source],
    rows: RowSpec,
    length: int,
    batch_size: int,
    limit_rows: int | None = None,
    split: str = "validation",
    rows_slice: Indices = slice(None),
) -> Iterator[Batch]:
    """One pass over held-out documents in their order, read ahead in the background.

    Row n of the pass (`row_ids`) is the same for every batch size and number of processes. Filler rows (all padding,
    `valid` 0) complete the last batch. Weights of sources play no part: they come one after the other.

    Args:
      sources: data builds.
      rows: how documents become rows.
      length: the model's tokens per row.
      batch_size: rows per batch, over all processes.
      limit_rows: stop after so many rows; None for all.
      split: "validation" or "train".
      rows_slice: which rows of each batch this process reads.

    Raises:
      ValueError: as `Pipeline`; or nothing is held out.
    """
    _check_phases([Phase(0, tuple(sources), length, batch_size)])
    if limit_rows is not None and limit_rows < 1:
        raise ValueError(f"{limit_rows} held-out rows measure nothing: ask for at least 1, or None for all")
    if rows.kinds:
        raise ValueError("held-out rows are of one kind: for_evaluation() must give an objective without RowSpec.kinds")
    manifests = load_manifests([source.path for source in sources], rows)
    readers = open_readers([manifests[source.path] for source in sources], split, rows, length, None)
    ends = [0]
    for reader in readers:
        ends.append(ends[-1] + reader.stream.rows(None if limit_rows is None else limit_rows - ends[-1]))
        if limit_rows is not None and ends[-1] >= limit_rows:
            break
    total = ends[-1] if limit_rows is None else min(limit_rows, ends[-1])
    pad = int(manifests[sources[0].path].vocab["pad"])

    def read(step: int) -> Batch:
        row_ids = (step * batch_size + np.arange(batch_size, dtype=np.uint32))[rows_slice]
        wanted: list[tuple[int, Address] | None] = []
        for row in row_ids.tolist():
            source = next(k for k in range(len(ends)) if k + 1 == len(ends) or row < ends[k + 1])
            wanted.append((source, readers[source].stream.locate(row - ends[source])) if row < total else None)
        return read_batch(readers, wanted, row_ids, pad)

    return read_ahead(read, 0, -(-total // batch_size))


def _check_phases(phases: Sequence[Phase]) -> None:
    if not phases or phases[0].from_step != 0:
        raise ValueError("the first data phase must start at step 0: set its from_step to 0")
    for before, after in pairwise(phases):
        if after.from_step <= before.from_step:
            raise ValueError(
                f"data phases must rise in from_step, and one from step {after.from_step} follows one from step "
                f"{before.from_step}: phases are only ever added at the end"
            )
    for phase in phases:
        if not phase.sources:
            raise ValueError(f"the data phase from step {phase.from_step} has no sources: name a data build")
        if phase.length < 1:
            raise ValueError(f"the sequence length is {phase.length}: it must be at least 1")
        if phase.batch_size < 1:
            raise ValueError(f"the batch size is {phase.batch_size}: it must be at least 1")
        for source in phase.sources:
            if not (source.weight > 0 and math.isfinite(source.weight)):
                raise ValueError(f"the weight of {source.path} is {source.weight}: it must be positive")


def _check_stream(phases: Sequence[Phase], rows: RowSpec) -> None:
    for phase in phases:
        if rows.packing == "stream" and (len(phase.sources) > 1 or rows.kinds):
            raise ValueError(
                f"the data phase from step {phase.from_step} mixes rows, and rows packed as a stream go on where those "
                f"of the step before ended: give it one data build, or another packing"
            )


def load_manifests(paths: Sequence[str], rows: RowSpec) -> dict[str, Manifest]:
    """Return the manifests by path.

    Raises:
      ValueError: they do not share their tokenizer, or lack what the objective reads.
    """
    manifests = {path: Manifest.load(path) for path in dict.fromkeys(paths)}
    first = manifests[paths[0]]
    for path, manifest in manifests.items():
        if manifest.tokenizer["sha256"] != first.tokenizer["sha256"]:
            raise ValueError(
                f"{paths[0]} and {path} were built with different tokenizers "
                f"({first.tokenizer['sha256'][:12]}... and {manifest.tokenizer['sha256'][:12]}...): build one of them "
                f"again with the other's, `jaxpt data build {path} --tokenizer {paths[0]}/{first.tokenizer['file']}`"
            )
        found, wanted = len(manifest.vocab["sentinels"]), len(first.vocab["sentinels"])
        if found != wanted:
            raise ValueError(
                f"{paths[0]} has {wanted} sentinel tokens and {path} has {found}: build one of them again with as many "
                f"as the other has, `jaxpt data build {path} --sentinels {wanted}`"
            )
        for name in rows.fields:
            if name not in manifest.extras and name != DOCUMENT_IDS:
                remedy = {"phrase_starts": "--phrases", "gap_scores": "--gap-scores"}.get(name, "that field")
                raise ValueError(
                    f"the objective reads the field {name!r} and the data in {path} does not have it (it has: "
                    f"{', '.join(sorted(manifest.extras)) or 'none'}): build the data again with {remedy}, in another "
                    f"folder, or choose an objective that does not need it"
                )
        there = manifest.texts.get("count", 0)
        if 0 < there < rows.texts:
            raise ValueError(
                f"the objective reads examples of {rows.texts} texts and those of {path} have {there}: build the data "
                f"with as many --fields, or with hard --negatives, or let the objective read fewer"
            )
        if there < rows.texts:
            raise ValueError(
                f"the objective reads examples of {rows.texts} texts and the data in {path} are documents: build pairs "
                f"with `jaxpt data build {path} --input FILES --fields source target` or `--aligned FILE FILE`"
            )
    return manifests


def _load_vocab(manifests: Sequence[Manifest]) -> Vocab:
    """The shared vocabulary; unigram counts are summed over the distinct data builds."""
    vocabs = [manifest.load_vocab() for manifest in {manifest.digest: manifest for manifest in manifests}.values()]
    counts = np.sum([vocab.unigram_counts for vocab in vocabs], axis=0)
    return dataclasses.replace(vocabs[0], unigram_counts=counts)
