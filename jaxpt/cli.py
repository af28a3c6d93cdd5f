"""The command line: ``jaxpt train``, ``jaxpt evaluate`` and ``jaxpt data build``.

Imports happen inside the commands, so that help is instant and the workers of a data build never load JAX.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

HELP = """\
usage: jaxpt COMMAND ...

Pre-train text models in JAX: from raw text to a trained, resumable, evaluated model.

commands:
  train CONFIG.py    train the model of a config file; resumes an unfinished run
  evaluate RUN       measure a run on held-out text, beside the unigram baseline
  data build OUT     turn raw text into token shards, and train or load a tokenizer

options:
  --help             help; of every command, too: jaxpt train --help
  --version          the version
  --distributed      join the processes of a run on several hosts: jaxpt train --help
  --debug            show the traceback of an error (or set JAXPT_DEBUG=1)

examples:
  jaxpt train configs/quickstart.py
  jaxpt data build data/books --input books/*.txt.gz --vocab-size 32000
  jaxpt train configs/bert_small.py --data data/books --steps 50000 --out runs/books
  jaxpt evaluate runs/books
"""

TRAIN_HELP = """\
usage: jaxpt train CONFIG.py [--FLAG VALUE ...]

Train the model that CONFIG.py describes, a Python file with `config() -> RunConfig`.

Every field of the configuration is a flag, down to the layers of the network:
`jaxpt train CONFIG.py --help` lists them all with their values in that file.

The run directory is --out, by default runs/<name of the config file>. It holds config.json, metrics.jsonl,
loss.png, TensorBoard events and checkpoints. If there is an unfinished run in it, that run is resumed where its
newest checkpoint left it; a finished one goes on only with more --steps.

On several hosts, start the same command on each of them with --distributed. JAX finds the others on TPU pods, on
SLURM, Kubernetes and Open MPI; elsewhere set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

examples:
  jaxpt train configs/quickstart.py
  jaxpt train configs/bert_small.py --data data/books --steps 50000 --batch-size 256 --optimizer.learning-rate 1e-3
  jaxpt train configs/bert_small.py --data data/books=0.7 data/code=0.3 --objective.rate 0.3
  jaxpt train configs/gpt2_small.py --mesh.fsdp 4 --mesh.tensor 2 --microbatches 2
  jaxpt train configs/bert_base.py --init-from runs/bert_base --out runs/second --seed 1
  srun jaxpt train configs/bert_base.py --data data/books --mesh.fsdp 8 --distributed
"""

DATA_HELP = """\
usage: jaxpt data build OUT (--input PATH [PATH ...] | --corpus prose|code) [--FLAG VALUE ...]

Turn raw text into token shards that `jaxpt train --data OUT` reads. `jaxpt data build --help` lists every flag.

examples:
  jaxpt data build data/books --input books/ --vocab-size 32000
  jaxpt data build data/news --input news.jsonl.zst --field text --tokenizer tokenizer.json
  jaxpt data build data/prose --corpus prose --vocab-size 8192
"""


@dataclass(frozen=True)
class EvaluateArgs:
    """Measure a run on held-out text: loss, perplexity, accuracy and, for a likelihood, bits per byte.

    Beside them stands the unigram baseline on the same positions. Example: jaxpt evaluate runs/quickstart --rows 512
    """

    data: tuple[str, ...] | None = None
    """Data folders to measure on (their validation split); the run's own by default. PATH=WEIGHT as in training."""
    step: int | None = None
    """The checkpoint to take; the newest by default."""
    rows: int | None = None
    """Rows of held-out text; all of them by default."""
    batch_size: int | None = None
    """Rows per batch; the run's own by default."""
    config: str | None = None
    """The config file of the run; needed only where it defines an objective of its own."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 for what the user can mend, said in one line."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args or os.environ.get("JAXPT_DEBUG", "") not in ("", "0")
    distributed = "--distributed" in args
    args = [arg for arg in args if arg not in ("--debug", "--distributed")]
    try:
        if distributed:
            _join()
        return _run(args, {"train": _train, "evaluate": _evaluate, "data": _data}, HELP, "jaxpt")
    except SystemExit as stop:  # tyro has said what is wrong, or printed help
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        goes_on = args[:1] != ["evaluate"]
        print("jaxpt: interrupted" + "; the same command goes on from what is saved" * goes_on, file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output (head, less) has gone, and that is no fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return 0
    except (ValueError, OSError) as error:
        if debug or not _for_the_user(error):
            traceback.print_exc()
            return 1
        print(f"jaxpt: error: {error}", file=sys.stderr)
        return 2


def _join() -> None:
    """Join the other processes of the run, before any command touches a device."""
    import jax

    given = map(os.environ.get, ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    try:
        processes, index = (None if value is None else int(value) for value in given)
        jax.distributed.initialize(num_processes=processes, process_id=index)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed: the other processes were not found ({error}): start one process per host on a TPU pod, "
            f"SLURM, Kubernetes or Open MPI, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


def _calm_cpu() -> None:
    """On virtual CPU devices, run one program after the other; accelerators are not concerned.

    Programs with collectives that overlap on a few cores starve each other of threads until XLA gives up.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def _run(args: list[str], commands: dict[str, Callable[[list[str]], int]], help_text: str, prog: str) -> int:
    """Hand the arguments to a command by its name."""
    if args and args[0] in commands:
        return commands[args[0]](args[1:])
    if args and args[0] in ("--help", "-h", "help"):
        print(help_text, end="")
        return 0
    if args and args[0] == "--version" and prog == "jaxpt":
        print(f"jaxpt {importlib.metadata.version('jaxpt')}")
        return 0
    if not args:
        print(help_text, end="", file=sys.stderr)
        return 2
    near = difflib.get_close_matches(args[0], commands, n=1)
    hint = f"did you mean `{prog} {near[0]}`?" if near else f"the commands are {', '.join(commands)}"
    raise ValueError(f"`{prog} {args[0]}` is no command: {hint} (`{prog} --help`)")


def _for_the_user(error: BaseException) -> bool:
    """Whether jaxpt itself raised the error, as a message; one from the depths of a library needs its traceback."""
    if isinstance(error, OSError) and error.filename is not None:
        return True  # names the path
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    home = str(Path(__file__).parent) + os.sep
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(home)


def _named_first(args: list[str], what: str, usage: str) -> None:
    if args and args[0].startswith("-") and args[0] not in ("--help", "-h"):
        raise ValueError(f"name {what} before {args[0]}: {usage} {' '.join(args[:2])} ...")


def _train(args: list[str]) -> int:
    if not args or args[0] in ("--help", "-h"):
        print(TRAIN_HELP, end="", file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    _named_first(args, "the config file", "jaxpt train CONFIG.py")
    from jaxpt.config import load_config, override, validate

    path = args[0]
    config = load_config(path)
    if config.out is None:
        config = replace(config, out=f"runs/{Path(path).stem}")
    config = override(config, args[1:], prog=f"jaxpt train {path}")
    validate(config)
    _calm_cpu()
    from jaxpt.train import train

    return train(config)


def _evaluate(args: list[str]) -> int:
    _named_first(args, "the run directory", "jaxpt evaluate RUN")
    import tyro

    run, flags = (args[0], args[1:]) if args and args[0] not in ("--help", "-h") else ("RUN", ["--help"])
    asked = tyro.cli(EvaluateArgs, prog=f"jaxpt evaluate {run}", args=flags)
    _calm_cpu()
    for name, value in (("rows", asked.rows), ("batch-size", asked.batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}")
    from jaxpt.config import config_types, load_config
    from jaxpt.train import evaluate_run

    metrics = evaluate_run(
        run,
        data=asked.data,
        step=asked.step,
        rows=asked.rows,
        batch_size=asked.batch_size,
        known=config_types(load_config(asked.config)) if asked.config else (),
    )
    if asked.json:
        print(json.dumps(metrics))
    else:
        width = max(map(len, metrics), default=0)
        for name, value in metrics.items():
            print(f"{name:<{width}}  {value:.6g}")
    return 0


def _data(args: list[str]) -> int:
    return _run(args, {"build": _data_build}, DATA_HELP, "jaxpt data")


def _data_build(args: list[str]) -> int:
    if not args:
        return _run([], {}, DATA_HELP, "jaxpt data build")
    _named_first(args, "the folder of the build", "jaxpt data build OUT")
    import tyro

    from jaxpt.data.build import BuildConfig, build

    teaching = DATA_HELP.partition("\n\n")[2].replace(" `jaxpt data build --help` lists every flag.", "")
    positional = (tyro.conf.PositionalRequiredArgs,)
    build(tyro.cli(BuildConfig, prog="jaxpt data build", description=teaching, args=args, config=positional))
    return 0
