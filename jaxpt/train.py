"""The spine: mesh, data, objective, optimizer, state, step, metrics, evaluation, checkpoint - top to bottom."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpt import config as configuration
from jaxpt.checkpoint import Checkpoints, Preemption
from jaxpt.config import BUILT_IN, PhaseConfig, RunConfig, parse_source, rate_changes, resolve_phases, with_layers
from jaxpt.data.build import BuildConfig, build
from jaxpt.data.finish import keep_vocab
from jaxpt.data.manifest import Manifest
from jaxpt.data.pipeline import Phase, Pipeline, Source, check_continues, held_out, load_manifests
from jaxpt.data.tokenizer import built_tokenizer
from jaxpt.diagnostics import make_alignment, make_curvature, readings
from jaxpt.evaluate import evaluate
from jaxpt.metrics import Meter, MetricsWriter, matmul_flops, peak_flops
from jaxpt.models.attention import DENSE_BELOW
from jaxpt.models.config import DENSE_ONLY
from jaxpt.optimizer import assign_groups, learning_rate_schedule, make_optimizer, trainable
from jaxpt.sharding import MeshConfig, check_rows, local_rows, make_mesh, put_batch, state_shardings
from jaxpt.step import Measured, initial_state, make_eval_step, make_example, make_train_step, seed_key
from jaxpt.tasks import measure_task, open_tasks, vectors_of
from jaxpt.tracing import StepTrace
from jaxpt.types import Batch, Example, Objective, RowSpec, Snapshot, Sums, TrainState, Tree, Vocab

# ------------------------------------------------------------------------------------------------ data


def data_folder(name: str, vocab_size: int) -> str:
    """Return the folder of a data set; a built-in corpus is built there first, once per Python and package set.

    Args:
      name: a folder that ``jaxpt data build`` made, or "prose" or "code".
      vocab_size: of the tokenizer that is trained for a built-in corpus.
    """
    if name not in BUILT_IN:
        return name
    root = Path(os.environ.get("JAXPT_CACHE", "~/.cache/jaxpt")).expanduser()
    # the text differs between versions of what it is read from
    versions = [f"{package}{importlib.metadata.version(package)}" for package in ("jax", "numpy", "scipy")]
    folder = root / "-".join([name, str(vocab_size), f"python{platform.python_version()}", *versions])
    if jax.process_index() == 0:
        build(BuildConfig(out=str(folder), corpus=name, vocab_size=vocab_size))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("built-in corpus")
    return str(folder)


def open_sources(entries: tuple[str, ...], vocab_size: int) -> tuple[Source, ...]:
    """Return data entries ("PATH" or "PATH=WEIGHT") as sources, with built-in corpora built."""
    parsed = [parse_source(entry) for entry in entries]
    return tuple(Source(data_folder(path, vocab_size), weight) for path, weight in parsed)


def open_phases(config: RunConfig) -> tuple[Phase, ...]:
    """Return the phases of a run, with built-in corpora built."""
    phases = []
    for phase in resolve_phases(config):
        assert phase.data and phase.seq_len and phase.batch_size  # resolved
        sources = open_sources(phase.data, config.vocab_size)
        phases.append(Phase(phase.from_step, sources, phase.seq_len, phase.batch_size))
    return tuple(phases)


def training_batches(pipeline: Pipeline, start: int, stop: int, mesh: Mesh) -> Iterator[Batch]:
    """Yield the global batches of some steps on the devices; each process reads its own rows."""
    for step, batch in enumerate(pipeline.batches(start, stop, lambda size: local_rows(size, mesh)), start):
        size = pipeline.phase_at(step).batch_size
        yield put_batch(batch, local_rows(size, mesh), size, mesh)


def held_out_batches(
    sources: tuple[Source, ...], spec: RowSpec, length: int, batch_size: int, limit: int | None, mesh: Mesh
) -> Iterator[Batch]:
    """Yield the held-out rows of some sources on the devices, in batches of one shape."""
    rows = local_rows(batch_size, mesh)
    for batch in held_out(sources, spec, length, batch_size, limit, rows_slice=rows):
        yield put_batch(batch, rows, batch_size, mesh)


# ----------------------------------------------------------------------------------------- what a run is made of


class Parts(NamedTuple):
    """What a configuration and a tokenizer make on a mesh; no array is allocated."""

    objective: Objective
    judge: Objective  # the same objective as it is evaluated
    counted: Objective  # the same with dense attention, whose FLOPs can be counted
    specs: Tree  # of ParamSpec, with groups assigned
    optimizer: Any
    abstract: TrainState  # shapes, dtypes and shardings
    shardings: TrainState
    born: Callable[[], TrainState]  # the state before the first step, sharded from birth


def make_parts(config: RunConfig, vocab: Vocab, mesh: Mesh) -> Parts:
    """Return objective, optimizer and the shape of the state."""
    objective = config.objective.build(vocab)
    judge = config.objective.for_evaluation().build(vocab)
    counted = with_layers(config.objective, attention="dense").build(vocab)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    specs = assign_groups(config.optimizer, objective.specs)
    optimizer = make_optimizer(config.optimizer, specs, shapes, config.steps, rate_changes(config))

    def first_state() -> TrainState:
        return initial_state(objective, optimizer, specs, seed=config.seed, averaging=config.optimizer.averaging)

    abstract = jax.eval_shape(first_state)
    shardings = state_shardings(abstract, specs, shapes, mesh)
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )
    born = jax.jit(first_state, out_shardings=shardings)
    return Parts(objective, judge, counted, specs, optimizer, placed, shardings, born)


def compiled_train_step(config: RunConfig, parts: Parts, mesh: Mesh) -> Any:
    """Return the jitted step of a run, as ``train`` runs it and ``jaxpt plan`` compiles it."""
    step = make_train_step(
        parts.objective,
        parts.optimizer,
        parts.specs,
        seed=config.seed,
        microbatches=config.microbatches,
        spike_factor=config.spike_factor,
        averaging=config.optimizer.averaging,
    )
    whole = NamedSharding(mesh, P())  # measurements are whole on every process
    return jax.jit(step, donate_argnums=0, out_shardings=(parts.shardings, whole))


def compiled_diagnosis(
    config: RunConfig, parts: Parts, vocab: Vocab, mesh: Mesh
) -> Callable[[TrainState, Batch], dict[str, float]]:
    """Return what measures alignment and curvature before an update, by programs apart from the step's."""
    longest = max(phase.seq_len or 0 for phase in resolve_phases(config))
    apart = any(getattr(part, "positions", None) in DENSE_ONLY for _, part in configuration.parts("", config))
    # a form with a second derivative, exact numbers and no dropout
    form = "dense" if apart or longest < min(DENSE_BELOW.values()) else "blockwise"
    plain = {"attention": form, "dtype": "float32", "dropout": 0.0, "attention_dropout": 0.0, "mlp_dropout": 0.0}
    smooth = with_layers(config.objective, **plain).build(vocab)
    whole = NamedSharding(mesh, P())
    settings = {"seed": config.seed, "microbatches": config.microbatches}
    align = jax.jit(make_alignment(parts.objective, parts.specs, **settings), out_shardings=whole)
    bend = jax.jit(make_curvature(smooth, parts.specs, **settings), out_shardings=whole)

    def diagnose(state: TrainState, batch: Batch) -> dict[str, float]:
        snapshot = Snapshot(state.params, state.carry, state.step)
        measured = jax.device_get(align(snapshot, batch)), jax.device_get(bend(snapshot, batch))
        return readings(tuple(parts.objective.scale), *measured)

    return diagnose


def opened_tasks(
    config: RunConfig, vocab: Vocab, phases: tuple[Phase, ...], mesh: Mesh
) -> Callable[[TrainState], dict[str, float]]:
    """Return what measures the run's tasks, with their texts read and encoded."""
    if not config.tasks:
        return lambda state: {}
    tokenizer = built_tokenizer(Manifest.load(phases[0].sources[0].path))
    length = min(phase.length for phase in phases)
    vectors = vectors_of(config.objective.for_evaluation(), vocab, length, mesh)
    tasks = open_tasks(config.tasks, tokenizer, vectors.longest)

    def measure(state: TrainState) -> dict[str, float]:
        params = state.params if state.averaged is None else state.averaged
        snapshot = Snapshot(params, state.carry, state.step)
        found: dict[str, float] = {}
        for task in tasks:
            found |= measure_task(task, vectors, snapshot, mesh)
        return found

    return measure


def describe(config: RunConfig, parts: Parts, phases: tuple[Phase, ...], mesh: Mesh) -> str:
    """Return what is about to run, for the person who started it."""
    count = sum(leaf.size for leaf in jax.tree.leaves(parts.abstract.params))
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "no axis split"
    shapes = ", then ".join(f"{phase.batch_size} rows x {phase.length} tokens" for phase in phases)
    return (
        f"{type(config.objective).__name__}, {count:,} parameters; {mesh.size} x {jax.devices()[0].device_kind} "
        f"({sizes}), {jax.process_count()} process(es); {config.steps} steps of {shapes}, "
        f"{config.microbatches} microbatch(es); out {config.out}"
    )


def step_flops(parts: Parts, row: Batch, phase: Phase) -> float:
    """Return the useful matrix FLOPs of one step: what corruption needs, and three times the forward pass.

    Attention counts as whole squares, as is usual (PaLM, appendix B), whichever form runs: how many tiles one skips
    depends on the data.

    Args:
      parts: whose objective is measured.
      row: one row of a batch of the phase, for its shapes.
      phase: how many rows there are.
    """
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((phase.batch_size, *leaf.shape[1:]), leaf.dtype), row)
    state = parts.abstract

    def corrupt(state: TrainState, batch: Batch) -> Example:
        snapshot = Snapshot(state.params, state.carry, state.step)
        return make_example(parts.counted, snapshot, batch, jax.random.key(0))

    def both(state: TrainState, batch: Batch) -> Sums:
        return make_eval_step(parts.counted, seed=0)(state.params, state.carry, state.step, batch)

    return 3 * matmul_flops(both, state, batch) - 2 * matmul_flops(corrupt, state, batch)


@contextlib.contextmanager
def run_directory(config: RunConfig) -> Iterator[tuple[Path, RunConfig | None]]:
    """Open, or make, the run directory for this run alone; yield it with the configuration found there."""
    assert config.out is not None, "the command line gives every run its directory"
    path = Path(config.out)
    if path.exists() and not path.is_dir():
        raise ValueError(f"out: {path} is a file: name a directory for the run")
    saved = path / "config.json"
    if path.is_dir() and not saved.exists() and any(entry.name != ".lock" for entry in path.iterdir()):
        raise ValueError(f"out: {path} holds other files and is not a run directory: name another one with --out")
    path.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as closing:
        if jax.process_index() == 0:
            lock = closing.enter_context((path / ".lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process trains in {path}: wait for it, or name another --out") from None
        old = configuration.load(saved, configuration.config_types(config)) if saved.exists() else None
        yield path, old


def check_resume(old: RunConfig | None, config: RunConfig, before: dict, now: dict, step: int) -> None:
    """Raise ValueError where a run cannot go on as it is configured.

    Args:
      old, config: the configuration found in the run directory and the one asked for.
      before, now: ``Pipeline.fingerprint`` of the checkpoint and of the data as they are.
      step: the newest step that is saved.
    """
    differences = configuration.resume_differences(old, config, step) if old else []
    if differences:
        shown = "".join(f"\n  {line}" for line in differences)
        raise ValueError(
            f"the run in {config.out} cannot be resumed with other settings:{shown}\n"
            f"Take them back, or start a run of its own: --out ANOTHER --init-from {config.out}"
        )
    check_continues(before, now, step)


@contextlib.contextmanager
def blaming_the_lost() -> Iterator[None]:
    """Say, on every process, what an error of the runtime most likely means where several train together."""
    try:
        yield
    except jax.errors.JaxRuntimeError:
        if jax.process_count() > 1:
            print(
                f"jaxpt: process {jax.process_index()} of {jax.process_count()} cannot go on, most likely because "
                f"another one has died (see its output). This one ends, too; the same command, started again on all "
                f"hosts or on others, goes on from the last checkpoint.",
                file=sys.stderr,
                flush=True,
            )
        raise


# -------------------------------------------------------------------------------------------------- training


class Opened(NamedTuple):
    """A run that is ready to go on."""

    parts: Parts
    pipeline: Pipeline
    state: TrainState
    start: int  # steps done
    notes: list[str]  # what its owner should know


def open_run(
    config: RunConfig, old: RunConfig | None, phases: tuple[Phase, ...], mesh: Mesh, store: Checkpoints
) -> Opened:
    """Build everything that a run is made of and restore its newest sound checkpoint, or begin.

    Raises:
      ValueError: the run cannot go on as it is configured, or there is nothing to take from ``init_from``.
    """
    parts = make_parts(config, Pipeline(phases, RowSpec(), config.seed).vocab, mesh)
    pipeline = Pipeline(phases, parts.objective.rows, config.seed)
    now = pipeline.fingerprint()
    if store.latest is not None:
        saved = store.describe()  # before the arrays: what differs is better said in terms of the configuration
        check_resume(old, config, saved.metadata["data"], now, saved.step)
        restored = store.restore(parts.abstract)
        if restored.step >= config.steps:
            raise ValueError(
                f"the run in {config.out} is finished at step {restored.step}: raise --steps to go on, or name "
                f"another --out"
            )
        notes = [f"refused checkpoint: {problem}" for problem in restored.refused]
        return Opened(parts, pipeline, restored.state, restored.step, [*notes, f"resuming at step {restored.step}"])

    check_resume(old, config, now, now, 0)
    state, notes = parts.born(), []
    if config.init_from:
        if not (Path(config.init_from) / "config.json").exists():
            raise ValueError(f"init_from: {config.init_from} is not the directory of a run (no config.json)")
        with Checkpoints(Path(config.init_from) / "checkpoints") as other:
            told = other.describe().metadata
            # of schedule-free, the average is the result; what it trains is where it looks for gradients
            result = told["config"]["optimizer"]["name"] == "schedule_free"
            taken = other.restore_into(state.params, averaged=result)
        theirs = told["tokenizer"]
        averaged = None if state.averaged is None else jax.tree.map(lambda leaf: leaf.copy(), taken.params)
        init = lambda params: parts.optimizer.init(trainable(parts.specs, params))  # noqa: E731
        opt_state = jax.jit(init, out_shardings=parts.shardings.opt_state)(taken.params)  # where schedule-free begins
        carry, start = state.carry, parts.objective.start
        if start is not None:  # a teacher begins as what was taken, not as what was drawn
            begin = lambda params: start(params, seed_key(config.seed, "carry"))  # noqa: E731
            carry = jax.jit(begin, out_shardings=parts.shardings.carry)(taken.params)
        state = state._replace(params=taken.params, averaged=averaged, opt_state=opt_state, carry=carry)
        total = len(jax.tree.leaves(state.params))
        notes.append(f"took {len(taken.taken)} of {total} parameters of {config.init_from}, step {taken.step}:")
        notes += [f"  taken: {each}" for each in taken.taken] + [f"  not taken: {each}" for each in taken.left]
        if theirs != pipeline.tokenizer:
            notes.append("  beware: that run has another tokenizer, so its token embeddings stand for other words")
    return Opened(parts, pipeline, state, 0, notes)


def train(config: RunConfig) -> int:
    """Train a run from its first step, or from its newest sound checkpoint, to its last.

    Args:
      config: a configuration with ``out`` set.

    Returns:
      The exit code: 0 when the run is finished, ``preemption_exit_code`` after a SIGTERM, 1 when it kept failing.

    Raises:
      ValueError: configuration, data, mesh and run directory do not go together.
    """
    configuration.validate(config)
    first = jax.process_index() == 0

    # ---------------------------------------------------------------------------------------- mesh, data
    peak = peak_flops()  # before the mesh is set: it may measure on one device
    mesh = make_mesh(config.mesh)
    phases = open_phases(config)
    for phase in phases:
        check_rows(phase.batch_size, config.microbatches, mesh)

    with jax.set_mesh(mesh), run_directory(config) as (folder, old), contextlib.ExitStack() as closing:
        closing.enter_context(blaming_the_lost())
        # ---------------------------------------------------------------------- objective, optimizer, state
        store = closing.enter_context(Checkpoints(folder / "checkpoints", keep=config.keep, keep_best=config.keep_best))
        parts, pipeline, state, start, notes = open_run(config, old, phases, mesh, store)
        if first:
            configuration.save(config, folder / "config.json")
            keep_vocab(Manifest.load(phases[0].sources[0].path), pipeline.vocab, folder / "vocab")

        # ---------------------------------------------------------------------- step, evaluation, metrics
        train_step = compiled_train_step(config, parts, mesh)
        eval_step = jax.jit(make_eval_step(parts.judge, seed=config.seed), out_shardings=NamedSharding(mesh, P()))
        diagnose = compiled_diagnosis(config, parts, pipeline.vocab, mesh) if config.diagnose_every else None
        ask = opened_tasks(config, pipeline.vocab, phases, mesh)
        rate = learning_rate_schedule(config.optimizer, config.steps, rate_changes(config))
        writer = closing.enter_context(MetricsWriter(folder, config.steps, resume_step=start or None, write=first))
        for note in [describe(config, parts, phases, mesh), *notes, "compiling; the first lines follow"]:
            writer.say(note)
        preemption = closing.enter_context(Preemption())
        meter = Meter(peak, writer.seconds)
        traced = config.profile if first else 0
        trace = closing.enter_context(StepTrace(folder / "profile", start, traced, writer.say))
        alarms: set[str] = set()  # that were raised when a line was last written
        flops_of = {phase: step_flops(parts, pipeline.batch(phase.from_step, slice(1)), phase) for phase in phases}

        def report(step: int, measured: Measured) -> int:
            """Read a step's measurements, write its line when one is due; return how many were skipped in a row."""
            values = jax.device_get(measured)
            guard = values.guard
            meter.step(float(values.tokens), flops_of[pipeline.phase_at(step - 1)])
            writer.tick(step)
            if not values.ok:
                writer.say(f"skipped step {step}: loss {values.loss:.4g}, gradient norm {values.grad_norm:.4g}")
            if step % config.log_every == 0 or step == config.steps:
                updates = int(guard.applied) - int(values.ok)  # before this one
                line = {"loss": values.loss, **values.metrics, "learning_rate": np.asarray(rate(updates)).item()}
                line |= {"grad_norm": values.grad_norm, "skipped_steps": int(guard.skipped), **meter.read()}
                writer.train(step, line)
                raised = {name for name, value in values.metrics.items() if "alarm/" in name and value > 0}
                for name in sorted(raised - alarms):
                    writer.say(f"ALARM at step {step}: {name} (docs/objectives.md says what it watches)")
                alarms.clear()
                alarms.update(raised)
            return int(guard.failing)

        def judge(step: int, state: TrainState) -> float:
            """Evaluate on held-out data, write the line and return the loss."""
            phase = pipeline.phase_at(step - 1)
            batches = held_out_batches(
                phase.sources, parts.judge.rows, phase.length, phase.batch_size, config.eval_rows, mesh
            )
            params = state.params if state.averaged is None else state.averaged
            with meter.paused():
                metrics = evaluate(parts.judge, eval_step, params, state.carry, state.step, batches) | ask(state)
                writer.evaluation(step, metrics)
            return metrics["loss"]

        # ------------------------------------------------------------------------------------- the loop
        batches = training_batches(pipeline, start, config.steps, mesh)
        pending: tuple[int, Measured] | None = None
        for step in range(start + 1, config.steps + 1):
            with meter.paused():
                trace.before(step, state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                with meter.waiting():
                    batch = next(batches)
                if diagnose and step % config.diagnose_every == 0:
                    jax.block_until_ready(state)  # the step before is training
                    with meter.paused():
                        writer.diagnostics(step, diagnose(state, batch))
                state, measured = train_step(state, batch)
            # The step before is read while this one runs, so that the device never waits for the host. On a CPU,
            # where this one is finished by now, its own measurements are read, and the speed is right.
            failing = report(*pending) if pending else 0
            pending = (step, measured)
            stop = preemption.requested(step)
            due = step == config.steps or (config.eval_every > 0 and step % config.eval_every == 0)
            save = step == config.steps or stop or step % config.checkpoint_every == 0
            if due or save or jax.default_backend() == "cpu":
                failing, pending = report(*pending), None
            if failing >= config.max_failing:
                writer.say(
                    f"stopped at step {step}: {failing} steps in a row had a gradient that is not finite or far too "
                    f"large; the last good checkpoint is {store.latest}. Lower --optimizer.learning-rate, raise "
                    f"--optimizer.warmup-steps, or look at the data there."
                )
                return 1
            loss = judge(step, state) if due else None
            if save:
                metadata = {"config": configuration.to_json(config), "data": pipeline.fingerprint()}
                metadata["tokenizer"] = pipeline.tokenizer
                with meter.paused():
                    store.save(step, state, metadata, loss)
            if stop and step < config.steps:
                store.wait()
                writer.say(f"asked to stop: saved step {step}; the same command goes on from there")
                return config.preemption_exit_code
        store.wait()
        writer.say(f"finished: {folder} (loss.png, metrics.jsonl, checkpoints/); `jaxpt evaluate {folder}` measures it")
        return 0


# ------------------------------------------------------------------------------------------------ evaluation


class Trained(NamedTuple):
    """A run's checkpoint, ready to be used without the data of the run."""

    config: RunConfig
    parts: Parts
    tokenizer: Manifest  # a build without documents
    vocab: Vocab
    phase: PhaseConfig  # that the step belongs to, resolved
    mesh: Mesh
    snapshot: Snapshot


@contextlib.contextmanager
def open_trained(run: str, step: int | None = None, known: tuple[type, ...] = ()) -> Iterator[Trained]:
    """Restore what a run has trained, within its mesh: the averaged parameters, where it keeps such.

    Args:
      run: the run directory.
      step: the checkpoint; the newest sound one by default.
      known: configuration types that are not jaxpt's.

    Raises:
      ValueError: there is no such run or checkpoint.
    """
    config = configuration.load(Path(run) / "config.json", known)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    if not (Path(run) / "vocab").is_dir():
        raise ValueError(f"{run} lacks vocab/, the tokenizer that `jaxpt train` keeps there: copy the run whole")
    tokenizer = Manifest.load(Path(run) / "vocab")
    vocab = tokenizer.load_vocab()
    with jax.set_mesh(mesh), Checkpoints(Path(run) / "checkpoints") as store:
        parts = make_parts(config, vocab, mesh)
        which = "latest" if step is None else step
        restored = store.restore_params(parts.abstract.params, which, averaged=parts.abstract.averaged is not None)
        phase = [phase for phase in resolve_phases(config) if phase.from_step < max(restored.step, 1)][-1]
        carry = parts.judge.start(restored.state, jax.random.key(config.seed)) if parts.judge.start else {}
        snapshot = Snapshot(restored.state, carry, jax.numpy.int32(restored.step))
        yield Trained(config, parts, tokenizer, vocab, phase, mesh, snapshot)


def evaluate_run(
    run: str,
    *,
    data: tuple[str, ...] | None = None,
    step: int | None = None,
    rows: int | None = None,
    batch_size: int | None = None,
    known: tuple[type, ...] = (),
) -> dict[str, float]:
    """Return the metrics of a run's checkpoint on held-out data.

    Args:
      run: the run directory.
      data: data folders; the run's own (of the phase the step belongs to) by default.
      step: the checkpoint; the newest sound one by default.
      rows: rows of held-out data; all of them by default.
      batch_size: rows per batch; the run's own by default.
      known: configuration types that are not jaxpt's.

    Raises:
      ValueError: there is no such run or checkpoint, or the data have another tokenizer.
    """
    with open_trained(run, step, known) as (config, parts, tokenizer, _, phase, mesh, snapshot):
        assert phase.data and phase.seq_len and phase.batch_size  # resolved
        sources = open_sources(data or phase.data, config.vocab_size)
        # the same tokenizer, or the numbers mean nothing
        load_manifests([str(tokenizer.path), *(source.path for source in sources)], RowSpec())
        size = phase.batch_size if batch_size is None else batch_size
        check_rows(size, 1, mesh)
        batches = held_out_batches(sources, parts.judge.rows, phase.seq_len, size, rows, mesh)
        eval_step = jax.jit(make_eval_step(parts.judge, seed=config.seed), out_shardings=NamedSharding(mesh, P()))
        return {"step": int(snapshot.step), **evaluate(parts.judge, eval_step, *snapshot, batches)}
