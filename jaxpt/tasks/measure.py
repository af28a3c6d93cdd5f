"""How good vectors of texts are: similarity of sentences (STS) and retrieval of partners.

    spearman    rank correlation of the cosine of two texts with what people said, over all pairs of all files at once
    recall@k    share of texts whose partner is among the k nearest of the other side; mrr: mean of 1 / its rank

Alignment, uniformity and effective rank: ``objectives/text_vectors.py`` (Wang & Isola 2020, arXiv:2005.10242).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

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
    """Return the metrics of similarity.

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
    return {
        "spearman": spearman(cosines_N, scores_N),
        "alignment": float(apart.mean()) if len(apart) else math.nan,
        **{name: float(value) for name, value in lie.items()},
        "pairs": len(scores_N),
    }


def ranks_of_partners(first_NE: Array, second_NE: Array, first_N: Array, second_N: Array) -> Array:
    """Return the rank [N] f32, from 1, of each vector's partner among all of the other side, by cosine.

    One that is as near as the partner counts half, so that vectors which are all the same find nothing. What is no
    wrong answer is not counted: another copy of the partner, and the partners of another copy of the text itself.

    Args:
      first_NE, second_NE: vectors of N pairs; they are compared in blocks of rows, so that N may be 100,000.
      first_N, second_N: [N] i32, numbers of the texts: the same for the same text.

    >>> ranks_of_partners(jnp.eye(3), jnp.eye(3)[jnp.array([0, 2, 1])], jnp.arange(3), jnp.arange(3)).tolist()
    [1.0, 2.5, 2.5]
    """
    one_NE, two_NE = normalize(first_NE), normalize(second_NE)
    count = len(one_NE)
    rows = max(1, min(count, SIMILARITY_BYTES // (4 * count)))
    blocks = -(-count // rows)

    def cut(leaf: Array) -> Array:
        leaf = jnp.pad(leaf, [(0, blocks * rows - count), *[(0, 0)] * (leaf.ndim - 1)])
        return leaf.reshape(blocks, rows, *leaf.shape[1:])

    def rank(block: tuple[Array, ...]) -> Array:
        anchors_RE, place_R, text_R, partner_R = block
        cosines_RN = jnp.matmul(anchors_RE, two_NE.T, precision=jax.lax.Precision.HIGHEST)
        own_R = jnp.take_along_axis(cosines_RN, place_R[:, None], axis=1)  # of the same product, so that ties are ties
        wrong_RN = (text_R[:, None] != first_N) & (partner_R[:, None] != second_N)
        above_RN = (cosines_RN > own_R) + 0.5 * (cosines_RN == own_R)
        return 1 + jnp.sum(jnp.where(wrong_RN, above_RN, 0.0), axis=1)

    parts = cut(one_NE), cut(jnp.arange(count)), cut(first_N), cut(second_N)
    return jax.lax.map(rank, parts).reshape(-1)[:count]


def retrieval(first_NE: np.ndarray, second_NE: np.ndarray, first_N: np.ndarray, second_N: np.ndarray) -> dict:
    """Return the metrics of finding partners, "forward" from the first side to the second, and "backward"."""
    compiled, found = jax.jit(ranks_of_partners), {}
    sides = (jnp.asarray(first_NE), jnp.asarray(first_N)), (jnp.asarray(second_NE), jnp.asarray(second_N))
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
    return kind, tuple(files.split(","))


def open_task(
    kind: str, files: Sequence[str], tokenizer: Tokenizer, longest: int, columns: Sequence[str] = (), name: str = ""
) -> Task:
    """Read and encode the texts of a task.

    Args:
      kind: of ``TASKS``.
      files: that hold it.
      tokenizer: of the run.
      longest: tokens at which texts are cut.
      columns: as of ``read_scored``.
      name: before its metrics; the kind by default.

    Raises:
      ValueError: a file is not what the task reads.
    """
    pairs = TASKS[kind](files, columns) if columns else TASKS[kind](files)
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
    names = [
        kind if kinds.count(kind) == 1 else f"{kind}/{Path(files[0]).name.partition('.')[0]}" for kind, files in parsed
    ]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(
            f"two tasks would be called {twice[0]!r}: give their files other names, or make one task of them"
        )
    return [
        open_task(kind, files, tokenizer, longest, name=name) for (kind, files), name in zip(parsed, names, strict=True)
    ]


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
    return retrieval(first_UE[task.first_N], second_UE[task.second_N], task.first_N, task.second_N)
