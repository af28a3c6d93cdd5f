"""The command line: ``jaxpt train``, ``evaluate``, ``embed``, ``show``, ``plan`` and ``data build``.

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
from typing import Literal

from jaxpt import process

HELP = """\
usage: jaxpt COMMAND ...

Pre-train text models in JAX: from raw text to a trained, resumable, evaluated model.

commands:
  train CONFIG.py    train the model of a config file; resumes an unfinished run
  evaluate RUN       measure a run on held-out text, beside the unigram baseline; or its vectors, by --task
  embed RUN          write the vectors of your texts
  show CONFIG.py     what the model reads and must predict, and who sees whom, on your text or a row of data
  plan CONFIG.py     what the run needs on a TPU pod: memory, traffic, time; no TPU is needed
  data build OUT     turn raw text into token shards, and train or load a tokenizer

options:
  --help             help; of every command, too: jaxpt train --help
  --version          the version
  --distributed      join the processes of a run on several hosts: jaxpt train --help
  --debug            show the traceback of an error (or set JAXPT_DEBUG=1)

examples:
  jaxpt train configs/quickstart.py
  jaxpt show configs/quickstart.py --text "The quick brown fox."
  jaxpt data build data/books --input books/*.txt.gz --vocab-size 32000
  jaxpt train configs/bert_small.py --data data/books --steps 50000 --out runs/books
  jaxpt evaluate runs/books
  jaxpt evaluate runs/simcse --task sts --data stsb-dev.csv
  jaxpt embed runs/simcse --input sentences.txt --output sentences.npy
"""

TRAIN_HELP = """\
usage: jaxpt train CONFIG.py [--FLAG VALUE ...]

Train the model that CONFIG.py describes, a Python file with `config() -> RunConfig`.

Every field of the configuration is a flag, down to the layers of the network:
`jaxpt train CONFIG.py --help` lists them all with their values in that file.

The run directory is --out, by default runs/<name of the config file>. It holds config.json, metrics.jsonl,
loss.png, TensorBoard events, checkpoints and the tokenizer (vocab). If there is an unfinished run in it, that run is
resumed where its newest checkpoint left it; a finished one goes on only with more --steps.

On several hosts, start the same command on each of them with --distributed. JAX finds the others on TPU pods, on
SLURM, Kubernetes and Open MPI; elsewhere set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

The command restarts itself once so that memory comes in huge pages (JAXPT_HUGE_PAGES=0: it does not) and keeps
compiled programs in ~/.cache/jaxpt (JAXPT_CACHE=DIR: there; JAX_COMPILATION_CACHE_DIR= : nowhere).

examples:
  jaxpt train configs/quickstart.py
  jaxpt train configs/bert_small.py --data data/books --steps 50000 --batch-size 256 --optimizer.learning-rate 1e-3
  jaxpt train configs/bert_small.py --data data/books=0.7 data/code=0.3 --objective.rate 0.3
  jaxpt train configs/gpt2_small.py --mesh.fsdp 4 --mesh.tensor 2 --microbatches 2
  jaxpt train configs/bert_base.py --init-from runs/bert_base --out runs/second --seed 1
  srun jaxpt train configs/bert_base.py --data data/books --mesh.fsdp 8 --distributed   # one task per GPU
"""

SHOW_HELP = """\
usage: jaxpt show CONFIG.py [--text "..."] [--row N] [--step N] [--png FILE] [--html FILE] [--FLAG VALUE ...]

See an objective: the row, what the model reads of it, what it must predict and where, with which weight, where
documents end, and who sees whom. Nothing is trained, and no accelerator is used.

Without --text it is a row of the training data, exactly as the run is served it: the same tokens, masks and noise.
Every flag of `jaxpt train` works. The tokenizer is that of --data; a built-in corpus is built when first asked for.

options:
  --text "..."   your own text instead of the data; given several times, each is a document of the row
  --row N        row of the batch (default 0); with --text, the row whose random numbers are drawn
  --step N       step of the run (default 0): another step, other rows and other noise
  --png FILE     write a picture of the tokens and of the attention
  --html FILE    write a page for the browser: hover over a token for its id, position, weight and what it sees

examples:
  jaxpt show configs/quickstart.py --text "The quick brown fox jumps over the lazy dog."
  jaxpt show configs/bert_mini.py --row 3 --step 100 --objective.rate 0.4 --html row.html
  jaxpt show configs/modernbert_base.py --data data/books --png row.png
  jaxpt show configs/quickstart.py --seq-len 64 --text "One document." --text "And another one."
"""

PLAN_HELP = """\
usage: jaxpt plan CONFIG.py --topology KIND:SHAPE [--json] [--try] [--FLAG VALUE ...]

Say what a run needs on a TPU pod before one is rented: compile its real train step for the pod, with no TPU here,
and report memory per chip, FLOPs, every collective with its bytes, bounds of the step time, and what to change where
it does not fit. The compiler comes with `pip install -e ".[tpu]"`; compiling takes some minutes.

Every flag of `jaxpt train` works. The data need not be there; without them the vocabulary has --vocab-size tokens.

options:
  --topology KIND:SHAPE   v4 and v5p have shapes like 4x4x4, v5e and v6e like 8x8; cpu:8 is eight virtual CPU devices
  --json                  print one JSON object
  --try                   where it does not fit, compile what would help, one change after the other, until it fits

examples:
  jaxpt plan configs/bert_large.py --topology v5e:8x8 --mesh.fsdp 8 --vocab-size 30522
  jaxpt plan configs/llama_7b.py --topology v5p:4x4x8 --mesh.data 1 --mesh.fsdp 128 --vocab-size 32000
  jaxpt plan configs/llama_1b.py --topology v6e:4x4 --mesh.fsdp 4 --mesh.tensor 4 --microbatches 4 --try
  jaxpt plan configs/bert_tiny.py --topology cpu:8 --mesh.fsdp 4 --json
"""

DATA_HELP = """\
usage: jaxpt data build OUT (--input PATH [PATH ...] | --corpus prose|code) [--FLAG VALUE ...]

Turn raw text into token shards that `jaxpt train --data OUT` reads. `jaxpt data build --help` lists every flag.

examples:
  jaxpt data build data/books --input books/ --vocab-size 32000
  jaxpt data build data/news --input news.jsonl.zst --field text --tokenizer tokenizer.json
  jaxpt data build data/pairs --input pairs.jsonl --fields source target --text-tokens 400 100
  jaxpt data build data/nli --input nli.csv --fields sent0 sent1 hard_neg
  jaxpt data build data/search --input search.jsonl --fields anchor positives negatives --lists each --negatives 1
  jaxpt data build data/prose --corpus prose --vocab-size 8192
"""


@dataclass(frozen=True)
class EmbedArgs:
    """Write the vectors of texts, one per line of the input and in its order, as a float32 array [texts, width].

    Example: jaxpt embed runs/simcse --input sentences.txt, and then numpy.load("sentences.txt.npy").
    """

    input: str
    """A text per line, per record of JSON lines or FASTA, or per row of CSV, TSV or Parquet; also .gz .xz .zst .bz2."""
    output: str | None = None
    """The .npy file; INPUT.npy by default."""
    field: str = "text"
    """Field of JSON lines, or column of a table or Parquet, that holds the text."""
    text: int = 0
    """0 or 1: are these first or second texts of an example, where different networks read the two?"""
    pooling: Literal["first", "mean", "last"] | None = None
    """What the vector is made of, if not what the objective says: the state of one token, or the mean of all."""
    normalize: bool = False
    """Make every vector as long as 1."""
    step: int | None = None
    """The checkpoint to take; the newest by default."""
    batch_size: int = 64
    """Texts at a time; the vectors do not depend on it."""
    config: str | None = None
    """The config file of the run; needed only where it defines an objective of its own."""


@dataclass(frozen=True)
class EvaluateArgs:
    """Measure a run on held-out text: loss, perplexity, accuracy and, for a likelihood, bits per byte.

    Beside them stands the unigram baseline on the same positions. Example: jaxpt evaluate runs/quickstart --rows 512

    With --task, measure its vectors of texts instead (docs/vectors.md): jaxpt evaluate RUN --task sts --data FILE
    """

    data: tuple[str, ...] | None = None
    """Data folders to measure on (their validation split); the run's own by default. PATH=WEIGHT as in training.
    With --task: the task's files."""
    task: Literal["sts", "retrieval"] | None = None
    """`sts`: pairs with scores, .tsv, .csv or .jsonl; `retrieval`: pairs, likewise, or two line-aligned files."""
    columns: tuple[str, ...] = ()
    """With --task: the names of the two texts (and for sts the score) in a header, or of the fields of JSON lines."""
    pooling: Literal["first", "mean", "last"] | None = None
    """With --task: what a vector is made of, if not what the objective says."""
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
    commands = {"train": _train, "evaluate": _evaluate, "embed": _embed}
    commands |= {"show": _show, "plan": _plan, "data": _data}
    try:
        if argv is None and args[:1] == ["train"] and len(args) > 1 and not {"--help", "-h"} & set(args):
            process.restart_with_huge_pages()
        if distributed:
            process.join()
        return _run(args, commands, HELP, "jaxpt")
    except SystemExit as stop:  # tyro has said what is wrong, or printed help
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        goes_on = args[:1] not in (["evaluate"], ["embed"], ["show"])
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
    process.calm_cpu()
    process.keep_compiled_programs()
    from jaxpt.train import train

    return train(config)


def _show(args: list[str]) -> int:
    if not args or args[0] in ("--help", "-h"):
        print(SHOW_HELP, end="", file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    _named_first(args, "the config file", "jaxpt show CONFIG.py")
    path, flags, texts = args[0], list(args[1:]), []
    while (text := _take(flags, "--text", '"The quick brown fox."')) is not None:
        texts.append(text)
    row, step = (_number(name, _take(flags, name, "3")) for name in ("--row", "--step"))
    png, html = _take(flags, "--png", "row.png"), _take(flags, "--html", "row.html")
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX loads: leave accelerators to those who train
    from rich.console import Console

    from jaxpt.config import load_config, override

    config = override(load_config(path), flags, prog=f"jaxpt show {path}")
    process.keep_compiled_programs()
    from jaxpt.show import look, print_look, write_page, write_picture

    seen = look(config, texts, row, step)
    print_look(seen, Console(highlight=False))
    for file, write in ((png, write_picture), (html, write_page)):
        if file is not None:
            write(seen, file)
            print(f"wrote {file}", file=sys.stderr)
    return 0


def _number(name: str, value: str | None) -> int:
    """A whole number from the command line, 0 where it is absent."""
    try:
        return int(value or 0)
    except ValueError:
        raise ValueError(f"{name} {value}: give a whole number, for example {name} 3") from None


def _plan(args: list[str]) -> int:
    if not args or args[0] in ("--help", "-h"):
        print(PLAN_HELP, end="", file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    _named_first(args, "the config file", "jaxpt plan CONFIG.py")
    path, flags = args[0], list(args[1:])
    as_json, tries = "--json" in flags, "--try" in flags
    flags = [flag for flag in flags if flag not in ("--json", "--try")]
    topology = _take(flags, "--topology")
    if topology is None and not {"--help", "-h"} & set(flags):
        raise ValueError("say for which machine: --topology v5p:4x4x4 (`jaxpt plan --help` has examples)")
    # Before JAX loads: compile here, look for no TPU, and let the TPU compiler say only what is wrong.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")
    for name, value in (("TPU_WORKER_HOSTNAMES", "localhost"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")):
        os.environ.setdefault(name, value)
    from rich.console import Console

    from jaxpt.config import load_config, override
    from jaxpt.plan import make_plan, show, to_json
    from jaxpt.plan.advice import remedies

    config = override(load_config(path), flags, prog=f"jaxpt plan {path}")
    assert topology is not None
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    plan = make_plan(config, topology, say)
    changes: list[str] = []
    for flag, changed in remedies(config, plan.mesh, plan.batch_size) if tries and not plan.memory.fits else ():
        changes.append(flag)
        say(f"{plan.memory.peak / 2**30:.1f} GiB do not fit; trying {' '.join(changes)}")
        plan = make_plan(changed, topology, say)
        if plan.memory.fits:
            break
    if as_json:
        print(json.dumps(to_json(plan) | {"changes": changes}))
    else:
        show(plan, console)
        if changes:
            console.print(f"with {' '.join(changes)}" + ("" if plan.memory.fits else ", and still it does not fit"))
    return 0 if plan.memory.fits else 1


def _take(flags: list[str], name: str, example: str = "v5p:4x4x4") -> str | None:
    """Remove ``name VALUE`` (or ``name=VALUE``) from the flags and return the value, None where it is absent."""
    for place, flag in enumerate(flags):
        if flag.startswith(f"{name}="):
            return flags.pop(place).partition("=")[2]
        if flag == name:
            if place + 1 == len(flags):
                raise ValueError(f"{name} needs a value, for example {name} {example}")
            del flags[place]
            return flags.pop(place)
    return None


def _evaluate(args: list[str]) -> int:
    _named_first(args, "the run directory", "jaxpt evaluate RUN")
    import tyro

    run, flags = (args[0], args[1:]) if args and args[0] not in ("--help", "-h") else ("RUN", ["--help"])
    asked = tyro.cli(EvaluateArgs, prog=f"jaxpt evaluate {run}", args=flags)
    process.calm_cpu()
    process.keep_compiled_programs()
    for name, value in (("rows", asked.rows), ("batch-size", asked.batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}")
    known = _known(asked.config)
    if asked.task:
        metrics = _measure_task(run, asked, known)
    else:
        if asked.columns or asked.pooling:
            raise ValueError("--columns and --pooling are for --task: say which task")
        from jaxpt.train import evaluate_run

        metrics = evaluate_run(
            run, data=asked.data, step=asked.step, rows=asked.rows, batch_size=asked.batch_size, known=known
        )
    if asked.json:
        print(json.dumps(metrics))
    else:
        width = max(map(len, metrics), default=0)
        for name, value in metrics.items():
            print(f"{name:<{width}}  {value:.6g}")
    return 0


def _known(config: str | None) -> tuple[type, ...]:
    """The types of the configuration in a config file, where one is named."""
    from jaxpt.config import config_types, load_config

    return config_types(load_config(config)) if config else ()


def _measure_task(run: str, asked: EvaluateArgs, known: tuple[type, ...]) -> dict[str, float]:
    if not asked.data or asked.rows is not None:
        raise ValueError(f"--task {asked.task} reads files of its own, whole: give --data FILE, and no --rows")
    if asked.columns and len(asked.columns) != (3 if asked.task == "sts" else 2):
        raise ValueError("--columns are three of --task sts, the two texts and the score, and two of --task retrieval")
    from jaxpt.embed import measure_run

    assert asked.task is not None
    return measure_run(
        run,
        asked.task,
        asked.data,
        columns=asked.columns,
        pooling=asked.pooling,
        step=asked.step,
        batch_size=asked.batch_size or 64,
        known=known,
    )


def _embed(args: list[str]) -> int:
    _named_first(args, "the run directory", "jaxpt embed RUN")
    import tyro

    run, flags = (args[0], args[1:]) if args and args[0] not in ("--help", "-h") else ("RUN", ["--help"])
    asked = tyro.cli(EmbedArgs, prog=f"jaxpt embed {run}", args=flags)
    if asked.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {asked.batch_size}")
    if asked.text not in (0, 1):
        raise ValueError(f"--text is 0 or 1, the first or the second text of an example, not {asked.text}")
    process.calm_cpu()
    process.keep_compiled_programs()
    from jaxpt.embed import embed_run

    output = asked.output or f"{asked.input}.npy"
    written = embed_run(
        run,
        asked.input,
        output,
        field=asked.field,
        text=asked.text,
        pooling=asked.pooling,
        normalize=asked.normalize,
        step=asked.step,
        batch_size=asked.batch_size,
        known=_known(asked.config),
    )
    count, width = written.shape
    shown = f"; {written.cut} were longer than {written.longest} tokens and were cut" if written.cut else ""
    print(f"wrote {output}: {count} vectors of {width} numbers{shown}")
    if written.broken:
        print(
            f"jaxpt: warning: {written.broken} of {count} vectors are not finite (nan or infinite), as of a run that "
            f"diverged",
            file=sys.stderr,
        )
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
