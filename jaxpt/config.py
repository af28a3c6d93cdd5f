"""The configuration of a run: load it from a file, override it by flags, validate it, save it beside the run.

A config file is a Python file with a function ``config() -> RunConfig``. Every field of it, down to the layers of
the network, is a flag: ``jaxpt train CONFIG.py --steps 500 --objective.rate 0.3``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fnmatch
import importlib
import importlib.util
import json
import os
import sys
import types
import typing
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxpt.data.manifest import Manifest, write_atomically
from jaxpt.optimizer import OptimizerConfig, check_optimizer
from jaxpt.sharding import MeshConfig
from jaxpt.tasks import parse_task
from jaxpt.types import ObjectiveConfig

BUILT_IN = ("prose", "code")  # corpora that are built from the installed packages when a run first asks for them

# The fields that may change when a run is resumed; any other difference is refused. They cannot change what a
# step computes beyond float rounding (mesh, microbatches, remat, layers), or say how long and how often (steps
# stretches a schedule whose `optimizer.schedule_steps` is None). Two more rules are in `resume_differences`: data
# may move to another path (its digest is compared when it is opened), and phases may be appended.
MAY_CHANGE = (
    "steps",
    "microbatches",
    "mesh.*",
    "objective*.remat",
    "objective*.attention",
    "objective*.layers",
    "log_every",
    "eval_every",
    "eval_rows",
    "tasks*",
    "diagnose_every",
    "checkpoint_every",
    "keep",
    "keep_best",
    "max_failing",
    "profile",
    "preemption_exit_code",
    "out",
)


@dataclass(frozen=True)
class PhaseConfig:
    """A later part of a run: from some step on, other data, longer rows or bigger batches.

    Phases are append-only: a resumed run may have more of them than before, beginning at steps still to come.
    """

    from_step: int
    """The first step of the phase; phases are in order of it."""
    data: tuple[str, ...] | None = None
    """Data of the phase, as `--data`; None keeps what came before."""
    seq_len: int | None = None
    """Tokens per row; None keeps what came before."""
    batch_size: int | None = None
    """Rows per batch; None keeps what came before."""
    learning_rate: float | None = None
    """The learning rate as a multiple of the schedule's; None keeps what came before (1 at first)."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run, but for the machine it runs on."""

    objective: ObjectiveConfig
    """What is learned, and the network that learns it."""
    data: tuple[str, ...] = ("prose",)
    """Folders that `jaxpt data build` made, or the built-in "prose" or "code". Several are mixed: PATH=WEIGHT."""
    steps: int = 1000
    """Updates in all. A finished run goes on when this grows (see `--optimizer.schedule-steps`)."""
    batch_size: int = 64
    """Rows of the global batch of one update."""
    seq_len: int = 256
    """Tokens per row."""
    microbatches: int = 1
    """Parts that a batch is cut into to save memory; the result is the same up to rounding."""
    seed: int = 0
    """Decides initial parameters, order of the data, corruption and dropout."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How parameters are updated."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the devices are arranged; the numbers multiply to the number of devices, -1 takes what is left."""
    out: str | None = None
    """The run directory; runs/<name of the config file> by default. An unfinished run there is resumed."""
    init_from: str | None = None
    """Another run whose newest checkpoint gives the first parameters; its objective may be another one."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 100
    """Steps between evaluations on held-out data; the end of a run always evaluates. 0: only at the end."""
    eval_rows: int | None = 512
    """Rows of held-out data per evaluation; None takes all of it."""
    tasks: tuple[str, ...] = ()
    """What is asked of the vectors of texts at every evaluation: sts=FILE, retrieval=FILE or FILE,FILE
    (docs/vectors.md)."""
    diagnose_every: int = 0
    """Steps between measurements of how the loss's terms get along and how it bends (docs/diagnostics.md), each at the
    cost of about 40 steps. 0: never."""
    checkpoint_every: int = 100
    """Steps between checkpoints: what a killed machine can lose. The end of a run always saves."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 1
    """Checkpoints of lowest evaluation loss that are kept besides."""
    spike_factor: float = 0.0
    """Skip an update whose gradient norm exceeds this many times its moving average; 0 skips non-finite ones only."""
    max_failing: int = 20
    """Stop, with the last good checkpoint, after this many skipped updates in a row."""
    profile: int = 0
    """Trace this many steps into OUT/profile, after the first few of the process, for xprof or TensorBoard."""
    preemption_exit_code: int = 0
    """Exit code after a SIGTERM, once the checkpoint is saved; some schedulers restart a job by its code."""
    vocab_size: int = 8192
    """Vocabulary of the tokenizer that is trained for a built-in corpus; other data has its own."""
    phases: tuple[PhaseConfig, ...] = ()
    """Later parts of the run with other data, length or batch size; written in the config file."""


def parse_source(entry: str) -> tuple[str, float]:
    """Split one entry of ``data`` into path and weight.

    >>> parse_source("data/books=0.3"), parse_source("prose"), parse_source("runs/a=b/data")
    (('data/books', 0.3), ('prose', 1.0), ('runs/a=b/data', 1.0))
    """
    path, separator, weight = entry.rpartition("=")
    if separator and path:
        with contextlib.suppress(ValueError):
            return path, float(weight)
    return entry, 1.0


def resolve_phases(config: RunConfig) -> tuple[PhaseConfig, ...]:
    """The phases of a run with every field filled in; the first begins at step 0."""
    phases = [PhaseConfig(0, config.data, config.seq_len, config.batch_size)]
    for phase in config.phases:
        given = {name: value for name, value in vars(phase).items() if value is not None}
        phases.append(dataclasses.replace(phases[-1], **given))
    return tuple(phases)


def rate_changes(config: RunConfig) -> tuple[tuple[int, float], ...]:
    """The steps from which a phase gives the schedule's learning rate another factor, and the factors."""
    return tuple((phase.from_step, phase.learning_rate) for phase in config.phases if phase.learning_rate is not None)


# ------------------------------------------------------------------------------------- load and override


def load_config(path: str | os.PathLike[str]) -> RunConfig:
    """The configuration that a config file makes.

    Raises:
      ValueError: there is no such file, it does not run, or its ``config()`` is absent or returns something else.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1, cutoff=0.5)
        hint = f"did you mean {path.parent / near[0]}?" if near else "name a Python file with `config() -> RunConfig`"
        raise ValueError(f"there is no config file {path}: {hint}")
    name = f"jaxpt_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file: a config file is one, with `config() -> RunConfig`")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses that the file defines look their module up here
    try:
        spec.loader.exec_module(module)
        make = getattr(module, "config", None)
        if not callable(make):
            raise ValueError("it has no function `config()`; add `def config() -> RunConfig: return RunConfig(...)`")
        config = make()
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"the config file {path} does not work{_line_of(error, path)}: {kind}{error}") from error
    if not isinstance(config, RunConfig):
        raise ValueError(
            f"config() of {path} returned {type(config).__name__}: it must return a jaxpt.config.RunConfig"
        )
    return config


def _line_of(error: BaseException, path: Path) -> str:
    lines, trace = [], error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path.absolute()):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f" (line {lines[-1]})" if lines else ""


def override(config: RunConfig, args: Sequence[str], prog: str = "jaxpt train CONFIG.py") -> RunConfig:
    """The configuration with command-line flags laid over it.

    Every field is a flag (``--optimizer.learning-rate 1e-3``); the type of a nested configuration, such as the
    objective's, is what the config file chose. Prints help or what is wrong, and exits, as argparse does.
    """
    import tyro

    with warnings.catch_warnings():
        # the objective is declared by protocol and tyro takes the type of the default, which is what we want
        warnings.filterwarnings("ignore", message="The field .* is annotated with type", category=UserWarning)
        return tyro.cli(RunConfig, prog=prog, args=list(args), default=config, config=(tyro.conf.AvoidSubcommands,))


# ---------------------------------------------------------------------------------------------- validate


def validate(config: RunConfig, *, data: bool = True) -> None:
    """Raise ValueError, with the cause and the fix, for a configuration that cannot run.

    What depends on the devices (``sharding.check_rows``) or the tokenizer (``objective.build``) is checked there.

    Args:
      config: of the run.
      data: whether the data folders must be there.
    """
    _validate_types(config)
    for name in (
        "steps",
        "batch_size",
        "seq_len",
        "microbatches",
        "log_every",
        "checkpoint_every",
        "keep",
        "max_failing",
    ):
        _check(getattr(config, name) >= 1, f"{name} is {getattr(config, name)}: it must be at least 1")
    for name in ("eval_every", "diagnose_every", "keep_best", "seed", "profile"):
        _check(getattr(config, name) >= 0, f"{name} is {getattr(config, name)}: it cannot be negative")
    _check(config.seed < 2**32, f"seed is {config.seed}: it must be below 2**32")
    _check(config.eval_rows is None or config.eval_rows >= 1, f"eval_rows is {config.eval_rows}: 1 or more, or None")
    spike = config.spike_factor
    _check(spike == 0 or spike > 1, f"spike_factor is {spike}: it must be 0 (off) or above 1, for example 10")
    _check(0 <= config.preemption_exit_code <= 255, "preemption_exit_code must be between 0 and 255")
    _check(config.vocab_size >= 300, f"vocab_size is {config.vocab_size}: 256 bytes and the special tokens need 300")
    out = config.out or ""
    _check("://" not in out, f"out is {out}: a run directory must be on a local or mounted file system")
    for kind, files in map(parse_task, config.tasks):
        for file in files:
            _check(not data or Path(file).is_file(), f"tasks: there is no file {file} for {kind}")
    begin = 0
    for phase in resolve_phases(config):
        _check(phase.from_step >= begin, f"a phase begins at step {phase.from_step}, but one before it at {begin - 1}")
        begin = phase.from_step + 1
        factor = phase.learning_rate
        _check(factor is None or factor >= 0, f"learning_rate of a phase is {factor}: a multiple of the schedule's")
        _validate_rows(config, phase, data=data)
    check_optimizer(config.optimizer, config.steps)


def _validate_types(config: RunConfig) -> None:
    """A config file is Python, and nothing has looked at what it puts where; flags are typed already."""
    objective: Any = config.objective
    _check(
        dataclasses.is_dataclass(objective) and not isinstance(objective, type) and hasattr(objective, "build"),
        f"objective is {objective!r}: it must be an objective's configuration, for example CausalLM()",
    )
    for path, part in parts("", config):
        with contextlib.suppress(NameError):  # a type that an objective of one's own names but does not define
            hints = typing.get_type_hints(type(part))
            for entry in dataclasses.fields(part):
                value, hint = getattr(part, entry.name), hints[entry.name]
                name = f"{path}.{entry.name}".lstrip(".")
                kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
                example = '; a tuple of one is written ("this",)' if "tuple" in kind else ""
                _check(_fits(value, hint), f"{name} is {value!r}: it must be {kind}{example}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; of types that fields of configurations do not have, always."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in args
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in args)
    if hint is tuple or origin is tuple:
        kinds = args[:1] * len(value) if args[1:] == (...,) and isinstance(value, tuple) else args
        return isinstance(value, tuple) and (not args or (len(value) == len(kinds) and all(map(_fits, value, kinds))))
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    if dataclasses.is_dataclass(hint) or hint in (bool, str, type(None)):
        return isinstance(value, typing.cast(type, hint))
    return True


def _validate_rows(config: RunConfig, phase: PhaseConfig, *, data: bool) -> None:
    assert phase.data is not None and phase.seq_len is not None and phase.batch_size is not None  # resolved
    _check(phase.seq_len >= 1 and phase.batch_size >= 1, "seq_len and batch_size of a phase must be at least 1")
    _check(
        phase.batch_size % config.microbatches == 0,
        f"batch_size {phase.batch_size} cannot be cut into {config.microbatches} equal microbatches: make "
        f"microbatches a divisor of it",
    )
    for path, part in parts("objective", config.objective):
        learned = getattr(part, "positions", None) == "learned"
        longest = getattr(part, "max_length", None)
        _check(
            not learned or longest is None or phase.seq_len <= longest,
            f"seq_len {phase.seq_len} is longer than the {longest} positions that the network learns: raise "
            f"{path}.max_length or shorten the rows",
        )
    _check(bool(phase.data), f"data is empty: name a data folder, or {' or '.join(BUILT_IN)}")
    for path, weight in map(parse_source, phase.data):
        _check(0 < weight < float("inf"), f"data {path} has weight {weight}: weights are positive numbers")
        if path in BUILT_IN or not data:
            continue
        try:
            Manifest.load(path)
        except ValueError as error:
            raise ValueError(f"data: {error} Built in are {' and '.join(map(repr, BUILT_IN))}.") from None


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def parts(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every dataclass inside a configuration, with its dotted path."""
    if dataclasses.is_dataclass(value):
        yield path, value
        for part in dataclasses.fields(value):
            yield from parts(f"{path}.{part.name}", getattr(value, part.name))
    elif isinstance(value, tuple | list | dict):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from parts(f"{path}.{key}", entry)


def with_layers(value: Any, **changes: Any) -> Any:
    """Return a configuration with some fields of every stack of layers in it changed.

    Args:
      value: an objective's configuration, or a part of it.
      **changes: fields of ``TransformerConfig``, such as ``attention="dense"``.
    """
    if hasattr(value, "remat"):
        return dataclasses.replace(value, **changes)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [part.name for part in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: with_layers(getattr(value, name), **changes) for name in names})
    if isinstance(value, dict):
        return {key: with_layers(entry, **changes) for key, entry in value.items()}
    return tuple(with_layers(entry, **changes) for entry in value) if isinstance(value, tuple) else value


# ------------------------------------------------------------------------------------------ save and load

TYPE = "@type"  # the key of a JSON object that names the dataclass it was


def to_json(value: Any) -> Any:
    """A configuration as plain JSON, every dataclass tagged with its type.

    >>> to_json(MeshConfig(fsdp=4))["@type"], to_json(MeshConfig(fsdp=4))["fsdp"]
    ('jaxpt.sharding.MeshConfig', 4)
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {part.name: to_json(getattr(value, part.name)) for part in dataclasses.fields(value) if part.init}
        return {TYPE: _type_name(type(value))} | fields
    if isinstance(value, tuple | list):
        return [to_json(entry) for entry in value]
    if isinstance(value, dict) and all(isinstance(key, str) and key != TYPE for key in value):
        return {key: to_json(entry) for key, entry in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"a configuration holds numbers, texts, tuples and dataclasses, not {value!r}")


def from_json(value: Any, known: Sequence[type] = ()) -> Any:
    """The configuration that ``to_json`` wrote. Only dataclasses of jaxpt and the ``known`` ones are rebuilt.

    Raises:
      ValueError: a type is not known, or has no such field.
    """
    if isinstance(value, list):
        return tuple(from_json(entry, known) for entry in value)
    if not isinstance(value, dict):
        return value
    if TYPE not in value:
        return {key: from_json(entry, known) for key, entry in value.items()}
    cls = _find_type(value[TYPE], known)
    fields = {name: from_json(entry, known) for name, entry in value.items() if name != TYPE}
    strange = sorted(fields.keys() - {part.name for part in dataclasses.fields(cls)})
    _check(not strange, f"{value[TYPE]} has no field {', '.join(strange)}: was it saved by another version of jaxpt?")
    try:
        return cls(**fields)
    except TypeError as error:
        raise ValueError(f"{value[TYPE]} cannot be rebuilt: {error}") from None


def _type_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _find_type(name: str, known: Sequence[type]) -> Any:
    for cls in known:
        if _type_name(cls) == name:
            return cls
    module, _, cls_name = str(name).rpartition(".")
    found = None
    if module.split(".")[0] == "jaxpt":
        with contextlib.suppress(ImportError):
            found = getattr(importlib.import_module(module), cls_name, None)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ValueError(
            f"{name} is not a configuration of this jaxpt: a run of an objective of your own is read with "
            f"its types known (`jaxpt evaluate RUN --config CONFIG.py`)"
        )
    return found


def save(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write a configuration as ``config.json``, in one piece."""
    from etils import epath

    write_atomically(epath.Path(os.fspath(path)), (json.dumps(to_json(config), indent=1) + "\n").encode())


def load(path: str | os.PathLike[str], known: Sequence[type] = ()) -> RunConfig:
    """Read the ``config.json`` of a run; fields that are younger than the file take their defaults.

    Args:
      path: the file.
      known: dataclasses outside jaxpt that the configuration may hold; ``config_types`` lists those of another.

    Raises:
      ValueError: the file is absent or damaged, or holds something that is not known.
    """
    try:
        config = from_json(json.loads(Path(path).read_text("utf-8")), known)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"there is no {path}: {Path(path).parent} is not the directory of a run") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _check(isinstance(config, RunConfig), f"{path} is not the configuration of a run")
    return config


def config_types(config: RunConfig) -> tuple[type, ...]:
    """The types of every dataclass inside a configuration."""
    return tuple({type(part) for _, part in parts("", config)})


# ------------------------------------------------------------------------------------------------ resume


def resume_differences(old: RunConfig, new: RunConfig, step: int = 0) -> list[str]:
    """What forbids resuming the run ``old`` as ``new``: one line per field; ``MAY_CHANGE`` lists what may differ.

    Args:
      old: the configuration that the run directory holds.
      new: the configuration asked for.
      step: the restored step; phases that are appended must begin there or later.
    """
    before = _flat(old)
    after = _flat(dataclasses.replace(new, phases=new.phases[: len(old.phases)]))
    lines = []
    for name in before | after:
        was, now = before.get(name, "absent"), after.get(name, "absent")
        if was != now and not any(fnmatch.fnmatchcase(name, pattern) for pattern in MAY_CHANGE):
            lines.append(f"{name}: {was} in the run, {now} now")
    for phase in new.phases[len(old.phases) :]:
        if phase.from_step < step:
            lines.append(f"phases: a new phase begins at step {phase.from_step}, before the restored step {step}")
    return lines


def _flat(config: RunConfig) -> dict[str, Any]:
    """{dotted name: leaf}; of data the weights only, because a data folder may move and has a digest of its own."""

    def walk(path: str, value: Any) -> Iterator[tuple[str, Any]]:
        if path.rpartition(".")[2] == "data" and isinstance(value, list):
            yield path, f"weights {[parse_source(entry)[1] for entry in value]}"
        elif isinstance(value, dict | list) and value:
            for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
                yield from walk(f"{path}.{key}" if path else str(key), entry)
        else:
            yield path, () if isinstance(value, dict | list) else value

    return dict(walk("", to_json(config)))
