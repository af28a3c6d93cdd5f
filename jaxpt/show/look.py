"""What an objective makes of one row, as plain data for a terminal, a picture or a page.

The row is one that a run would be served, or the user's own text laid out as the data would be; ``corrupt`` runs
with the run's own keys. What is shown comes from the objective's ``views``; nothing here knows which objective it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.config import RunConfig, parse_source, parts, resolve_phases, validate
from jaxpt.data.manifest import Manifest
from jaxpt.data.packing import cut_piece, fill_rows
from jaxpt.data.pipeline import Phase, Pipeline
from jaxpt.data.sentences import Document, document_starts
from jaxpt.data.tokenizer import Tokenizer, built_tokenizer
from jaxpt.models.config import TransformerConfig
from jaxpt.show.reading import Reading, reading_of
from jaxpt.step import make_example, seed_key
from jaxpt.train import open_phases
from jaxpt.types import Batch, Objective, RowSpec, Snapshot, Tree, View


@dataclass(frozen=True)
class Look:
    """What an objective makes of one row.

    Args:
      title: the objective.
      source: where the row is from.
      row: the row before the objective touched it.
      readings: what networks read, by view.
      arrays: the example's arrays by name, of an objective without views.
    """

    title: str
    source: str
    row: Reading
    readings: tuple[Reading, ...]
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def sequences(self) -> tuple[Reading, ...]:
        """The row, unless every network reads it as it is, and what they read."""
        tokens = [[place.token for place in reading.places] for reading in (self.row, *self.readings)]
        alike = len(self.readings) > 0 and all(each == tokens[0] for each in tokens)
        return self.readings if alike else (self.row, *self.readings)


def look(config: RunConfig, texts: Sequence[str] = (), row: int = 0, step: int = 0) -> Look:
    """Return what the objective of a run makes of one row.

    Args:
      config: of the run; its data give the tokenizer and, without ``texts``, the row.
      texts: the user's own documents, which then make up the row.
      row: of the batch.
      step: of the run, counted from 0.

    Raises:
      ValueError: configuration and data cannot be, there is no such row, or the texts do not fit into it.
    """
    validate(config)
    if step < 0:
        raise ValueError(f"--step {step}: steps count from 0")
    phases = open_phases(config)
    opened = Pipeline(phases, RowSpec(), config.seed)
    objective, phase = config.objective.build(opened.vocab), opened.phase_at(step)
    size = phase.batch_size
    if not 0 <= row < size:
        raise ValueError(f"--row {row}: the batch of step {step} has {size} rows, 0 to {size - 1}")
    tokenizer = built_tokenizer(Manifest.load(phase.sources[0].path))
    if texts:
        batch = text_row(texts, tokenizer, objective.rows, phase.length, opened.vocab.pad, row)
        source = f"your text, as row {row} of step {step}"
    else:
        batch = Pipeline(phases, objective.rows, config.seed).batch(step, slice(row, row + 1))
        entries = resolve_phases(config)[phases.index(phase)].data or ()
        source = f"row {row} of step {step}, from {parse_source(entries[int(batch.source_ids[0])])[0]}"
    views, arrays = _corrupted(objective, batch, config.seed, step, phase)
    original = View(batch.tokens[0], batch.segment_ids[0], batch.positions[0])
    windows = _windows(config)
    return Look(
        type(config.objective).__name__,
        source,
        reading_of("the row", original, original, tokenizer, {}),
        tuple(reading_of(name, view, original, tokenizer, windows) for name, view in views.items()),
        arrays,
    )


# ------------------------------------------------------------------------------------------------ the row


def text_row(texts: Sequence[str], tokenizer: Tokenizer, rows: RowSpec, length: int, pad: int, row: int) -> Batch:
    """Lay texts out as the documents of one row, as the data would be.

    Args:
      texts: documents.
      tokenizer: of the data.
      rows: prefix, suffix and packing, from the objective.
      length: tokens per row of the model.
      pad: token of the padding.
      row: the row's index in the batch.

    Raises:
      ValueError: they are too long or empty, or the objective asks for something that a text does not have.
    """
    if rows.fields:
        raise ValueError(
            f"the objective reads {', '.join(rows.fields)} from the data, which a text of your own does not have: look "
            f"at a row of the data (--row N)"
        )
    if rows.packing == "one_document" and len(texts) > 1:
        raise ValueError(f"{len(texts)} texts, and a row of this objective holds one document: give one --text")
    prefix, suffix = np.array(rows.prefix, np.int32), np.array(rows.suffix, np.int32)
    together = max(rows.texts, 1)
    if len(texts) % together:
        raise ValueError(
            f"the objective reads examples of {together} texts, not {len(texts)}: give --text SOURCE --text TARGET"
        )
    encoded = []
    for text in texts:
        ids, begins = tokenizer.encode(text)
        if not len(ids):
            raise ValueError(f"--text {text!r} has no tokens: write a sentence")
        encoded.append((ids, np.cumsum(document_starts(Document(text), begins)) - 1))
    if rows.texts:  # the texts of an example are its sentences
        groups = [encoded[at : at + together] for at in range(0, len(encoded), together)]
        encoded = [
            (np.concatenate([ids for ids, _ in group]), np.repeat(np.arange(together), [len(ids) for ids, _ in group]))
            for group in groups
        ]
    pieces = []
    for ids, sentences in encoded:
        pieces.append(cut_piece((ids, sentences), 0, len(prefix) + len(ids) + len(suffix), prefix, suffix))
    width, needed = rows.tokens(length), sum(len(tokens) for tokens, *_ in pieces)
    if needed > width:
        raise ValueError(
            f"--text: {needed} tokens, with the special tokens around a document, do not fit into a row of {width}: "
            f"shorten the text or raise --seq-len"
        )
    laid_out = fill_rows(1, width, pad, np.zeros(len(pieces), int), pieces)
    arrays: dict[str, Any] = dict(zip(Batch._fields, laid_out, strict=False))
    arrays |= {"row_ids": np.array([row], np.uint32), "source_ids": np.zeros(1, np.int32)}
    arrays |= {"valid": np.ones(1, np.float32), "extras": {}}
    return Batch(**arrays)


def _corrupted(
    objective: Objective, batch: Batch, seed: int, step: int, phase: Phase
) -> tuple[dict[str, View], dict[str, np.ndarray]]:
    """The objective's views of a row, or its arrays where it has none, as arrays of the host.

    Parameters are those of the first step, made inside the program: where ``corrupt`` does not look at them, the
    compiler leaves them out, however large the network is.
    """
    classes: dict[str, tuple[str, ...]] = {}

    def make(batch: Batch) -> tuple[dict[str, View], Tree]:
        params = objective.init(seed_key(seed, "params"))
        carry = objective.start(params, seed_key(seed, "carry")) if objective.start else {}
        snapshot = Snapshot(params, carry, jnp.int32(step))
        key = jax.random.fold_in(seed_key(seed, "corrupt"), step)
        example = make_example(objective, snapshot, batch, key)
        if objective.views is None:
            return _plain_view(example.inputs), example.inputs | {"weights": example.weights}
        views = objective.views(snapshot, example)
        classes.update({name: view.classes for name, view in views.items()})  # text cannot leave a compiled program
        return {name: view._replace(classes=()) for name, view in views.items()}, {}

    row = 0
    try:
        made = jax.jit(make)(batch)
    except ValueError:  # rows that are divided among objectives by their place: the whole batch, of empty rows else
        row = int(batch.row_ids[0])
        made = jax.jit(make)(_among_empty_rows(batch, phase.batch_size))
    views, arrays = jax.tree.map(lambda leaf: np.asarray(leaf)[row], made)
    # in the objective's order, which a compiled program does not keep
    named = {name: views[name]._replace(classes=classes.get(name, ())) for name in classes or views}
    # of parts that divide the rows of a batch among themselves, those whose row this is
    named = {name: view for name, view in named.items() if np.any(view.segment_ids)} or named
    return named, {_path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)}


def _among_empty_rows(batch: Batch, size: int) -> Batch:
    row = int(batch.row_ids[0])
    whole = jax.tree.map(lambda leaf: np.zeros((size, *leaf.shape[1:]), leaf.dtype), batch)
    for empty, leaf in zip(jax.tree.leaves(whole), jax.tree.leaves(batch), strict=True):
        empty[row] = leaf[0]
    return whole._replace(row_ids=np.arange(size, dtype=np.uint32))


def _plain_view(inputs: dict[str, Any]) -> dict[str, View]:
    """What can be told of an objective without views: the tokens, where they have their usual names."""
    usual = ("tokens", "segment_ids", "positions")
    return {"tokens": View(*(inputs[name] for name in usual))} if inputs.keys() >= set(usual) else {}


def _path_name(path: Iterable[Any]) -> str:
    return ".".join(str(getattr(entry, "key", entry)) for entry in path)


def _windows(config: RunConfig) -> dict[int | None, str]:
    """The windows of a run's layers, and which layers they are, for a title."""
    networks = [part for _, part in parts("objective", config.objective) if isinstance(part, TransformerConfig)]
    found = [network.window_of(layer) for network in networks for layer in range(network.depth)]
    if len(set(found)) < 2 and None in found:
        return {None: ""}
    return {
        window: f"{found.count(window)} of {len(found)} layers: "
        + ("no window" if window is None else f"window {window}")
        for window in dict.fromkeys(found)
    }
