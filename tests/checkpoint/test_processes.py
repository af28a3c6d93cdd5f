"""Kills at random moments, SIGTERM, and two real processes. The processes run this very file as a script."""

import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpt.checkpoint import Checkpoints, Preemption, checkpoints
from jaxpt.checkpoint.processes import gather, on_first


def make_state(step):
    """A state that is a function of the step, so that any process knows what to expect."""
    return {
        "params": {"w": jnp.arange(64 * 40.0).reshape(64, 40) * step, "b": jnp.full((3,), step, jnp.bfloat16)},
        "step": jnp.int32(step),
    }


def shardings(devices):
    mesh = jax.make_mesh((len(devices),), ("fsdp",), axis_types=(AxisType.Auto,), devices=devices)
    rows, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("fsdp",), ()))
    return {"params": {"w": rows, "b": whole}, "step": whole}


def target(devices):
    def struct(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(struct, jax.eval_shape(make_state, 1), shardings(devices))


def placed_state(step, devices):
    return jax.jit(make_state, static_argnums=0, out_shardings=shardings(devices))(step)


def say(*words):
    print("say:", *words, flush=True)


def child(*arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, __file__, *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    guard = threading.Timer(180, process.kill)  # a deadlock shall fail, not hang
    guard.daemon = True
    guard.start()
    return process


def hear(process: subprocess.Popen[str]) -> str:
    """The next line that the process says; "" when it has ended."""
    assert process.stdout
    while (line := process.stdout.readline()) and not line.startswith("say: "):
        pass
    return line.removeprefix("say: ").strip()


# ---------------------------------------------------------------------------------------------- SIGKILL


def save_forever(folder):
    with Checkpoints(folder, keep=2, keep_best=1) as run:
        start = 0 if run.latest is None else run.restore(target(jax.devices())).step
        say("start", start)
        for step in range(start + 1, 100_000):
            run.save(step, make_state(step), {"step": step}, metric=float(step % 3))
            say("begun", step)


def test_sigkill_at_random_moments_loses_only_the_last_save(tmp_path):
    rng = random.Random(0)
    last = 0
    for _ in range(5):
        process = child("save_forever", tmp_path)
        assert hear(process) == f"start {last}"
        assert hear(process) == f"begun {last + 1}"
        begun = hear(process)
        time.sleep(rng.uniform(0.0, 0.2))
        process.kill()
        while line := hear(process):
            begun = line
        process.communicate()
        step = int(begun.split()[1])
        restored = Checkpoints(tmp_path).restore(target(jax.devices()[:1]))
        last = restored.step
        # ``save`` waits for the one before, so the last but one was finished when the last began
        assert last in (step - 1, step, step + 1)
        assert all("cut short" in each for each in restored.refused)
        assert restored.metadata == {"step": last}
        assert np.array_equal(restored.state["params"]["w"], make_state(last)["params"]["w"])


# ---------------------------------------------------------------------------------------------- SIGTERM


def test_sigterm_sets_a_flag_and_the_previous_handler_returns():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with Preemption() as preemption:
            assert not preemption.requested(1)
            for _ in range(2):  # the second does no harm
                signal.raise_signal(signal.SIGTERM)
                assert preemption.requested(2)
        assert seen == []
        signal.raise_signal(signal.SIGTERM)
        assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_cannot_watch_for_sigterm(caplog):
    asked = []

    def watch():
        with Preemption() as preemption:
            asked.append(preemption.requested(1))

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert asked == [False]
    assert "only the main thread" in caplog.text


# ---------------------------------------------------------------------------------------- two processes


def one_of_two(folder, of_one, port, index):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index), initialization_timeout=60)
    logging.disable(logging.WARNING)
    devices = jax.devices()
    jax.set_mesh(shardings(devices)["step"].mesh)  # as a training run does
    assert gather("é" * (3 - 2 * int(index))) == ["ééé", "é"]
    try:
        on_first(lambda: 1 // 0)
    except RuntimeError as error:
        say("told by", error)

    restored = Checkpoints(of_one).restore(target(devices))
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), restored.state, placed_state(5, devices))
    say("from one:", restored.step, restored.refused, same)

    with Checkpoints(folder, keep=3) as run:
        for step in (1, 2, 3):
            run.save(step, placed_state(step, devices), {"processes": 2})
        run.save(3, placed_state(3, devices), {"again": True})  # it is there already: both leave it
        run.wait()
        say("saved", run.steps(), run.describe().metadata)

        sound = checkpoints.file_problems
        if index == "1":  # one process alone meets damage; both must fall back
            checkpoints.file_problems = lambda folder, files: ["a file is damaged"] if folder.name == "3" else []
        restored = run.restore(target(devices))
        say("fell back to", restored.step, restored.refused)
        checkpoints.file_problems = sound
        run.save(3, placed_state(33, devices), {"processes": 2})
        run.wait()

        checkpoints.file_digests = lambda *_: 1 // 0  # fails on process 0, in the background; both must hear of it
        run.save(4, placed_state(4, devices))
        try:
            run.wait()
        except RuntimeError as error:
            say("failed:", error)

    with Preemption() as preemption:
        say("ready")
        for step in range(1, 6000):
            time.sleep(0.01)
            if preemption.requested(step):
                say("stopped at", step)
                break


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes said, and the folder that they saved to."""
    folder, of_one = tmp_path_factory.mktemp("of_two"), tmp_path_factory.mktemp("of_one")
    with Checkpoints(of_one) as run:
        run.save(5, placed_state(5, jax.devices()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [child("one_of_two", folder, of_one, port, index) for index in range(2)]
    said: list[list[str]] = [[], []]
    try:
        for lines, process in zip(said, processes, strict=True):
            while (line := hear(process)) not in ("ready", ""):
                lines.append(line)
        processes[1].send_signal(signal.SIGTERM)  # one host is told; both must stop, at one step
        for lines, process in zip(said, processes, strict=True):
            lines.append(hear(process))
            errors = process.communicate(timeout=60)[1]
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
    return said, folder


def test_two_processes_agree(two_processes):
    said, _ = two_processes
    assert said[0] == said[1]
    assert said[0][:-1] == [
        "told by process 0: ZeroDivisionError: integer division or modulo by zero",
        "from one: 5 [] {'params': {'b': True, 'w': True}, 'step': True}",
        "saved [1, 2, 3] {'processes': 2}",
        "fell back to 2 ['step 3: a file is damaged']",
        "failed: the last checkpoint could not be saved: ZeroDivisionError: integer division or modulo by zero",
    ]
    assert said[0][-1].startswith("stopped at ")


@pytest.mark.parametrize("devices", [1, 4])
def test_saved_by_two_processes_restored_by_one(two_processes, devices):
    _, folder = two_processes
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3", "3.damaged", "4"]
    restored = Checkpoints(folder).restore(target(jax.devices()[:devices]))
    assert restored.refused == ["step 4: jaxpt.json is missing: its save was cut short, or the file was removed"]
    assert (restored.step, restored.metadata) == (3, {"processes": 2})
    assert np.array_equal(restored.state["params"]["w"], make_state(33)["params"]["w"])
    assert int(restored.state["step"]) == 33
    one = json.loads((folder / "3" / "jaxpt.json").read_text())["leaves"]
    with Checkpoints(folder.parent / f"again_{devices}") as run:  # the same digests from another mesh
        run.save(3, restored.state)
        run.wait()
        assert {name: list(leaf) for name, leaf in run.describe().leaves.items()} == {
            name: [tuple(shape), *rest] for name, (shape, *rest) in one.items()
        }


if __name__ == "__main__":
    {"save_forever": save_forever, "one_of_two": one_of_two}[sys.argv[1]](*sys.argv[2:])
