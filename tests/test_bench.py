"""The benchmark's plain step computes what jaxpt computes, and its processes answer."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import chex
import jax
import jax.numpy as jnp
import pytest

from jaxpt.step import make_example
from jaxpt.types import Snapshot

TOOLS = Path(__file__).resolve().parent.parent / "tools"
VOCAB, LENGTH = 61, 20


@pytest.fixture
def bench_jax(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("bench_jax")


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_plain_step_does_the_same_work(bench_jax: ModuleType, family: str) -> None:
    spec = {"model": f"{family}-2x128", "dtype": "float32", "dropout": 0.0, "clip": None, "layers": "unroll"}
    spec |= {"length": LENGTH, "tokens": 3 * LENGTH, "vocab": VOCAB}
    heads = bench_jax.network(spec).heads
    assert heads == 2
    objective = bench_jax.run_config(spec).objective.build(bench_jax.random_vocab(VOCAB))
    params = jax.jit(objective.init)(jax.random.key(1))
    params = jax.tree.map(lambda leaf: leaf + 0.05 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    snapshot = Snapshot(params, {}, jnp.int32(0))
    batch = jax.tree.map(jnp.asarray, bench_jax.random_batches(spec)[0])
    example = make_example(objective, snapshot, batch, jax.random.key(2))
    (weights,) = example.weights.values()

    def ours(params):
        out = objective.loss(snapshot._replace(params=params), example, jax.random.split(jax.random.key(3), 3))
        return jnp.sum(sum(out.losses.values()) * weights) / weights.sum()

    loss, grads = jax.jit(jax.value_and_grad(ours))(params)
    inputs = example.inputs
    plain = {
        "tokens": inputs["tokens"],
        "targets": inputs["targets"],
        "weights": weights,
        "segments": batch.segment_ids,
    }
    plain |= {"positions": inputs["target_positions"]} if family == "bert" else {}
    for tricks in (frozenset(bench_jax.TRICKS), frozenset()):

        def hand_written(params, tricks=tricks):
            tree = bench_jax.plain_params(params, tricks)
            return bench_jax.plain_loss(tree, plain, heads=heads, dtype="float32", tricks=tricks)

        its_loss, its_grads = jax.jit(jax.value_and_grad(hand_written))(params)
        chex.assert_trees_all_close(its_loss, loss, rtol=1e-6)
        chex.assert_trees_all_close(its_grads, grads, rtol=1e-4, atol=1e-5)


def test_the_plain_masking_hides_a_fixed_share(bench_jax: ModuleType) -> None:
    tokens = jnp.full((8, 100), 7).at[:, 0].set(2).at[:, -1].set(3)
    made = bench_jax.plain_masking(jax.random.key(0), tokens, 0.15, bench_jax.MASK, bench_jax.FIRST, 1000)
    assert made["positions"].shape == (8, 15)
    assert (made["targets"] == 7).all()  # neither [CLS] nor [SEP]
    seen = jnp.take_along_axis(made["tokens"], made["positions"], 1)
    assert 0.6 < (seen == bench_jax.MASK).mean() < 0.95
    assert ((made["tokens"] != tokens).sum(1) <= 15).all()


@pytest.mark.slow
def test_contenders_take_turns(bench_jax: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = importlib.import_module("bench")
    report = tmp_path / "bench.json"
    command = "step --device cpu --models gpt2-1x64 --lengths 16 --tokens 32 --rounds 2 --steps 1 --json"
    assert bench.main([*command.split(), str(report), "--sides", "jaxpt-f32", "plain-bf16"]) == 0
    results = json.loads(report.read_text())["results"]
    assert [result["side"] for result in results] == ["jaxpt-f32", "plain-bf16"]
    losses = [[turn["loss"] for turn in result["turns"]] for result in results]
    assert losses[0] == pytest.approx(losses[1], abs=0.1)  # the same start; ln 50,257 = 10.8
    assert all(turn["tokens"] == 32 for result in results for turn in result["turns"])
    assert capsys.readouterr().out.count("\n") == 4  # a head, a rule and two lines
