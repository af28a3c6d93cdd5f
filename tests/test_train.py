"""The trunk, end to end on tiny models: metrics, resume, other meshes, refusals, evaluation, transfer."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from support import packed_batch, tiny_vocab

from jaxpt import train as trunk
from jaxpt.checkpoint import Checkpoints
from jaxpt.config import PhaseConfig, RunConfig
from jaxpt.data.build import BuildConfig, build
from jaxpt.data.pipeline import Phase, Pipeline
from jaxpt.models.config import TransformerConfig
from jaxpt.objectives import CausalLM, Consistency, MaskedLM
from jaxpt.objectives.consistency import MovingAverage
from jaxpt.optimizer import OptimizerConfig
from jaxpt.sharding import MeshConfig, make_mesh
from jaxpt.train import evaluate_run, make_parts, open_phases, open_run, step_flops, train
from jaxpt.types import RowSpec

CLOCK = {"tokens_per_second", "mfu", "data_wait", "seconds"}
NETWORK = TransformerConfig(depth=1, width=32, heads=2, max_length=64, dropout=0.1, layers="unroll")
NAMES = ("cat", "dog", "owl", "fox", "hen", "bee", "ant", "elk")
VERBS = ("sees", "likes", "hears", "finds", "meets", "helps")


def texts(seed: int, documents: int) -> str:
    rng = random.Random(seed)
    sentence = lambda: f"The {rng.choice(NAMES)} {rng.choice(VERBS)} the {rng.choice(NAMES)}."  # noqa: E731
    return "".join(" ".join(sentence() for _ in range(rng.randint(2, 9))) + "\n" for _ in range(documents))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(texts(0, 400))
    out = folder / "built"
    build(BuildConfig(out=str(out), input=(str(folder / "text.txt"),), document="line", model="byte", validation=0.1))
    return str(out)


def config_of(data: str, out: Path, **changes) -> RunConfig:
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=4, schedule="linear", averaging=0.9)
    settings = {
        "objective": MaskedLM(encoder=NETWORK),
        "data": (data,),
        "steps": 12,
        "batch_size": 8,
        "seq_len": 64,
        "mesh": MeshConfig(data=1, fsdp=4, tensor=2),
        "optimizer": optimizer,
        "log_every": 1,
        "eval_every": 6,
        "eval_rows": 13,
        "checkpoint_every": 5,
        "out": str(out),
    }
    return RunConfig(**settings | changes)


def lines(out: Path, evaluations: bool = True) -> list[dict]:
    kept = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in line.items() if name not in CLOCK} for line in kept]
    return kept if evaluations else [line for line in kept if "loss" in line]


@pytest.fixture(scope="module")
def finished(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run on eight devices."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train(config_of(data, out)) == 0
    return out


class StopAt:
    """A SIGTERM that arrives during a given step."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self) -> StopAt:
        return self

    def __enter__(self) -> StopAt:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def requested(self, step: int) -> bool:
        return step == self.step


def test_a_run_directory_holds_what_it_should(finished: Path):
    there = {path.name for path in finished.iterdir()}
    assert there >= {"config.json", "vocab", "metrics.jsonl", "checkpoints", "loss.png"}
    assert any((finished / "tensorboard").iterdir())
    training = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    first, evaluation = training[0], next(line for line in training if "eval/loss" in line)
    wanted = {"step", "loss", "loss/mlm", "accuracy", "learning_rate", "grad_norm", "skipped_steps"} | CLOCK
    assert wanted <= set(first)
    assert {"eval/loss", "eval/perplexity", "eval/accuracy", "eval/unigram_loss"} <= set(evaluation)
    assert [line["step"] for line in training if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in training if "eval/loss" in line] == [6, 12]
    steps = {int(path.name) for path in (finished / "checkpoints").iterdir() if path.name.isdigit()}
    assert steps == {10, 12}
    assert abs(first["loss"] - np.log(363)) < 1.0  # about ln V
    assert first["learning_rate"] == 0.0
    assert training[3]["learning_rate"] == pytest.approx(3e-3 * 3 / 4)


@pytest.mark.parametrize("stop", [3, 7])
def test_resumed_digit_for_digit(finished: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int):
    config = config_of(data, tmp_path / "run", preemption_exit_code=75)
    monkeypatch.setattr(trunk, "Preemption", StopAt(stop))
    assert train(config) == 75
    monkeypatch.undo()
    assert lines(tmp_path / "run")[-1]["step"] == stop
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": 3')  # what a kill leaves
    assert train(config) == 0
    assert lines(tmp_path / "run") == lines(finished)


@pytest.mark.parametrize(
    ("mesh", "microbatches"),
    [
        pytest.param(MeshConfig(data=8), 1, marks=pytest.mark.slow),
        (MeshConfig(data=1, fsdp=2, tensor=4), 2),
    ],
    ids=str,
)
def test_other_meshes_and_microbatches_agree(
    finished: Path, data: str, tmp_path: Path, mesh: MeshConfig, microbatches: int
):
    assert train(config_of(data, tmp_path / "run", mesh=mesh, microbatches=microbatches)) == 0
    want, got = lines(finished), lines(tmp_path / "run")
    for a, b in zip(want, got, strict=True):
        assert a.keys() == b.keys()
        key = "loss" if "loss" in a else "eval/loss"
        assert b[key] == pytest.approx(a[key], rel=1e-5)


def test_resumes_on_another_mesh(finished: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_of(data, tmp_path / "run")
    monkeypatch.setattr(trunk, "Preemption", StopAt(6))
    train(config)
    monkeypatch.undo()
    assert train(dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=4), microbatches=1)) == 0
    want, got = lines(finished, evaluations=False), lines(tmp_path / "run", evaluations=False)
    assert got[:6] == want[:6]
    np.testing.assert_allclose([line["loss"] for line in got], [line["loss"] for line in want], rtol=1e-5)


def test_diagnosing_changes_nothing_and_its_interval_may_change(
    finished: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    config = config_of(data, tmp_path / "run", diagnose_every=3)
    monkeypatch.setattr(trunk, "Preemption", StopAt(4))
    train(config)
    monkeypatch.undo()
    assert train(dataclasses.replace(config, diagnose_every=5)) == 0
    found = lines(tmp_path / "run")
    diagnosed = {line["step"]: line for line in found if "diagnostics/curvature/top" in line}
    assert [line for line in found if line["step"] not in diagnosed or "loss" in line or "eval/loss" in line] == (
        lines(finished)
    )
    assert list(diagnosed) == [3, 5, 10]
    wanted = {"noise_floor/mlm", "noise_floor/mlm/trunk/layers/0", "curvature/gradient", "curvature/trace_error"}
    for line in diagnosed.values():
        assert {f"diagnostics/{name}" for name in wanted} <= line.keys()
        assert all(value is not None for value in line.values())
        assert -1 <= line["diagnostics/noise_floor/mlm"] <= 1
    said = capsys.readouterr().out
    assert "diagnostics of step 3/12  noise_floor/mlm " in said
    assert "trunk/layers" not in said


def test_evaluate_gives_what_training_gave(finished: Path):
    last = lines(finished)[-1]
    metrics = evaluate_run(str(finished), rows=13)
    assert metrics.pop("step") == 12
    for name, value in metrics.items():
        assert value == pytest.approx(last[f"eval/{name}"], rel=1e-5), name
    assert evaluate_run(str(finished), rows=13, step=10)["loss"] != metrics["loss"]
    with pytest.raises(ValueError, match="not the directory of a run"):
        evaluate_run(str(finished.parent))


def phased(data: str, out: Path, **changes) -> RunConfig:
    """Rows grow from 32 to 64 tokens and batches from 8 to 16 rows, under schedule-free AdamW."""
    settings = {
        "steps": 14,
        "seq_len": 32,
        "mesh": MeshConfig(data=8),
        "phases": (PhaseConfig(4, seq_len=64), PhaseConfig(8, batch_size=16, learning_rate=1.5)),
        "optimizer": OptimizerConfig("schedule_free", learning_rate=3e-3, warmup_steps=2, schedule="constant"),
        "eval_every": 0,
        "eval_rows": 8,
        "checkpoint_every": 3,
    }
    return config_of(data, out, **settings | changes)


@pytest.fixture(scope="module")
def grown(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "grown"
    step = trunk.make_train_step
    with pytest.MonkeyPatch.context() as patch:  # one compilation per shape of the batch
        patch.setattr(trunk, "make_train_step", lambda *a, **k: chex.assert_max_traces(step(*a, **k), 3))
        assert train(phased(data, out)) == 0
    return out


def test_phases_grow_rows_and_batches(grown: Path):
    found = [line for line in lines(grown) if "loss" in line]
    assert [line["step"] for line in found] == list(range(1, 15))
    rate = [line["learning_rate"] for line in found]
    assert rate[:8] == pytest.approx([0, 1.5e-3] + [3e-3] * 6)
    assert rate[8:] == pytest.approx([4.5e-3] * 6)
    assert np.mean([line["loss"] for line in found[-3:]]) < found[0]["loss"] - 0.3
    whole = [json.loads(line) for line in (grown / "metrics.jsonl").read_text().splitlines()]
    assert all(line["tokens_per_second"] > 0 and 0 < line["mfu"] < 10 for line in whole if "loss" in line)


@pytest.mark.filterwarnings("ignore:builtin type event_stats")  # jaxlib's own, on Python 3.12
@pytest.mark.parametrize("stop", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_a_killed_run_goes_on_across_phases_and_a_trace_changes_nothing(
    grown: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, stop: int
):
    config = phased(data, tmp_path / "run")
    monkeypatch.setattr(trunk, "Preemption", StopAt(stop))
    train(config)
    monkeypatch.undo()
    assert train(dataclasses.replace(config, profile=2)) == 0
    assert lines(tmp_path / "run") == lines(grown)
    said = capsys.readouterr().out
    assert f"traced steps {stop + 4} to {stop + 5}: " in said
    assert f"xprof --logdir={tmp_path / 'run' / 'profile'}" in said.replace("\n", "")
    (trace,) = (tmp_path / "run" / "profile" / "plugins" / "profile").glob("*/*.xplane.pb")
    events = [
        (event.name, dict(event.stats))
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
    ]
    assert {stats.get("step_num") for name, stats in events if name == "train"} == {stop + 4, stop + 5}
    assert len(events) > 100


@pytest.mark.parametrize("objective", [MaskedLM, CausalLM])
def test_flops_of_a_step_do_not_depend_on_the_form_of_attention(objective: type):
    rows, length, width, depth = 2, 1024, 32, 3
    vocab, mesh = tiny_vocab(64), make_mesh(MeshConfig(data=1), jax.devices()[:1])
    found = {}
    for form in ("dense", "auto", "blockwise"):
        network = dataclasses.replace(NETWORK, depth=depth, max_length=length, attention=form)
        parts = make_parts(RunConfig(objective(network)), vocab, mesh)
        row = packed_batch(parts.objective.rows, vocab, length)
        found[form] = step_flops(parts, row, Phase(0, (), length, rows))
    layer = 2 * rows * length * 12 * width**2 + 4 * rows * length**2 * width
    assert found["dense"] == found["auto"] == found["blockwise"]
    assert 3 * depth * layer < found["dense"] < 3 * depth * layer * 1.1  # the head has the rest


def test_schedule_free_is_judged_by_its_average(grown: Path, data: str, tmp_path: Path, monkeypatch, capsys):
    found = evaluate_run(str(grown), rows=8)
    assert found["loss"] == pytest.approx(lines(grown)[-1]["eval/loss"], rel=1e-5)
    # another run begins at the average, and so does what schedule-free averages; its first update has rate 0
    monkeypatch.setattr(trunk, "Preemption", StopAt(1))
    later = phased(data, tmp_path / "later", init_from=str(grown), phases=(), profile=1)
    train(later)
    assert "nothing was traced: --profile begins after 3 steps" in capsys.readouterr().out
    parts = trunk.make_parts(later, Pipeline(open_phases(later), RowSpec(), 0).vocab, make_mesh(later.mesh))
    with Checkpoints(grown / "checkpoints") as before, Checkpoints(tmp_path / "later" / "checkpoints") as after:
        average = before.restore_params(parts.abstract.params, averaged=True).state
        raw = before.restore_params(parts.abstract.params).state
        state = after.restore(parts.abstract).state
    for now in (state.params, state.averaged, state.opt_state.z):
        chex.assert_trees_all_close(now, average, rtol=1e-5, atol=1e-7)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: abs(a - b).max(), raw, average))) > 1e-3


def test_refusals(finished: Path, data: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"finished at step 12: raise --steps"):
        train(config_of(data, finished))
    changed = config_of(data, finished, steps=14, objective=MaskedLM(encoder=NETWORK, rate=0.3))
    with pytest.raises(ValueError, match=r"objective.rate: 0.15 in the run, 0.3 now"):
        train(changed)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files and is not a run directory"):
        train(config_of(data, tmp_path))
    with pytest.raises(ValueError, match="make it a multiple of"):
        train(config_of(data, tmp_path / "run", batch_size=6))
    with pytest.raises(ValueError, match=r"init_from: .* is not the directory of a run"):
        train(config_of(data, tmp_path / "run", init_from=str(tmp_path)))


def test_a_finished_run_goes_on_with_more_steps(finished: Path, data: str, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "run")
    assert train(config_of(data, tmp_path / "run", steps=14)) == 0
    assert lines(tmp_path / "run")[-1]["step"] == 14


def test_another_objective_starts_from_a_run(finished: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    """A causal LM from a masked one: the network is taken, the head is not; and it learns."""
    config = config_of(
        data,
        tmp_path / "causal",
        objective=CausalLM(decoder=NETWORK, z_loss=1e-4),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        steps=300,
        log_every=10,
        eval_every=0,
        init_from=str(finished),
    )
    assert train(config) == 0
    said = capsys.readouterr().out
    assert f"of {finished}, step 12" in said
    assert "not taken: head/transform/kernel" in said
    assert "taken: trunk/embed/tokens" in said
    assert "not taken: trunk" not in said
    assert "another tokenizer" not in said
    last = lines(tmp_path / "causal")[-1]
    assert last["eval/loss"] < last["eval/unigram_loss"] - 0.5
    # every scored byte is a token here, but for the EOS of each document
    assert last["eval/bits_per_byte"] == pytest.approx(last["eval/loss"] / np.log(2), rel=0.1)
    assert {"loss/lm", "loss/z_loss"} <= lines(tmp_path / "causal")[0].keys()

    strange = MaskedLM(encoder=dataclasses.replace(NETWORK, width=16))
    with pytest.raises(ValueError, match=r"trunk/embed/tokens: .* here, .* in the checkpoint"):
        train(config_of(data, tmp_path / "strange", objective=strange, init_from=str(finished)))


def test_a_teacher_begins_as_what_was_taken(finished: Path, data: str, tmp_path: Path):
    objective = Consistency(encoder=NETWORK, teacher=MovingAverage())
    config = config_of(data, tmp_path / "taught", objective=objective, init_from=str(finished))
    mesh, phases = make_mesh(config.mesh), open_phases(config)
    with jax.set_mesh(mesh), Checkpoints(tmp_path / "none") as store:
        state = open_run(config, None, phases, mesh, store).state
    embedded = state.params["trunk"]["embed"]["tokens"]
    assert any(leaf.shape == embedded.shape and np.array_equal(leaf, embedded) for leaf in jax.tree.leaves(state.carry))


def test_a_run_that_keeps_failing_stops(data: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    optimizer = OptimizerConfig(learning_rate=1e30, schedule="constant", clip_norm=None)
    config = config_of(data, tmp_path / "run", optimizer=optimizer, max_failing=3, checkpoint_every=1, eval_every=0)
    assert train(config) == 1
    said = capsys.readouterr().out
    assert "3 steps in a row had a gradient that is not finite" in said
    assert "the last good checkpoint is" in said
    assert lines(tmp_path / "run")[-1]["loss"] is None


def test_an_alarm_of_the_objective_is_said_once(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A metric under "alarm/", whatever the objective; here one that no network can please."""
    network = dataclasses.replace(NETWORK, dropout=0.0)
    objective = Consistency(encoder=network, alarm=100.0, alarm_after=1)
    changes = {"steps": 5, "eval_every": 0, "eval_rows": 8}
    assert train(config_of(data, tmp_path / "run", objective=objective, **changes)) == 0
    said = capsys.readouterr().out
    assert "ALARM at step 2: alarm/collapse" in said
    assert said.count("ALARM") == 1
    assert [line["alarm/collapse"] for line in lines(tmp_path / "run", evaluations=False)] == [0, 1, 1, 1, 1]
