"""tools/vectors.py: static vectors, the order of its runs, who is asked what, the table and plot of what is done.

And what `jaxpt embed` does with its file, whatever makes the vectors.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from support import tiny_vocab

from jaxpt import cli, embed
from jaxpt.data.build import BuildConfig, build
from jaxpt.data.tokenizer import built_tokenizer, byte_tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import vectors

ASKS = {"stsb": ("sts", ["a.csv"]), "multi30k": ("retrieval", ["a.en", "a.de"])}


@pytest.mark.parametrize("window", [2, None])
def test_near_tokens_are_counted_within_documents(tmp_path: Path, window: int | None):
    texts = ["abcad", "xy", "abca"]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    options = {"document": "line", "model": "byte", "validation": 0.0, "workers": 1}
    manifest = build(BuildConfig(str(tmp_path / "data"), (str(tmp_path / "text.txt"),), **options))
    near = vectors.near_tokens(manifest, window).toarray()
    expected = np.zeros_like(near)
    for text in texts:
        ids = built_tokenizer(manifest).encode(text)[0]
        for i, one in enumerate(ids):
            for j, two in enumerate(ids):
                if i != j and (window is None or abs(i - j) <= window):
                    expected[one, two] += 1 if window is None else 1 / abs(i - j)
    np.testing.assert_allclose(near, expected)


def test_static_vectors_know_what_occurs_together():
    """Two halves of a vocabulary that never meet."""
    rng = np.random.default_rng(0)
    near = np.zeros((40, 40))
    for half in (slice(0, 19), slice(19, 38)):  # the last two tokens never occur
        near[half, half] = rng.integers(1, 9, (19, 19))
    table = vectors.static_vectors(vectors_of_sparse(near + near.T), 8, seed=0)
    assert (table.shape, table.dtype) == ((40, 8), np.float32)
    assert not table[38:].any()
    unit = table[:38] / np.linalg.norm(table[:38], axis=1, keepdims=True)
    cosines = unit @ unit.T
    assert cosines[:19, :19].mean() > 0.2 > 0.05 > abs(cosines[:19, 19:]).mean()


def vectors_of_sparse(dense: np.ndarray):
    from scipy import sparse

    return sparse.csr_matrix(dense)


def test_means_of_static_vectors():
    table = np.eye(4, dtype=np.float32)
    texts = [np.array([0, 1]), np.array([0, 0, 2, 2])]
    np.testing.assert_allclose(vectors.mean_vectors(table, texts, None), [[0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0]])
    counts = np.array([1000, 0, 1, 0])  # the first token says nothing: its weight is 0.001
    sif = vectors.mean_vectors(table, texts, counts)
    whole = np.array([[0.0005, 0.5, 0, 0], [0.0005, 0, 0.25, 0]])
    first = np.linalg.svd(whole)[2][0]
    np.testing.assert_allclose(sif, whole - np.outer(whole @ first, first), atol=2e-3)


def test_who_runs_first_and_who_is_asked_what():
    arms = list(vectors.ARMS)
    first, second = vectors.waves(arms)
    assert sorted(first + second) == sorted(arms)
    assert {vectors.ARMS[name].start for name in second} <= set(first)
    asked = {name: [ask for ask in ASKS if vectors.answers(arm, ask, ASKS)] for name, arm in vectors.ARMS.items()}
    assert asked["simcse"] == asked["static, SIF"] == ["stsb"]
    assert asked["two_tower (multi30k)"] == asked["static, mean (multi30k)"] == ["multi30k"]


def test_every_arm_can_be_built_and_starts_from_what_fits():
    import jax

    vocab = tiny_vocab()
    for arm in vectors.ARMS.values():
        if isinstance(arm, vectors.Arm):
            shapes = jax.eval_shape(arm.objective.build(vocab).init, jax.random.key(0))
            if arm.start:
                theirs = jax.eval_shape(vectors.ARMS[arm.start].objective.build(vocab).init, jax.random.key(0))
                assert jax.tree.map(lambda leaf: leaf.shape, theirs["trunk"]) == jax.tree.map(
                    lambda leaf: leaf.shape, shapes["trunk"]
                )


def test_the_table_has_means_and_ranges_and_a_plot(tmp_path: Path):
    (tmp_path / "results").mkdir()
    for arm, seed, value in [("simcse", 0, 0.5), ("simcse", 1, 0.7), ("untrained", 0, 0.25)]:
        metrics = dict.fromkeys(vectors.SHOWN["sts"], value)
        found = {"arm": arm, "seed": seed, "found": {"stsb": metrics}}
        (tmp_path / "results" / f"{arm}-{seed}.json").write_text(json.dumps(found))
    assert len(vectors.table(Namespace(out=str(tmp_path), ask=ASKS))) == 3
    lines = (tmp_path / "vectors.md").read_text().splitlines()
    assert "| untrained | 25.0 (25.0 to 25.0) | 0.25 (0.25 to 0.25) |" in lines[4]
    assert "| simcse | 60.0 (50.0 to 70.0) | 0.60 (0.50 to 0.70) |" in lines[5]
    assert (tmp_path / "vectors.png").read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------------------------------- jaxpt embed


def given(monkeypatch: pytest.MonkeyPatch, made: np.ndarray | BaseException) -> None:
    """Let a run make these vectors, or fail."""

    def make(*_, into: np.ndarray, **__) -> None:
        if isinstance(made, BaseException):
            raise made
        into[:] = made

    monkeypatch.setattr(embed, "open_trained", lambda *_: nullcontext(Namespace(snapshot=None, mesh=None)))
    monkeypatch.setattr(embed, "_vectors", lambda *_: (Namespace(longest=9), byte_tokenizer()))
    monkeypatch.setattr(embed, "_width", lambda *_: 3)
    monkeypatch.setattr(embed, "make_vectors", make)


def test_embed_tells_of_what_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    made = np.arange(1, 16, dtype=np.float32).reshape(5, 3)
    made[1, 2], made[4, 0] = np.nan, np.inf
    given(monkeypatch, made)
    monkeypatch.setattr(embed, "ROWS", 2)  # blocks, of which the last is not full
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("a\nb\nc\nd\ne\n")
    assert cli.main(["embed", "run", "--input", "in.txt", "--normalize"]) == 0
    assert "warning: 2 of 5 vectors are not finite" in capsys.readouterr().err
    found, kept = np.load("in.txt.npy"), [0, 2, 3]
    np.testing.assert_allclose(found[kept], made[kept] / np.linalg.norm(made[kept], axis=1, keepdims=True), rtol=1e-6)
    given(monkeypatch, np.ones((5, 3), np.float32))
    assert cli.main(["embed", "run", "--input", "in.txt"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert np.load("in.txt.npy").tolist() == np.ones((5, 3)).tolist()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("it broke")])
def test_embed_leaves_no_part_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException):
    given(monkeypatch, error)
    (tmp_path / "in.txt").write_text("a\n")
    with pytest.raises(type(error)):
        embed.embed_run("run", str(tmp_path / "in.txt"), str(tmp_path / "out.npy"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("embed", "run", "--input", "in.txt", "--output", "gone/out.npy"), "there is no folder gone"),
        (("embed", "run", "--input", "in.txt", "--output", "folder.npy"), "is a folder: name a file"),
        (("embed", "run", "--input", "in.txt", "--text", "2"), "--text is 0 or 1"),
        (("embed", "run", "--input", "in.txt", "--batch-size", "0"), "at least 1, not 0"),
        (("embed", "run", "--input", "in.tsv"), "no field 'text' (there is 'id', 'said'; choose with --field"),
        (
            ("evaluate", "run", "--task", "retrieval", "--data", "a.tsv", "--columns", "a", "b", "c"),
            "two of --task retr",
        ),
        (("evaluate", "run", "--task", "sts", "--data", "a.tsv", "--columns", "a", "b"), "--columns are three of"),
    ],
)
def test_mistakes_are_told_before_a_run_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, args: tuple[str, ...], message: str
):
    monkeypatch.setattr(embed, "open_trained", lambda *_: pytest.fail("the run was opened"))
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("a\n")
    Path("in.tsv").write_text("id\tsaid\n1\ta\n")
    Path("folder.npy").mkdir()
    assert cli.main(list(args)) == 2
    assert message in capsys.readouterr().err
