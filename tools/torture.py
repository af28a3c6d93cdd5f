"""Break runs on purpose and measure that nothing is lost: the promises of resuming, checkpoints and sharding.

    python tools/torture.py kill     # SIGKILL at random moments, also during a save: metrics digit for digit
    python tools/torture.py flip     # one flipped byte in every file of a checkpoint: noticed, named, gone back
    python tools/torture.py parity   # 1, 2 and 8 devices, meshes, microbatches, processes: same numbers

What is not a flag of this tool is handed to `jaxpt train`, for example `kill --steps 80 --batch-size 16`. It runs
on CPU devices unless JAX_PLATFORMS says otherwise. It prints what it did and a verdict; the exit code is 1 where
something differs. All runs lie under --work, which is deleted when all is well and was not named.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLOCK = {"tokens_per_second", "mfu", "data_wait", "seconds"}  # what a metrics line says of the clock
TOLERANCE = 1e-5  # relative, of losses on different meshes
PATIENCE = 1800  # seconds after which a process is stuck

# ------------------------------------------------------------------------------------------------ processes


def environment(work: Path, **more: Any) -> dict[str, str]:
    """Return the environment of a child: this jaxpt, CPU devices, one cache of programs; what the user set wins."""
    given = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return given | os.environ | {"PYTHONPATH": path} | {name: str(value) for name, value in more.items()}


@contextlib.contextmanager
def child(command: Sequence[str | Path], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in a group of its own, its output appended to a file; on leaving, the whole group is killed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(word) for word in command], env=env, stdout=output, stderr=output, cwd=ROOT, start_new_session=True
        )
    try:
        yield process
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and all it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(command: Sequence[str | Path], env: dict[str, str], log: Path) -> None:
    """Run a process to its end; an error raises with the end of its output."""
    with child(command, env, log) as process:
        try:
            code: int | str = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = f"none after {PATIENCE} s"
    if code != 0:
        raise RuntimeError(f"{command}: exit code {code}\n{log.read_text(errors='replace')[-4000:]}")


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def training(config: str, out: Path, flags: Sequence[str]) -> list[str]:
    """Return the command that trains, or resumes, a run."""
    return [sys.executable, "-m", "jaxpt", "train", config, *flags, "--out", str(out)]


# ------------------------------------------------------------------------------------------- what a run left


def metric_lines(run: Path) -> list[list[tuple[str, Any]]]:
    """Return the lines of metrics.jsonl as (key, raw JSON text of the number), without the clock's."""
    texts = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    parse = {"parse_float": str, "parse_int": str, "object_pairs_hook": list}
    return [[(key, value) for key, value in json.loads(text, **parse) if key not in CLOCK] for text in texts]


def losses(run: Path, key: str = "loss") -> dict[int, float]:
    """Return {step: loss}."""
    lines = [dict(line) for line in metric_lines(run)]
    return {int(line["step"]): float("nan" if line[key] is None else line[key]) for line in lines if key in line}


def last_line(run: Path, stale: int | None) -> int:
    """Return the step of the newest whole line; -1 while the file is absent or is still the one before the resume."""
    try:
        with (run / "metrics.jsonl").open(encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_ino == stale:
                return -1
            whole = [line for line in file if line.endswith("\n")]
    except FileNotFoundError:
        return -1
    return json.loads(whole[-1])["step"] if whole else 0


def steps_of(run: Path) -> list[int]:
    """Return the finished checkpoints, oldest first."""
    found = (run / "checkpoints").glob("*/jaxpt.json")
    return sorted(int(path.parent.name) for path in found if path.parent.name.isdigit())


def unfinished(run: Path) -> set[tuple[str, int, int]]:
    """Return the saves that have begun and not ended: temporary folders and steps without their description."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for path in (run / "checkpoints").iterdir():
            begun = path.name.isdigit() and not (path / "jaxpt.json").exists()
            if begun or "checkpoint-tmp" in path.name:
                with contextlib.suppress(FileNotFoundError):  # committed or cleared this very moment
                    state = path.stat()
                    found.add((path.name, state.st_ino, state.st_ctime_ns))
    return found


def leaf_digests(run: Path) -> dict[str, Any]:
    """Return the digest of every leaf of the newest checkpoint."""
    return json.loads((run / "checkpoints" / str(steps_of(run)[-1]) / "jaxpt.json").read_bytes())["leaves"]


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a Markdown table."""
    texts = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for place, row in enumerate(texts):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if place == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|", flush=True)


# ------------------------------------------------------------------------------------------------------ kill

KILL_FLAGS = "--steps 40 --checkpoint-every 5 --eval-every 10 --eval-rows 32 --batch-size 8 --log-every 1"


def kill(args: argparse.Namespace, flags: list[str], work: Path) -> bool:
    """Kill and resume a run until it ends, and compare it with the uninterrupted one."""
    flags = [*KILL_FLAGS.split(), *flags]
    whole, killed, env = work / "whole", work / "killed", environment(work)
    print("$", " ".join(training(args.config, whole, flags)), flush=True)
    finish(training(args.config, whole, flags), env, work / "whole.log")
    steps = steps_of(whole)[-1]
    clock = [json.loads(line).get("seconds", 0.0) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    print(f"uninterrupted: {steps} steps, {max(clock):.0f} s", flush=True)

    rng = random.Random(args.seed)
    kinds = ["save" if number % 2 else "commit" for number in range(args.saves)]
    kinds += ["step"] * (args.kills - args.saves)
    if args.kills - args.saves > 1:
        kinds[-1] = "start"
    rng.shuffle(kinds)
    moments = list(zip(sorted(rng.sample(range(1, steps - 4), args.kills)), kinds, strict=True))
    rows, hits = [], 0
    while moments:
        step, kind = moments.pop(0)
        row, during_save = kill_once(
            training(args.config, killed, flags), env, killed, step, kind, rng, max(clock) / steps
        )
        hits += during_save
        rows.append([len(rows) + 1, *row])
        print("  kill", *row, sep=" | ", flush=True)
        if row[-1] != "SIGKILL":
            break
        if kind in ("save", "commit") and not during_save and len(rows) < 3 * args.kills:
            moments.insert(0, (step, kind))  # the save was faster than we: try again
    ended = rows[-1][-1] != "SIGKILL"
    if not ended:
        finish(training(args.config, killed, flags), env, killed.with_suffix(".log"))

    print_table(["kill", "aimed at", "killed after line", "finished checkpoints", "half-written", "then"], rows)
    want, got = metric_lines(whole), metric_lines(killed)
    different = [f"  {a}\n  {b}" for a, b in zip(want, got, strict=False) if a != b]
    print(*different[:10], sep="\n", end="\n" if different else "")
    same_state = leaf_digests(whole) == leaf_digests(killed)
    fine = not different and len(want) == len(got) and same_state and hits >= args.saves and not ended
    print(
        f"{len(rows)} kills, {hits} of them during a save; {len(want)} and {len(got)} lines of metrics.jsonl, "
        f"{sum(map(len, want))} fields: {len(different)} lines differ; final state "
        f"({len(leaf_digests(whole))} leaves) {'identical' if same_state else 'DIFFERENT'}"
    )
    return fine


def kill_once(
    command: list[str], env: dict[str, str], run: Path, step: int, kind: str, rng: random.Random, pace: float
) -> tuple[list[Any], bool]:
    """Start or resume the run, kill it at one moment; return a row of the table and whether a save was cut short.

    Args:
      command, env: of the run.
      run: its directory.
      step: the moment comes once this step has a line.
      kind: "step" (up to two steps later), "save" (while Orbax writes), "commit" (Orbax has committed, jaxpt.json is
        not there yet) or "start" (before the process has done a step).
      rng: for what is random in it.
      pace: seconds per step.
    """
    log = run.with_suffix(".log")
    before = log.stat().st_size if log.exists() else 0
    metrics, stale = run / "metrics.jsonl", unfinished(run)
    inode = metrics.stat().st_ino if metrics.exists() else None
    with child(command, env, log) as process:
        deadline = time.monotonic() + PATIENCE
        begin = time.monotonic() + rng.uniform(0, 10)
        while kind == "start" and time.monotonic() < begin and last_line(run, inode) < 0:
            time.sleep(0.01)
        while kind != "start" and process.poll() is None and last_line(run, inode) < step:
            assert time.monotonic() < deadline, f"step {step} was never reached, see {log}"
            time.sleep(0.01)
        while kind in ("save", "commit") and process.poll() is None:
            new = {name for name, *_ in unfinished(run) - stale}
            if any(name.isdigit() or kind == "save" for name in new):
                break
            time.sleep(0.0005)
        if kind == "save":
            time.sleep(rng.uniform(0, 0.05))
        elif kind == "step":
            time.sleep(rng.uniform(0, 2 * pace))
        ended = process.poll() is not None
        kill_group(process)
    half = sorted(name for name, *_ in unfinished(run) - stale)
    with log.open(errors="replace") as text:
        text.seek(before)
        said = [line.strip() for line in text if "resuming at step" in line]
    resumed = said[0] if said else "from the first step" if last_line(run, inode) >= 0 else "still starting"
    aims = {"save": "a save after step {}", "commit": "the end of a save after step {}", "step": "step {}"}
    moment = aims.get(kind, "the start").format(step)
    row = [f"{moment} ({resumed})", last_line(run, None), steps_of(run), ", ".join(half) or "-"]
    return [*row, "it had ended" if ended else "SIGKILL"], bool(half)


# ------------------------------------------------------------------------------------------------------ flip

FLIP_FLAGS = "--steps 10 --checkpoint-every 5 --eval-every 5 --eval-rows 8 --batch-size 8 --log-every 1"
FLIP_FLAGS += " --optimizer.schedule-steps 400"  # more steps may not change the ones there were


def flip(args: argparse.Namespace, flags: list[str], work: Path) -> bool:
    """Flip a byte in each file of the newest checkpoint and restore."""
    flags, run = [*FLIP_FLAGS.split(), *flags], work / "run"
    print("$", " ".join(training(args.config, run, flags)), flush=True)
    finish(training(args.config, run, flags), environment(work), work / "run.log")
    previous, newest = steps_of(run)[-2:]
    folder = run / "checkpoints" / str(newest)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    rng = random.Random(args.seed)
    tries = [files[number % len(files)] for number in range(max(args.tries, len(files)))]
    os.environ.update(environment(work))
    sys.path.insert(0, str(ROOT))
    rows = flip_in_process(run, previous, newest, tries, rng, work)
    largest = max(files, key=lambda name: (folder / name).stat().st_size)  # the arrays
    chosen = list(dict.fromkeys([largest, "jaxpt.json", *rng.sample(files, len(files))]))[: args.cli]
    rows += [flip_on_command_line(args.config, run, flags, previous, newest, name, rng, work) for name in chosen]
    print_table(
        ["try", "by", "file", "byte", "xor", "refused", "restored", "verdict"],
        [[i, *row] for i, row in enumerate(rows, 1)],
    )
    good = sum(row[-1] == "ok" for row in rows)
    print(f"{len(rows)} flips over {len(files)} files of step {newest}: {good} noticed, named and gone back")
    return good == len(rows)


def damage(file: Path, rng: random.Random) -> tuple[str, str]:
    """Flip bits of one random byte; return its offset and the mask. An empty file gets a byte."""
    content = bytearray(file.read_bytes())
    if not content:
        file.write_bytes(b"\0")
        return "empty", "one byte added"
    offset, mask = rng.randrange(len(content)), rng.randrange(1, 256)
    content[offset] ^= mask
    file.write_bytes(content)
    return str(offset), f"{mask:#04x}"


def flip_in_process(
    run: Path, previous: int, newest: int, tries: list[str], rng: random.Random, work: Path
) -> list[list[Any]]:
    """Restore damaged copies with ``Checkpoints.restore``; what it gives must be the previous step, bit for bit."""
    import jax
    import numpy as np

    from jaxpt import config as configuration
    from jaxpt.checkpoint import Checkpoints
    from jaxpt.data.pipeline import Pipeline
    from jaxpt.sharding import make_mesh
    from jaxpt.train import make_parts, open_phases
    from jaxpt.types import RowSpec

    logging.getLogger("jaxpt.checkpoint").setLevel(logging.ERROR)  # the table says it
    config = configuration.load(run / "config.json")
    mesh = make_mesh(config.mesh)
    rows = []
    with jax.set_mesh(mesh):
        vocab = Pipeline(open_phases(config), RowSpec(), config.seed).vocab
        abstract = make_parts(config, vocab, mesh).abstract
        with Checkpoints(run / "checkpoints") as store:
            want = [np.asarray(leaf) for leaf in jax.tree.leaves(store.restore(abstract, previous).state)]
        for name in tries:
            copy = work / "copy"
            shutil.copytree(run / "checkpoints", copy)
            offset, mask = damage(copy / str(newest) / name, rng)
            with Checkpoints(copy) as store:
                restored = store.restore(abstract)
            got = [np.asarray(leaf) for leaf in jax.tree.leaves(restored.state)]
            same = all(a.tobytes() == b.tobytes() for a, b in zip(want, got, strict=True))
            said = restored.refused[0] if restored.refused else "nothing"
            named = len(restored.refused) == 1 and said.startswith(f"step {newest}: ") and name in said
            fine = named and restored.step == previous and same
            rows.append(["restore", name, offset, mask, said, restored.step, "ok" if fine else "FAILED"])
            shutil.rmtree(copy)
    return rows


def flip_on_command_line(
    config: str, run: Path, flags: list[str], previous: int, newest: int, name: str, rng: random.Random, work: Path
) -> list[Any]:
    """Resume a damaged copy for one step more than the run had; its lines must be the run's, digit for digit."""
    copy, log = work / f"copy-{name.replace('/', '-')}", work / f"copy-{name.replace('/', '-')}.log"
    shutil.copytree(run, copy)
    offset, mask = damage(copy / "checkpoints" / str(newest) / name, rng)
    finish(training(config, copy, [*flags, "--steps", str(newest + 1)]), environment(work), log)
    said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("refused checkpoint: ")]
    first = said[0].removeprefix("refused checkpoint: ") if said else "nothing"
    before = metric_lines(run)
    same = metric_lines(copy)[: len(before)] == before and steps_of(copy)[-1] == newest + 1
    fine = first.startswith(f"step {newest}: ") and name in first and len(said) == 1 and same
    went = f"resuming at step {previous}" in log.read_text(errors="replace")
    return ["jaxpt train", name, offset, mask, first, previous if went else "?", "ok" if fine and went else "FAILED"]


# ---------------------------------------------------------------------------------------------------- parity

STEPS = 12
PARITY_FLAGS = "--optimizer.schedule-steps 400 --log-every 1 --eval-every 0 --eval-rows 32 --batch-size 32"
BERT_FLAGS = "--vocab-size 4096 --optimizer.warmup-steps 8 --objective.encoder.dropout 0.1"
MESHES = {  # devices: meshes
    1: ["data=1"],
    2: ["data=2", "fsdp=2", "tensor=2"],
    8: ["data=8", "fsdp=8", "fsdp=4 tensor=2", "data=2 fsdp=2 tensor=2", "data=2 tensor=4"],
}


def parity(args: argparse.Namespace, flags: list[str], work: Path) -> bool:
    """Train the same steps on many meshes; digests must be equal and losses within ``TOLERANCE``."""
    runs = [("configs/quickstart.py", ""), ("configs/bert_tiny.py", BERT_FLAGS)]
    fine = True
    for config, more in [(args.config, "")] if args.config else runs:
        name = Path(config).stem
        base = [*PARITY_FLAGS.split(), *more.split(), *flags]
        print(f"$ jaxpt train {config} --steps {STEPS} {' '.join(base)} --mesh.* ... --microbatches ...", flush=True)
        rows, want = mesh_rows(config, base, work / name, args.full)
        rows += resume_rows(config, base, work / name, want)
        head = ["run", "devices", "mesh", "microbatches", "tokens and masks", "losses: max relative difference"]
        print_table([*head, "gradient norms", "verdict"], [[name, *row] for row in rows])
        worst = max(float(row[4]) for row in rows)
        good = sum(row[-1] == "ok" for row in rows)
        print(f"{name}: {good} of {len(rows)} agree with one device; largest relative difference of a loss {worst:.1e}")
        fine &= good == len(rows)
    return fine


def mesh_flags(mesh: str) -> list[str]:
    """Return "fsdp=4 tensor=2" as flags."""
    sizes = {"data": "1"} | dict(part.split("=") for part in mesh.split())
    return [word for axis, size in sizes.items() for word in (f"--mesh.{axis}", size)]


def points(config: str, work: Path, devices: int, jobs: list[dict[str, Any]], processes: int = 1) -> list[Any]:
    """Run jobs one after the other in one process, or one job in several; return the digests of each.

    Args:
      config: the config file.
      work: where results and logs go.
      devices: virtual devices in all.
      jobs: {"flags": of the run, "out": its directory}.
      processes: of jax.distributed.
    """
    name = "-".join([Path(jobs[0]["out"]).name, str(devices), str(processes)])
    asked = work / f"{name}.json"
    work.mkdir(parents=True, exist_ok=True)
    asked.write_text(json.dumps({"config": config, "jobs": jobs, "distributed": processes > 1}))
    command = [sys.executable, str(Path(__file__).resolve()), "point", str(asked)]
    env = environment(work.parent, JAX_NUM_CPU_DEVICES=devices // processes)
    if processes == 1:
        finish(command, env, asked.with_suffix(".log"))
    else:
        env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
        with contextlib.ExitStack() as stack:
            logs = [asked.with_suffix(f".{index}.log") for index in range(processes)]
            envs = [env | {"JAX_PROCESS_ID": str(index)} for index in range(processes)]
            started = [stack.enter_context(child(command, e, log)) for e, log in zip(envs, logs, strict=True)]
            for process, log in zip(started, logs, strict=True):
                if (code := process.wait(PATIENCE)) != 0:
                    raise RuntimeError(f"exit code {code}\n{log.read_text(errors='replace')[-4000:]}")
    return json.loads(asked.with_suffix(".out").read_text())


def point(path: Path) -> int:
    """Inside a child: train each job through the command line, then digest what its steps were fed."""
    import jax

    from jaxpt import cli
    from jaxpt import config as configuration

    asked, results = json.loads(path.read_text()), []
    for job in asked["jobs"]:
        print("point:", *job["flags"], flush=True)
        arguments = ["train", asked["config"], *job["flags"], "--out", job["out"]]
        code = cli.main(arguments + (["--distributed"] if asked["distributed"] else []))
        if code:
            return code
        config = configuration.load(Path(job["out"]) / "config.json")
        results.append(example_digests(config, STEPS))
        jax.clear_caches()
    if jax.process_index() == 0:
        path.with_suffix(".out").write_text(json.dumps(results))
    return 0


def example_digests(config: Any, steps: int) -> list[str]:
    """Return a SHA-256 per step of the batch and of the objective's example (inputs, weights, counts) on the mesh.

    Args:
      config: a RunConfig; its mesh is made of all devices of all processes.
      steps: the first steps of the run.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from jaxpt.data.pipeline import Pipeline
    from jaxpt.sharding import make_mesh
    from jaxpt.step import make_example, seed_key
    from jaxpt.train import make_parts, open_phases, training_batches
    from jaxpt.types import RowSpec, Snapshot

    mesh = make_mesh(config.mesh)
    phases = open_phases(config)
    with jax.set_mesh(mesh):
        parts = make_parts(config, Pipeline(phases, RowSpec(), config.seed).vocab, mesh)
        pipeline = Pipeline(phases, parts.objective.rows, config.seed)
        state, key = parts.born(), seed_key(config.seed, "corrupt")

        @jax.jit
        def corrupt(step: Any, batch: Any) -> Any:
            snapshot = Snapshot(state.params, state.carry, step)
            return make_example(parts.objective, snapshot, batch, jax.random.fold_in(key, step))

        def digest(tree: Any) -> str:
            sha = hashlib.sha256()
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                array = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
                sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
            return sha.hexdigest()

        batches = enumerate(training_batches(pipeline, 0, steps, mesh))
        return [digest((batch, corrupt(np.int32(step), batch))) for step, batch in batches]


def mesh_rows(config: str, base: list[str], work: Path, full: bool) -> tuple[list[list[Any]], tuple[list[str], Path]]:
    """Train on every mesh and compare with one device and one microbatch; return the rows and what that one gave."""
    rows: list[list[Any]] = []
    want: tuple[list[str], Path] | None = None  # digests and run directory
    for devices, meshes in MESHES.items():
        jobs, labels = [], []
        for place, mesh in enumerate(meshes):
            # without --full every mesh gets one number of microbatches in turn, and one of each size all three
            every = full or devices == 1 or mesh == "fsdp=4 tensor=2"
            for microbatches in (1, 2, 4) if every else ((1, 2, 4)[place % 3],):
                labels.append((devices, mesh, microbatches))
                out = work / f"{devices} {mesh} {microbatches}".replace(" ", "-")
                more = ["--steps", str(STEPS), "--microbatches", str(microbatches), *mesh_flags(mesh)]
                jobs.append({"flags": [*base, *more], "out": str(out)})
        digests = points(config, work, devices, jobs)
        want = want or (digests[0], Path(jobs[0]["out"]))
        for label, job, found in zip(labels, jobs, digests, strict=True):
            rows.append([*label, *compare(*want, found, Path(job["out"]))])
            print("  ", *rows[-1], sep=" | ", flush=True)
    assert want is not None
    return rows, want


def resume_rows(config: str, base: list[str], work: Path, want: tuple[list[str], Path]) -> list[list[Any]]:
    """Save half-way on 8 devices and on two processes, go on elsewhere, and compare with one device throughout."""
    half, wide = STEPS // 2, "fsdp=4 tensor=2"
    saved = {}
    for processes in (1, 2):
        saved[processes] = work / f"half-{processes}"
        flags = [*base, "--steps", str(half), *mesh_flags(wide)]
        points(config, work, 8, [{"flags": flags, "out": str(saved[processes])}], processes)
    rows = []
    for before, devices, mesh, processes in (
        (1, 4, "fsdp=2 tensor=2", 1),
        (1, 2, "fsdp=2", 1),
        (1, 1, "data=1", 1),
        (1, 8, "data=2 fsdp=4", 2),
        (2, 1, "data=1", 1),
        (2, 8, wide, 2),
    ):
        out = work / f"resumed-{before}-{devices}-{processes}"
        shutil.copytree(saved[before], out)
        flags = [*base, "--steps", str(STEPS), *mesh_flags(mesh)]
        found = points(config, work, devices, [{"flags": flags, "out": str(out)}], processes)[0]
        logs = "".join(log.read_text(errors="replace") for log in work.glob(f"{out.name}-{devices}-{processes}*.log"))
        came = f"resuming at step {half}" in logs
        label = f"{wide}{' on 2 processes' if before > 1 else ''}, then {mesh}"
        label += f" on {processes} processes" if processes > 1 else ""
        row = [f"8 -> {devices}", label, 1, *compare(*want, found, out)]
        rows.append(row if came else [*row[:-1], "FAILED (not resumed)"])
        print("  ", *rows[-1], sep=" | ", flush=True)
    return rows


def compare(want: list[str], reference: Path, found: list[str], run: Path) -> list[str]:
    """Return the last columns of a row: digests, losses, gradient norms, verdict."""
    worst = {}
    for key in ("loss", "grad_norm"):
        a, b = losses(reference, key), losses(run, key)
        gaps = [abs(a[step] - b[step]) / abs(a[step]) for step in a] if a.keys() == b.keys() else [math.nan]
        worst[key] = math.nan if any(map(math.isnan, gaps)) else max(gaps)
    equal = found == want
    fine = equal and worst["loss"] <= TOLERANCE and len(losses(run)) == STEPS
    shown = [f"{worst[key]:.1e}" for key in ("loss", "grad_norm")]
    return ["identical" if equal else "DIFFERENT", *shown, "ok" if fine else "FAILED"]


# ------------------------------------------------------------------------------------------------------ main


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    for run in (kill, flip, parity):
        one = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        default = None if run is parity else "configs/quickstart.py"
        shown = default or "quickstart.py, then bert_tiny.py with dropout"
        one.add_argument("--config", default=default, help=f"config file (default: {shown})")
        one.add_argument("--work", type=Path, help="an empty directory for the runs, which stays; default: a temporary")
        one.set_defaults(run=run)
        if run is not parity:
            one.add_argument("--random-seed", dest="seed", type=int, default=0, help="of this tool (default: 0)")
    named = commands.choices
    named["kill"].add_argument("--kills", type=int, default=6, help="SIGKILLs in all (default: 6)")
    named["kill"].add_argument("--saves", type=int, default=2, help="of them, at least, during a save (default: 2)")
    named["flip"].add_argument("--tries", type=int, default=24, help="at least; every file once (default: 24)")
    named["flip"].add_argument("--cli", type=int, default=2, help="more, through `jaxpt train` (default: 2)")
    named["parity"].add_argument("--full", action="store_true", help="every mesh with 1, 2 and 4 microbatches")
    return top


def main(argv: Sequence[str]) -> int:
    """Run one torture; 0 where all is well, 1 where not."""
    if argv[:1] == ["point"]:  # a child of `parity`
        return point(Path(argv[1]))
    args, flags = parser().parse_known_args(argv)
    work = (args.work or Path(tempfile.mkdtemp(prefix="jaxpt-torture-"))).absolute()
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        print(f"{work} is not empty", file=sys.stderr)
        return 2
    start = time.perf_counter()
    try:
        fine = args.run(args, flags, work)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        fine = False
    print(f"{args.command}: {'OK' if fine else 'FAILED'} ({time.perf_counter() - start:.0f} s)")
    if fine and not args.work:
        shutil.rmtree(work)
    else:
        print(f"everything is in {work}")
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
