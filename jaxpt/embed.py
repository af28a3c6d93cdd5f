"""What a finished run is used for where it makes vectors: `jaxpt embed`, and `jaxpt evaluate --task`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxpt.data.tokenizer import Tokenizer, built_tokenizer
from jaxpt.models.heads import Pooling
from jaxpt.tasks import Vectors, encode, make_vectors, measure_task, open_task, vectors_of
from jaxpt.tasks.reading import read_texts
from jaxpt.tasks.vectors import text_rows
from jaxpt.train import Trained, open_trained

ROWS = 1 << 16  # of vectors that are looked at together


class Written(NamedTuple):
    """What ``embed_run`` has written.

    Args:
      shape: of the array.
      cut: how many texts were cut.
      longest: at how many tokens.
      broken: how many vectors hold a number that is not finite, as those of a run that diverged.
    """

    shape: tuple[int, int]
    cut: int
    longest: int
    broken: int


def embed_run(
    run: str,
    file: str,
    output: str,
    *,
    field: str = "text",
    text: int = 0,
    pooling: Pooling | None = None,
    normalize: bool = False,
    step: int | None = None,
    batch_size: int = 64,
    known: tuple[type, ...] = (),
) -> Written:
    """Write the vectors of the texts of a file, in their order, as one float32 array.

    Args:
      run: the run directory.
      file: a text per line, per record of JSON lines or FASTA, or per row of a table or Parquet.
      output: the .npy file, which is written while they are made and is there when it is whole.
      field: of JSON lines, or the column of a table or Parquet.
      text: for which of the texts of an example they stand, where those are read by different networks.
      pooling: another one than the objective's.
      normalize: make every vector as long as 1.
      step: the checkpoint; the newest by default.
      batch_size: texts at a time.
      known: configuration types that are not jaxpt's.

    Raises:
      ValueError: no such run, objective without vectors, file with something else than texts, or no place to write to.
    """
    if Path(output).suffix != ".npy":
        raise ValueError(f"--output {output}: vectors are written as numpy's .npy: name a file that ends so")
    first = jax.process_index() == 0
    if first and Path(output).is_dir():
        raise ValueError(f"--output {output} is a folder: name a file")
    if first and not Path(output).parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {Path(output).parent}: make it, or name another")
    texts = read_texts(file, field)
    with open_trained(run, step, known) as trained:
        vectors, tokenizer = _vectors(trained, pooling)
        tokens, cut = encode(tokenizer, texts, vectors.longest)
        shape = (len(texts), _width(vectors, trained, text))
        part = Path(f"{output}.part")
        try:
            into = np.lib.format.open_memmap(part, "w+", np.dtype("f4"), shape) if first else np.zeros(shape, "f4")
            with _progress() as progress:
                bar = progress.add_task("embedding", total=len(texts))
                make_vectors(
                    vectors,
                    trained.snapshot,
                    tokens,
                    trained.mesh,
                    text=text,
                    batch_size=batch_size,
                    into=into,
                    progress=lambda n: progress.advance(bar, n),
                )
            broken = _finish(into, normalize)
            if first:
                into.flush()  # type: ignore[attr-defined]
                part.replace(output)
        except BaseException:  # an interrupt, too
            if first:
                part.unlink(missing_ok=True)
            raise
    return Written(shape, cut, vectors.longest, broken)


def _finish(vectors_NE: np.ndarray, normalize: bool) -> int:
    """Make vectors as long as 1 where asked, in place and by blocks; return how many are not finite."""
    broken = 0
    for begin in range(0, len(vectors_NE), ROWS):
        block = vectors_NE[begin : begin + ROWS]
        broken += int((~np.isfinite(block).all(axis=1)).sum())
        if normalize:
            with np.errstate(invalid="ignore", over="ignore"):  # what is not finite stays so, and is counted
                block /= np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)
    return broken


def measure_run(
    run: str,
    task: str,
    files: Sequence[str],
    *,
    columns: Sequence[str] = (),
    pooling: Pooling | None = None,
    step: int | None = None,
    batch_size: int = 64,
    known: tuple[type, ...] = (),
) -> dict[str, float]:
    """Return the metrics of a task.

    Args:
      run: the run directory.
      task: "sts" or "retrieval".
      files: that hold it.
      columns: names of the texts (and the score) in a header or of JSON fields, where there are others.
      pooling: another one than the objective's.
      step: the checkpoint; the newest by default.
      batch_size: texts at a time.
      known: configuration types that are not jaxpt's.

    Raises:
      ValueError: no such run, objective without vectors, or files that are no such task.
    """
    with open_trained(run, step, known) as trained:
        vectors, tokenizer = _vectors(trained, pooling)
        asked = open_task(task, files, tokenizer, vectors.longest, columns)
        with _progress() as progress:
            bar = progress.add_task("embedding", total=sum(map(len, asked.texts)))
            found = measure_task(
                asked,
                vectors,
                trained.snapshot,
                trained.mesh,
                batch_size=batch_size,
                progress=lambda n: progress.advance(bar, n),
            )
        return {"step": int(trained.snapshot.step)} | {
            name.removeprefix(f"{task}/"): value for name, value in found.items()
        }


def _vectors(trained: Trained, pooling: Pooling | None) -> tuple[Vectors, Tokenizer]:
    """How a run makes vectors of texts, and its tokenizer."""
    config = trained.config.objective.for_evaluation()
    assert trained.phase.seq_len  # resolved
    vectors = vectors_of(config, trained.vocab, trained.phase.seq_len, trained.mesh, pooling)
    return vectors, built_tokenizer(trained.tokenizer)


def _width(vectors: Vectors, trained: Trained, text: int) -> int:
    """The size of a vector, without making one."""
    batch = text_rows([[vectors.pad]], 1, 1, vectors.pad)
    return jax.eval_shape(lambda snapshot: vectors.embed(snapshot, batch, text), trained.snapshot).shape[1]


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True)
