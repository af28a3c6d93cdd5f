"""Two real processes: one is asked to stop, one is killed, and a single process ends the run with the same numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from jaxpt.config import load_config
from jaxpt.data.build import BuildConfig, build
from jaxpt.train import train

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 100.0  # seconds for any one wait; far more than it takes

CONFIG = """
from jaxpt.config import RunConfig
from jaxpt.models.config import TransformerConfig
from jaxpt.objectives import MaskedLM
from jaxpt.optimizer import OptimizerConfig
from jaxpt.sharding import MeshConfig


def config():
    network = TransformerConfig(depth=1, width=32, heads=2, max_length=32, dropout=0.1, layers="unroll")
    return RunConfig(
        objective=MaskedLM(encoder=network), data=({data!r},), steps=40, batch_size=8, seq_len=32,
        mesh=MeshConfig(data=-1, fsdp=2, tensor=2), log_every=1, eval_every=0, eval_rows=8, checkpoint_every=5,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=4), preemption_exit_code=75,
    )
"""
# The command line, at most ten steps a second so that a signal comes before the end, and then what the steps were fed.
CHILD = """
import functools, json, sys, time
import jax
from jaxpt import cli, config
from jaxpt.checkpoint import Preemption

sys.path.insert(0, {tools!r})
from torture import example_digests

# 100 by default: how long the others wait for one that has died
jax.distributed.initialize = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=20)
ask = Preemption.requested
Preemption.requested = lambda self, step: time.sleep(0.1) or ask(self, step)
code = cli.main(["train", {config!r}, "--out", {out!r}, "--distributed"])
print("digests", json.dumps(example_digests(config.load({out!r} + "/config.json"), 8)), flush=True)
sys.exit(code)
"""


class Pair:
    """The two processes of one start of the run, two devices each; killed on leaving, whatever happens."""

    def __init__(self, folder: Path, config: Path, out: Path, name: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        code = CHILD.format(tools=str(ROOT / "tools"), config=str(config), out=str(out))
        self.logs = [folder / f"{name}.{index}.log" for index in range(2)]
        self.processes = []
        for index, log in enumerate(self.logs):
            env = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "2",
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
                "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }
            with log.open("wb") as output:
                command = [sys.executable, "-c", code]
                self.processes.append(
                    subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
                )

    def said(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in self.logs)

    def wait_for(self, what: str) -> None:
        """Until process 0 has said it."""
        deadline = time.monotonic() + PATIENCE
        while what not in self.logs[0].read_text(errors="replace"):
            ended = [process.poll() for process in self.processes]
            assert ended == [None, None] and time.monotonic() < deadline, (
                f"waiting for {what!r}: {ended}\n{self.said()}"
            )
            time.sleep(0.05)

    def codes(self) -> list[int]:
        try:
            return [process.wait(PATIENCE) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a process did not end\n{self.said()}") from None

    def kill(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def two_processes(folder: Path, config: Path, out: Path, name: str) -> Iterator[Pair]:
    pair = Pair(folder, config, out, name)
    try:
        yield pair
    finally:
        pair.kill()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    lines = (f"Line {i} says {i * i} and {i * 7 % 31}, then {i * 13 % 101} again.\n" for i in range(300))
    (folder / "text.txt").write_text("".join(lines))
    data = folder / "built"
    build(BuildConfig(out=str(data), input=(str(folder / "text.txt"),), document="line", model="byte", workers=1))
    (folder / "tiny.py").write_text(CONFIG.format(data=str(data)))
    return folder / "tiny.py"


def torture() -> ModuleType:
    """The tool whose digests are compared."""
    spec = importlib.util.spec_from_file_location("torture", ROOT / "tools" / "torture.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps))
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_two_processes_stopped_killed_and_ended_by_one(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    out = tmp_path / "run"
    with two_processes(tmp_path, config, out, "stopped") as pair:
        pair.wait_for("step 7/40")
        pair.processes[1].send_signal(signal.SIGTERM)  # one of them; both must stop at the same step
        assert pair.codes() == [75, 75], pair.said()
        found = re.search(r"asked to stop: saved step (\d+)", pair.logs[0].read_text())
        assert found, pair.said()
        stopped = int(found[1])
        assert 7 <= stopped < 30
        assert (out / "checkpoints" / str(stopped) / "jaxpt.json").exists()
        assert max(losses(out)) == stopped
        digests = [json.loads(log.read_text().partition("\ndigests ")[2]) for log in pair.logs]

    with two_processes(tmp_path, config, out, "killed") as pair:
        pair.wait_for(f"resuming at step {stopped}\n")
        pair.wait_for(f"step {stopped + 6}/40")
        os.killpg(pair.processes[1].pid, signal.SIGKILL)
        # meanwhile the run that nothing interrupts: one process, and eight devices instead of four
        whole = dataclasses.replace(load_config(config), out=str(tmp_path / "whole"))
        assert train(whole) == 0
        survivor, killed = pair.codes()  # the other one does not wait for ever
        assert killed == -signal.SIGKILL
        assert survivor not in (0, 75), pair.said()
        assert "process 0 of 2 cannot go on, most likely because another one has died" in pair.logs[0].read_text()

    capfd.readouterr()
    assert train(dataclasses.replace(whole, out=str(out))) == 0
    resumed = re.search(r"resuming at step (\d+)", capfd.readouterr().out)
    assert resumed
    assert stopped <= int(resumed[1]) < 40
    want, got = losses(tmp_path / "whole"), losses(out)
    assert list(got) == list(want) == list(range(1, 41))
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-5)
    assert digests == [torture().example_digests(whole, 8)] * 2  # the same rows and the same masks
