"""How good vectors of texts are: similarity of sentences (STS) and retrieval of partners.

    spearman    rank correlation of the cosine of two texts with what people said, over all pairs of all files at once
    recall@k    share of texts whose partner is among the k nearest of the other side; mrr: mean of 1 / its rank

Alignment, uniformity and effective rank: ``objectives/text_vectors.py`` (Wang & Isola 2020, arXiv:2005.10242).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpt.data.files import compressed, format_of
from jaxpt.data.tokenizer import Tokenizer
from jaxpt.losses.contrastive import SIMILARITY_BYTES, normalize
from jaxpt.objectives.text_vectors import vector_metrics, vector_sums
from jaxpt.tasks.reading import Pairs, read_pairs, read_scored
from jaxpt.tasks.vectors import Vectors, encode, make_vectors
from jaxpt.types import Array, Snapshot

ALIKE = 0.8  # pairs above this share of the highest score count as alike: 4 of 5, as SimCSE has it
NEAREST = (1, 5, 10)


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Return the rank correlation of two lists [N], with mean ranks for what is equal; 0 where all is equal.

    >>> round(spearman(np.array([1, 2, 2, 4]), np.array([1, 3, 2, 4])), 6)
    0.948683
    """
    from scipy import stats  # scipy: what jax itself asks for

    ranks = [stats.rankdata(values) for values in (first, second)]
    if any(np.ptp(each) == 0 for each in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def similarity(first_NE: np.ndarray, second_NE: np.ndarray, texts_UE: np.ndarray, scores_N: np.ndarray) -> dict:
    """Return the metrics of similarity, without those of which there is nothing to measure.

    Args:
      first_NE, second_NE: vectors of N pairs.
      texts_UE: of all texts, each once.
      scores_N: what people said.
    """
    one_NE, two_NE = (np.asarray(normalize(jnp.asarray(vectors)), np.float64) for vectors in (first_NE, second_NE))
    cosines_N = np.sum(one_NE * two_NE, axis=1)
    alike_N = scores_N > ALIKE * scores_N.max()
    apart = 2 - 2 * cosines_N[alike_N]
    lie = jax.jit(lambda vectors: vector_metrics(vector_sums(vectors, jnp.ones(len(vectors)))))(jnp.asarray(texts_UE))
    of_two = () if len(texts_UE) > 1 else ("uniformity", "cosine_of_others")  # of one text there are no two
    return {
        "spearman": spearman(cosines_N, scores_N),
        **({"alignment": float(apart.mean())} if len(apart) else {}),  # no score above 0: nobody called a pair alike
        **{name: float(value) for name, value in lie.items() if name not in of_two},
        "pairs": len(scores_N),
    }


def ranks_of_partners(first_UE: Array, second_WE: Array, first_N: Array, second_N: Array) -> Array:
    """Return the rank [N] f32, from 1, of each pair's second text among all second texts, by cosine with its first.

    One that is as near as the partner counts half, so that vectors which are all the same find nothing. The other
    partners of a first text are no wrong answers, and are not counted.

    Args:
      first_UE, second_WE: vectors of the distinct texts of each side.
      first_N, second_N: [N] i32, which texts each pair has. They are compared in blocks of pairs, so that N may be
        100,000.

    >>> ranks_of_partners(jnp.eye(3), jnp.eye(3), jnp.array([0, 1, 2]), jnp.array([0, 2, 1])).tolist()
    [1.0, 2.5, 2.5]
    """
    one_UE, two_WE = normalize(first_UE), normalize(second_WE)
    count, others = len(first_N), len(two_WE)
    rows = max(1, min(count, SIMILARITY_BYTES // (4 * others)))
    blocks = -(-count // rows)
    order_N = jnp.argsort(first_N)  # so that all partners of a text are found by the few texts of a block

    def cut(leaf: Array) -> Array:
        return jnp.pad(leaf[order_N], (0, blocks * rows - count), mode="edge").reshape(blocks, rows)

    def rank(block: tuple[Array, Array]) -> Array:
        text_R, partner_R = block
        cosines_RW = jnp.matmul(one_UE[text_R], two_WE.T, precision=jax.lax.Precision.HIGHEST)
        own_R = jnp.take_along_axis(cosines_RW, partner_R[:, None], axis=1)  # of the same product: ties are ties
        # the first row of each text here holds its partners
        row_N = jnp.searchsorted(text_R, first_N)
        row_N = jnp.where(text_R[jnp.minimum(row_N, rows - 1)] == first_N, row_N, rows)
        known_RW = jnp.zeros((rows, others), bool).at[row_N, second_N].set(True, mode="drop")
        known_RW = known_RW[jnp.searchsorted(text_R, text_R)]
        # of vectors that are no numbers every other is above
        above_RW = jnp.where(cosines_RW == own_R, 0.5, ~(cosines_RW < own_R))
        return 1 + jnp.sum(jnp.where(known_RW, 0.0, above_RW), axis=1)

    ranks_N = jax.lax.map(rank, (cut(first_N), cut(second_N))).reshape(-1)[:count]
    return jnp.zeros_like(ranks_N).at[order_N].set(ranks_N)


def retrieval(first_UE: np.ndarray, second_WE: np.ndarray, first_N: np.ndarray, second_N: np.ndarray) -> dict:
    """Return the metrics of finding partners, "forward" from the first side to the second, and "backward".

    Args:
      first_UE, second_WE: vectors of the distinct texts of each side.
      first_N, second_N: [N] i32, which texts each pair has.
    """
    compiled, found = jax.jit(ranks_of_partners), {}
    sides = (jnp.asarray(first_UE), jnp.asarray(first_N)), (jnp.asarray(second_WE), jnp.asarray(second_N))
    for name, ((one, one_N), (two, two_N)) in {"forward": sides, "backward": sides[::-1]}.items():
        ranks_N = np.asarray(compiled(one, two, one_N, two_N), np.float64)
        found |= {f"{name}/recall@{k}": float((ranks_N <= k).mean()) for k in NEAREST}
        found[f"{name}/mrr"] = float((1 / ranks_N).mean())
    return found | {"pairs": len(first_N)}


# ------------------------------------------------------------------------------------------------- tasks

TASKS: dict[str, Callable[..., Pairs]] = {"sts": read_scored, "retrieval": read_pairs}


class Task(NamedTuple):
    """A task that is ready to be measured: its texts as tokens, each once.

    Args:
      name: before its metrics.
      kind: of ``TASKS``.
      texts: tokens of the distinct texts that are read as the first of an example, and as the second.
      first_N, second_N: which texts each pair has.
      scores_N: [N] f64, for similarity.
      cut: texts that were longer than a model reads.
    """

    name: str
    kind: str
    texts: tuple[list[np.ndarray], list[np.ndarray]]
    first_N: np.ndarray
    second_N: np.ndarray
    scores_N: np.ndarray | None
    cut: int


def parse_task(entry: str) -> tuple[str, tuple[str, ...]]:
    """Split "NAME=FILE" or "NAME=FILE,FILE" into the task and its files.

    >>> parse_task("retrieval=val.en,val.de")
    ('retrieval', ('val.en', 'val.de'))
    """
    kind, _, files = entry.partition("=")
    if kind not in TASKS or not files:
        raise ValueError(f"task {entry!r}: write sts=FILE (pairs with scores) or retrieval=FILE (pairs), FILE,FILE")
    named = tuple(files.split(","))
    if not all(name.strip() for name in named):
        raise ValueError(f"task {entry!r}: a comma stands between two files, and here one has no name")
    return kind, named


def open_task(
    kind: str, files: Sequence[str], tokenizer: Tokenizer, longest: int, columns: Sequence[str] = (), name: str = ""
) -> Task:
    """Read and encode the texts of a task.

    Args:
      kind: of ``TASKS``.
      files: that hold it.
      tokenizer: of the run.
      longest: tokens at which texts are cut.
      columns: as of ``read_scored`` and ``read_pairs``.
      name: before its metrics; the kind by default.

    Raises:
      ValueError: a file is not what the task reads.
    """
    pairs = TASKS[kind](files, columns)
    # Two towers read the two sides of a pair; the texts of STS are all read as the first of one.
    sides = [list(dict.fromkeys(side)) for side in (pairs.first, pairs.second)]
    if kind == "sts":
        sides = [list(dict.fromkeys([*pairs.first, *pairs.second])), []]
    encoded = [encode(tokenizer, side, longest) for side in sides]
    places = [{text: number for number, text in enumerate(side)} for side in sides]
    first_N, second_N = (
        np.array([where[text] for text in texts], np.int32)
        for where, texts in ((places[0], pairs.first), (places[0 if kind == "sts" else 1], pairs.second))
    )
    tokens = encoded[0][0], encoded[1][0]
    return Task(name or kind, kind, tokens, first_N, second_N, pairs.scores, encoded[0][1] + encoded[1][1])


def open_tasks(entries: Sequence[str], tokenizer: Tokenizer, longest: int) -> list[Task]:
    """Return the tasks of a run ("NAME=FILE"); the metrics of several of one kind are told apart by the file's name."""
    parsed = [parse_task(entry) for entry in entries]
    kinds = [kind for kind, _ in parsed]
    names = [kind if kinds.count(kind) == 1 else f"{kind}/{_name(files[0])}" for kind, files in parsed]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(
            f"two tasks would be called {twice[0]!r}: give their files other names, or make one task of them"
        )
    return [
        open_task(kind, files, tokenizer, longest, name=name) for (kind, files), name in zip(parsed, names, strict=True)
    ]


def _name(file: str) -> str:
    """What a file is called, without what says how it is compressed and which format it has."""
    path = Path(Path(file).stem if compressed(file) else file)
    known = path.suffix.lower() in (".csv", ".tsv", ".txt") or format_of(path.name) != "text"
    return path.stem if known else path.name


def measure_task(
    task: Task, vectors: Vectors, snapshot: Snapshot, mesh: Mesh, *, batch_size: int = 64, **options: Any
) -> dict[str, float]:
    """Return the metrics of a task, "<name>/<metric>".

    Args:
      task: what is asked.
      vectors, snapshot, mesh: how vectors are made, of which parameters and where.
      batch_size: rows per batch.
      options: of ``make_vectors``.
    """
    one, two = (
        make_vectors(vectors, snapshot, tokens, mesh, text=text, batch_size=batch_size, **options) if tokens else None
        for text, tokens in enumerate(task.texts)
    )
    assert one is not None
    found = task_metrics(task, one, two) | {"cut": task.cut}
    return {f"{task.name}/{metric}": value for metric, value in found.items()}


def task_metrics(task: Task, first_UE: np.ndarray, second_UE: np.ndarray | None) -> dict[str, float]:
    """Return the metrics of a task by the vectors of its distinct texts, wherever they come from."""
    if task.kind == "sts":
        assert task.scores_N is not None
        return similarity(first_UE[task.first_N], first_UE[task.second_N], first_UE, task.scores_N)
    assert second_UE is not None
    return retrieval(first_UE, second_UE, task.first_N, task.second_N)
