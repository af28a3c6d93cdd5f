"""The metrics of vectors: golden values, ties, copies, blocks, and against what scipy and a plain loop give."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxpt.data.tokenizer import byte_tokenizer
from jaxpt.objectives.text_vectors import vector_metrics, vector_sums
from jaxpt.tasks import measure
from jaxpt.tasks.measure import open_task, open_tasks, parse_task, ranks_of_partners, retrieval, similarity, spearman

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 2, 4], [1, 3, 2, 4], 0.948683),
        ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.820783),
        ([1, 1, 1], [1, 2, 3], 0.0),
        ([3, 2, 1], [1, 2, 9], -1.0),
    ],
)
def test_spearman_takes_mean_ranks(first: list, second: list, expected: float):
    assert spearman(np.array(first), np.array(second)) == pytest.approx(expected, abs=1e-6)


def test_spearman_is_that_of_scipy():
    first, second = RNG.integers(0, 9, 200), RNG.normal(size=200)
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        (np.eye(5), -4.0),  # orthonormal
        (np.array([[1.0, 0], [-1, 0]]), -8.0),  # opposite
        (np.stack([np.cos(np.arange(3) * 2 * np.pi / 3), np.sin(np.arange(3) * 2 * np.pi / 3)], 1), -6.0),  # a triangle
        (np.ones((4, 3)), 0.0),  # all one
    ],
)
def test_uniformity_of_known_sets(vectors: np.ndarray, expected: float):
    found = vector_metrics(vector_sums(jnp.asarray(3 * vectors, jnp.float32), jnp.ones(len(vectors))))["uniformity"]
    assert float(found) == pytest.approx(expected, abs=1e-5)


def test_similarity():
    first, second = np.array([[1.0, 0], [2, 0], [0, 3], [1, 1]]), np.array([[5.0, 0], [1, 1], [0, -1], [1, 0]])
    found = similarity(first, second, np.concatenate([first, second]), np.array([5.0, 4.5, 0.0, 4.0]))
    # the cosines are 1, .7071, -1, .7071: more than 4 of 5 have the first two pairs, 4 itself is no more
    assert found["alignment"] == pytest.approx((0 + 2 - 2**0.5) / 2, abs=1e-6)
    assert found["spearman"] == pytest.approx(stats.spearmanr([1, 0.7, -1, 0.7], [5, 4.5, 0, 4]).statistic, abs=1e-9)
    assert found["pairs"] == 4


def test_what_there_is_nothing_of_is_left_out():
    vectors = np.array([[1.0, 0], [0, 1]])
    for scores in ([0.0, 0.0], [-1.0, -2.0]):
        assert "alignment" not in similarity(vectors, vectors, vectors, np.array(scores))
    one = similarity(vectors[:1], vectors[:1], vectors[:1], np.ones(1))
    assert set(one) == {"spearman", "alignment", "effective_rank", "spread", "pairs"}
    assert all(np.isfinite(value) for value in one.values())


def plain_ranks(first: np.ndarray, second: np.ndarray, one: np.ndarray, two: np.ndarray) -> list[float]:
    unit = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (first, second)]
    found = []
    for i, own in zip(one, two, strict=True):
        cosines = unit[1] @ unit[0][i]
        known = {b for a, b in zip(one, two, strict=True) if a == i}
        found.append(1 + sum(cosines[j] > cosines[own] for j in range(len(second)) if j not in known))
    return found


@pytest.mark.parametrize("limit", [2**27, 4 * 30 * 8, 1])  # at once, in blocks of 8 and of 1; the last is not full
def test_ranks_of_partners_are_those_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch, limit: int):
    monkeypatch.setattr(measure, "SIMILARITY_BYTES", limit)
    first, second = RNG.normal(size=(20, 6)).astype(np.float32), RNG.normal(size=(30, 6)).astype(np.float32)
    one, two = RNG.integers(0, 20, 53), RNG.integers(0, 30, 53)  # many texts are in several pairs, some in none
    found = ranks_of_partners(*map(jnp.asarray, (first, second, one, two)))
    assert found.tolist() == plain_ranks(first, second, one, two)


def test_a_hundred_thousand_pairs_need_no_square():
    vectors, numbers = jax.ShapeDtypeStruct((100_000, 64), jnp.float32), jax.ShapeDtypeStruct((100_000,), jnp.int32)
    compiled = jax.jit(ranks_of_partners).lower(vectors, vectors, numbers, numbers).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2**29  # of 4e10


def test_partners_are_no_wrong_answers_and_a_text_is_one_answer():
    vectors = np.eye(3, dtype=np.float32)
    one, two = np.array([0, 0, 1]), np.array([0, 1, 1])  # (T, p), (T, X), (S, X): of T, X is right wherever it occurs
    nearer = np.array([[0.6, 0.8, 0], [1, 0.1, 0]], np.float32)  # X is nearer to T than p is
    found = retrieval(vectors[:2], nearer, one, two)
    assert found["forward/mrr"] == pytest.approx((1 + 1 + 1 / 2) / 3)  # S finds p before X
    assert found["pairs"] == 3
    one, two = np.arange(6), np.array([0, 1, 1, 1, 1, 1])  # X is in five pairs
    first = np.concatenate([vectors[:1], np.tile(vectors[1:2], (5, 1))])
    assert retrieval(first, nearer, one, two)["forward/recall@5"] == 1.0
    assert ranks_of_partners(*map(jnp.asarray, (first, nearer, one, two))).tolist()[0] == 2.0


def test_vectors_that_are_no_numbers_find_nothing():
    vectors, numbers = np.full((40, 3), np.nan, np.float32), np.arange(40)
    assert retrieval(vectors, vectors, numbers, numbers)["forward/mrr"] == pytest.approx(1 / 40)


def test_collapsed_vectors_find_nothing():
    vectors, numbers = np.ones((40, 3), np.float32), np.arange(40)
    found = retrieval(vectors, vectors, numbers, numbers)
    assert found["forward/recall@10"] == found["backward/recall@10"] == 0.0
    assert found["forward/mrr"] == pytest.approx(1 / 20.5)


def test_directions_differ():
    """Two sources near one target: each finds it, and it finds one of them."""
    first, second = np.eye(2, dtype=np.float32)[[0, 0]], np.array([[1, 0], [0.9, 0.1]], np.float32)
    found = retrieval(first, second, np.arange(2), np.arange(2))
    assert found["forward/recall@1"] == 0.5
    assert found["backward/mrr"] == pytest.approx(1 / 1.5)  # both sources are as near: half is counted


def test_a_task_has_every_text_once(tmp_path):
    tokenizer = byte_tokenizer()
    (tmp_path / "sts.tsv").write_text("4.5\tone\ttwo\n0\ttwo\tthree and more\n")
    (tmp_path / "pairs.tsv").write_text("one\teins\ntwo\teins\n")
    sts = open_task("sts", [str(tmp_path / "sts.tsv")], tokenizer, 5)
    assert (len(sts.texts[0]), len(sts.texts[1]), sts.cut) == (3, 0, 1)
    assert sts.first_N.tolist() == [0, 1]
    assert sts.second_N.tolist() == [1, 2]
    assert max(map(len, sts.texts[0])) == 5
    pairs = open_task("retrieval", [str(tmp_path / "pairs.tsv")], tokenizer, 5)
    assert [len(side) for side in pairs.texts] == [2, 1]
    assert pairs.second_N.tolist() == [0, 0]
    (tmp_path / "b.tsv").write_text((tmp_path / "sts.tsv").read_text())
    entries = [f"sts={tmp_path / 'sts.tsv'}", f"sts={tmp_path / 'b.tsv'}", f"retrieval={tmp_path / 'pairs.tsv'}"]
    assert [task.name for task in open_tasks(entries, tokenizer, 5)] == ["sts/sts", "sts/b", "retrieval"]
    names = ("2012.MSRpar.test.tsv", "2012.OnWN.test.tsv.gz", "v1.jsonl")
    assert [measure._name(f"a.b/{name}") for name in names] == ["2012.MSRpar.test", "2012.OnWN.test", "v1"]
    with pytest.raises(ValueError, match="two tasks would be called 'sts/b'"):
        open_tasks(entries[1:2] * 2, tokenizer, 5)


@pytest.mark.parametrize("entry", ["sts", "sts=", "stss=file.tsv", "=file"])
def test_a_task_that_cannot_be(entry: str):
    with pytest.raises(ValueError, match="write sts=FILE"):
        parse_task(entry)


@pytest.mark.parametrize("entry", ["sts=a.tsv,", "retrieval=a,,b", "sts=,a"])
def test_a_file_without_a_name(entry: str):
    with pytest.raises(ValueError, match="here one has no name"):
        parse_task(entry)
