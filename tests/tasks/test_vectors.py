"""Vectors of texts: of which objectives, in which order, of what alone they depend on; the commands that make them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny, tiny_vocab

from jaxpt import cli
from jaxpt.config import RunConfig, save
from jaxpt.data.build import BuildConfig, build
from jaxpt.models.config import TransformerConfig
from jaxpt.models.sharing import complete
from jaxpt.objectives import (
    OBJECTIVES,
    CausalLM,
    MaskedLM,
    Multitask,
    ReplacedTokenDetection,
    SimCSE,
    SpanCorruption,
)
from jaxpt.objectives.combine import Task
from jaxpt.optimizer import OptimizerConfig
from jaxpt.sharding import MeshConfig, make_mesh
from jaxpt.tasks.vectors import encode, make_vectors, text_rows, vectors_of
from jaxpt.train import train
from jaxpt.types import Snapshot

VOCAB = tiny_vocab()
NETWORK = TransformerConfig(depth=1, width=16, heads=2, positions="rotary", layers="unroll")
MESH = make_mesh(MeshConfig(data=2, fsdp=4))
WITHOUT = {
    "denoising",
    "gap_sentences",
    "mass",
    "seq2seq",
    "span_corruption",
}  # two stacks, and no vectors of their own
RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(10, 50, size) for size in (3, 30, 14, 1, 15, 9, 2, 5)]


def snapshot_of(config) -> Snapshot:
    return Snapshot(config.build(VOCAB).init(jax.random.key(0)), {}, jnp.int32(0))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_vectors_or_says_that_it_has_none(name: str):
    config = tiny(OBJECTIVES[name]()).for_evaluation()
    if name in WITHOUT:
        with pytest.raises(ValueError, match="continue the run by an objective that makes them"):
            vectors_of(config, VOCAB, 24, MESH)
        return
    objective = config.build(VOCAB)
    vectors = vectors_of(config, VOCAB, 24, MESH)

    def embed(key: jax.Array) -> jax.Array:
        params = objective.init(key)
        carry = objective.start(params, key) if objective.start else {}
        batch = text_rows([[*vectors.before, 20, 21, *vectors.after]], 8, vectors.longest, VOCAB.pad)
        return vectors.embed(Snapshot(params, carry, jnp.int32(0)), batch, 0)

    made = jax.eval_shape(embed, jax.random.key(0))
    assert made.shape[0] == 8
    assert made.ndim == 2
    assert made.dtype == jnp.float32


def vector_of(config, params: dict) -> np.ndarray:
    vectors = vectors_of(config.for_evaluation(), VOCAB, 24, MESH)
    batch = text_rows([[*vectors.before, 20, 21, *vectors.after]], 1, 16, VOCAB.pad)
    return np.asarray(vectors.embed(Snapshot(params, {}, jnp.int32(0)), batch, 0))


def test_tables_that_another_network_owns_are_read():
    """DeBERTaV3's trunk has no tables of its own: the generator's and what it learns beside them."""
    config = ReplacedTokenDetection(encoder=NETWORK, generator=NETWORK, embeddings="gradient_disentangled")
    params = config.build(VOCAB).init(jax.random.key(0))
    whole = complete(params)[0]
    assert "tokens" not in params["trunk"].get("embed", {})
    alone = {"trunk": whole, "head": MaskedLM(encoder=NETWORK).build(VOCAB).init(jax.random.key(1))["head"]}
    np.testing.assert_allclose(vector_of(config, params), vector_of(MaskedLM(encoder=NETWORK), alone), atol=1e-6)


def test_a_part_is_read_by_its_own_network():
    """Where the first part of a combination keeps its trunk to itself, the others' says nothing of it."""
    parts = Task("a", MaskedLM(encoder=NETWORK), own=("trunk", "head")), Task("b", CausalLM(decoder=NETWORK))
    config = Multitask((Task("in", Multitask(parts, rows="a"), own=("a_trunk",)),), rows="in")
    params = config.build(VOCAB).init(jax.random.key(0))
    assert set(params) == {"in_a_trunk", "a_head", "trunk", "head"}
    alone = {"trunk": params["in_a_trunk"], "head": params["a_head"]}
    np.testing.assert_allclose(vector_of(config, params), vector_of(parts[0].objective, alone), atol=1e-6)


def test_a_vector_is_that_of_its_text_alone():
    config = SimCSE(encoder=NETWORK)
    vectors = vectors_of(config.for_evaluation(), VOCAB, 32, MESH)
    snapshot = snapshot_of(config)
    done: list[int] = []
    with jax.set_mesh(MESH):
        made = make_vectors(vectors, snapshot, TEXTS, MESH, batch_size=3, progress=done.append)
        turned = make_vectors(vectors, snapshot, TEXTS[::-1], MESH, batch_size=64)
        for place in (1, 4):
            alone = make_vectors(vectors, snapshot, TEXTS[place : place + 1], MESH)
            np.testing.assert_allclose(alone[0], made[place], atol=1e-6)
    np.testing.assert_allclose(turned[::-1], made, atol=1e-6)
    assert sum(done) == len(TEXTS)
    assert made.dtype == np.float32
    assert len(np.unique(made.round(3), axis=0)) == len(TEXTS)


def test_what_is_pooled():
    config = MaskedLM(encoder=NETWORK)
    snapshot, texts = snapshot_of(config), [np.array([20, 21, 22]), np.array([20, 30, 31, 32, 33])]
    with jax.set_mesh(MESH):
        made = {
            pooling: make_vectors(vectors_of(config, VOCAB, 24, MESH, pooling), snapshot, texts, MESH)
            for pooling in (None, "mean", "first")
        }
        # a decoder's first token sees nothing of what comes, an encoder's does
        decoder = CausalLM(decoder=NETWORK)
        firsts = make_vectors(vectors_of(decoder, VOCAB, 24, MESH, "first"), snapshot_of(decoder), texts, MESH)
    np.testing.assert_array_equal(made[None], made["mean"])
    assert abs(made["mean"] - made["first"]).max() > 0.01
    assert abs(made["first"][0] - made["first"][1]).max() > 0.001
    np.testing.assert_allclose(firsts[0], firsts[1], atol=1e-6)
    vectors = vectors_of(config, VOCAB, 24, MESH)
    assert (vectors.before, vectors.after, vectors.longest) == ((VOCAB.cls,), (VOCAB.sep,), 22)


def test_a_combination_has_the_vectors_of_its_part():
    alone = SimCSE(encoder=NETWORK, mlp="always")
    both = Multitask((Task("mlm", MaskedLM(encoder=NETWORK), own=("trunk",)), Task("vectors", alone)), rows="vectors")
    snapshot = snapshot_of(both)
    own = snapshot._replace(params={name: snapshot.params[name] for name in ("trunk", "mlp")})
    with jax.set_mesh(MESH):
        expected = make_vectors(vectors_of(alone, VOCAB, 24, MESH), own, TEXTS[2:5], MESH)
        made = make_vectors(vectors_of(both, VOCAB, 24, MESH), snapshot, TEXTS[2:5], MESH)
    np.testing.assert_array_equal(made, expected)
    with pytest.raises(ValueError, match="leave --pooling out"):
        vectors_of(both, VOCAB, 24, MESH, "mean")


# ----------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of some steps, measured by a task at its end."""
    folder = tmp_path_factory.mktemp("run")
    words = ("cat", "dog", "owl", "fox", "hen", "bee", "ant", "elk")
    lines = [f"The {a} sees the {b} and the {c}." for a in words for b in words for c in words[:3]]
    (folder / "text.txt").write_text("\n".join(lines))
    data = str(folder / "data")
    build(BuildConfig(data, (str(folder / "text.txt"),), document="line", model="byte", validation=0.2, workers=1))
    (folder / "sts.tsv").write_text("".join(f"{len({*a.split()} & {*b.split()})}\t{a}\t{b}\n" for a, b in
                                            zip(lines[:40], lines[40:80], strict=True)))  # fmt: skip
    (folder / "pairs.tsv").write_text("".join(f"{line}\t{line.upper()}\n" for line in lines[:30]))
    (folder / "lines.txt").write_text("\n".join([*lines[:9], "long " * 20]))
    train(
        RunConfig(
            objective=SimCSE(encoder=NETWORK, pooling="mean"),
            data=(data,),
            steps=2,
            batch_size=8,
            seq_len=48,
            optimizer=OptimizerConfig(warmup_steps=1),
            tasks=(f"sts={folder / 'sts.tsv'}", f"retrieval={folder / 'pairs.tsv'}"),
            eval_rows=8,
            out=str(folder / "run"),
        )
    )
    return folder


def command(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


def test_tasks_are_measured_in_training_as_afterwards(run: Path, capsys):
    lines = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    (during,) = [line for line in lines if "eval/sts/spearman" in line]
    assert during["eval/loss"] > 0
    for task, file in (("sts", "sts.tsv"), ("retrieval", "pairs.tsv")):
        assert command("evaluate", run / "run", "--task", task, "--data", run / file, "--json") == 0
        after = json.loads(capsys.readouterr().out)
        assert after.pop("step") == 2
        told = {name.removeprefix(f"eval/{task}/"): value for name, value in during.items() if f"eval/{task}/" in name}
        assert told == pytest.approx(after, abs=1e-5)
        assert len(after) > 6
    assert command("evaluate", run / "run", "--rows", 8) == 0  # and the loss as ever
    assert "text_accuracy" in capsys.readouterr().out


def test_embed_writes_the_vectors_in_order(run: Path, capsys):
    assert command("embed", run / "run", "--input", run / "lines.txt", "--output", run / "a.npy") == 0
    assert "10 vectors of 16 numbers; 1 were longer than 46 tokens and were cut" in capsys.readouterr().out
    made = np.load(run / "a.npy")
    assert (made.shape, made.dtype) == ((10, 16), np.float32)
    options = ("--batch-size", 3, "--normalize", "--pooling", "mean")
    assert command("embed", run / "run", "--input", run / "lines.txt", "--output", run / "b.npy", *options) == 0
    unit = made / np.linalg.norm(made, axis=1, keepdims=True)
    np.testing.assert_allclose(np.load(run / "b.npy"), unit, atol=1e-6)
    records = [json.dumps({"t": line}) for line in reversed((run / "lines.txt").read_text().splitlines())]
    (run / "lines.jsonl").write_text("\n".join(records))
    assert command("embed", run / "run", "--input", run / "lines.jsonl", "--field", "t", "--pooling", "first") == 0
    assert abs(np.load(run / "lines.jsonl.npy")[::-1] - made).max() > 0.01
    assert not list(run.glob("*.part"))


def test_the_data_of_a_run_are_not_needed_afterwards(run: Path, tmp_path: Path, capsys):
    (tmp_path / "lines.txt").write_text("The cat sees the dog.\nThe owl.\n")
    ask = ("--input", tmp_path / "lines.txt", "--output")
    assert command("embed", run / "run", *ask, tmp_path / "a.npy") == 0
    other = str(tmp_path / "other")
    text = (str(run / "text.txt"),)
    (tmp_path / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "owl")))
    build(BuildConfig(other, text, document="line", tokenizer=str(tmp_path / "vocab.txt"), workers=1))
    data, moved = run / "data", tmp_path / "moved"
    data.rename(moved)
    try:
        shutil.copytree(run / "run", tmp_path / "run")
        assert command("embed", tmp_path / "run", *ask, tmp_path / "b.npy") == 0
        assert (np.load(tmp_path / "a.npy") == np.load(tmp_path / "b.npy")).all()
        capsys.readouterr()
        assert command("evaluate", tmp_path / "run", "--rows", 8, "--data", moved, "--json") == 0
        assert json.loads(capsys.readouterr().out)["loss"] > 0
        assert command("evaluate", tmp_path / "run") == 2
        assert f"{data} holds no finished data build" in capsys.readouterr().err.replace("\n", " ")
        assert command("evaluate", tmp_path / "run", "--data", other) == 2
        assert "were built with different tokenizers" in capsys.readouterr().err
        shutil.rmtree(tmp_path / "run" / "vocab")
        assert command("embed", tmp_path / "run", *ask, tmp_path / "c.npy") == 2
        assert "lacks vocab/, the tokenizer" in capsys.readouterr().err
        with pytest.raises(ValueError, match="has no documents"):
            train(RunConfig(SimCSE(encoder=NETWORK), (str(run / "run" / "vocab"),), out=str(tmp_path / "new")))
    finally:
        moved.rename(data)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("embed", "RUN", "--input", "gone.txt"), "there is no such file"),
        (("embed", "RUN", "--input", "lines.txt", "--output", "lines.vec"), "name a file that ends so"),
        (("embed", "RUN", "--input", "lines.txt", "--batch-size", "0"), "at least 1"),
        (("embed", "nowhere", "--input", "lines.txt"), "is not the directory of a run"),
        (("evaluate", "RUN", "--task", "sts"), "give --data FILE"),
        (("evaluate", "RUN", "--task", "sts", "--data", "pairs.tsv"), "line 1 has 2 columns, not 3"),
        (("evaluate", "RUN", "--task", "sts", "--data", "sts.tsv", "--columns", "a"), "--columns are three"),
        (("evaluate", "RUN", "--pooling", "mean"), "are for --task"),
    ],
)
def test_mistakes_are_told(run: Path, capsys, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], message: str):
    monkeypatch.chdir(run)
    assert command(*(("run" if arg == "RUN" else arg) for arg in args)) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_vectors_says_so_before_it_trains(run: Path, tmp_path: Path):
    config = RunConfig(
        tiny(SpanCorruption()), (str(run / "data"),), tasks=(f"sts={run / 'sts.tsv'}",), out=str(tmp_path / "run")
    )
    with pytest.raises(ValueError, match="SpanCorruption has no vectors of texts"):
        train(config)
    config_file = tmp_path / "config.json"
    save(config, config_file)  # tasks are part of what is saved
    assert json.loads(config_file.read_text())["tasks"] == list(config.tasks)
    with pytest.raises(ValueError, match="no file gone"):
        train(RunConfig(SimCSE(encoder=NETWORK), (str(run / "data"),), tasks=("sts=gone.tsv",), out=str(tmp_path)))


def test_texts_without_tokens():
    from jaxpt.data.tokenizer import byte_tokenizer

    tokens, cut = encode(byte_tokenizer(), ["abc", "abcdef"], 4)
    assert ([len(each) for each in tokens], cut) == ([3, 4], 1)
    with pytest.raises(ValueError, match=r"text 2 .* has no tokens"):
        encode(byte_tokenizer(), ["a", ""], 4)
