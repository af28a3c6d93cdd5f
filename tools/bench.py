"""How fast a training step is, beside a hand-written one and beside PyTorch; what corruption and data cost.

    python tools/bench.py step                                      # jaxpt and a plain JAX + optax step: BERT-mini, 128
    python tools/bench.py step --models bert-mini bert-small bert-base gpt2-small --lengths 128 512 --json out.json
    python tools/bench.py step --sides jaxpt-bf16 plain-bf16 torch-compile-bf16 torch-eager-f32 --torch-python PATH
    python tools/bench.py step --sides plain-bf16 --plain-without rows bias loss    # what each trick is worth
    python tools/bench.py step --sides jaxpt-bf16 --models bert-6x256 bert-24x256 --layers scan   # compile times
    python tools/bench.py corruption                                # the share of the step that corruption takes
    python tools/bench.py data PATH --minutes 10                    # the pipeline's speed and memory over a long run

Every contender is a process of its own. All contenders of a model stay in memory and take turns, a few seconds of
whole steps each, so that other load on the machine meets them all: read the ratios, which are medians over the rounds.
All train on 4,096 tokens per step, full rows of random tokens, 15 % of them masked, with AdamW, without dropout and
clipping (--dropout, --clip-norm). Useful FLOPs are the same for all: three times the forward pass, the vocabulary
projection on predicted positions only. No compilation cache is used. jaxpt's turns hold all that its training loop
does per step: the batch is put on the devices, corrupted there, and the measurements are read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_jax import CONFIGS, TRICKS, network, random_vocab
from bench_torch import peak_memory

from jaxpt.config import load_config
from jaxpt.data.pipeline import Phase, Pipeline, Source
from jaxpt.process import huge_pages
from jaxpt.train import data_folder

HERE = Path(__file__).resolve().parent
DTYPES = {"f32": "float32", "bf16": "bfloat16"}
VOCAB = {"bert": 30_522, "gpt2": 50_257}

# ------------------------------------------------------------------------------------------ processes


class Worker:
    """A contender in a process of its own."""

    def __init__(self, name: str, spec: dict[str, Any], args: argparse.Namespace):
        self.name, self.turns = name, []
        env = dict(os.environ)
        program = [sys.executable, str(HERE / "bench_jax.py"), json.dumps(spec)]
        if spec["kind"] == "torch":
            program = [args.torch_python or sys.executable, str(HERE / "bench_torch.py"), json.dumps(spec)]
        else:
            env["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # compile times are to be seen
            if args.device:
                env["JAX_PLATFORMS"] = "cuda" if args.device == "gpu" else args.device
            env = (huge_pages(env) if args.huge_pages else None) or env  # as the command line of jaxpt does
        env["PYTHONPATH"] = f"{HERE.parent}{os.pathsep}{env.get('PYTHONPATH', '')}"
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(program, env=env, text=True, **pipes)
        self.ready: dict[str, Any] = self._reply()

    def turn(self, amount: str) -> dict[str, Any]:
        """Run for "seconds X" or "steps N"."""
        assert self.process.stdin
        self.process.stdin.write(amount + "\n")
        self.process.stdin.flush()
        self.turns.append(self._reply())
        return self.turns[-1]

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").strip().splitlines()
        reason = [each for each in said if "Error" in each] or said or [f"exit code {self.process.wait()}"]
        raise ChildProcessError(f"{self.name} ended: {reason[-1]}")

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self.log.close()


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S ") + text, file=sys.stderr, flush=True)


def run_rounds(specs: dict[str, dict[str, Any]], args: argparse.Namespace, title: str) -> dict[str, Any]:
    """Start the contenders one after the other, let them take turns, and return what each one did by its name."""
    with contextlib.ExitStack() as closing:
        workers, failed = [], {}
        for number, (name, spec) in enumerate(specs.items(), 1):
            say(f"{title}: starting {name} ({number} of {len(specs)})")
            try:
                workers.append(Worker(name, spec, args))
                closing.callback(workers[-1].close)
            except ChildProcessError as error:
                failed[name] = {"failed": str(error)}
                say(str(error))
        begin = time.monotonic()
        for done in range(args.rounds):
            order = workers[done % len(workers) :] + workers[: done % len(workers)] if workers else []
            for worker in order:  # nobody is always the first
                worker.turn(f"steps {args.steps}" if args.steps else f"seconds {args.seconds}")
            left = (time.monotonic() - begin) / (done + 1) * (args.rounds - done - 1)
            say(f"{title}: round {done + 1} of {args.rounds} done, {left:.0f} s left")
        return {worker.name: {"ready": worker.ready, "turns": worker.turns} for worker in workers} | failed


def speeds(result: dict[str, Any]) -> list[float]:
    """Tokens per second of each turn."""
    return [turn["tokens"] / turn["seconds"] for turn in result["turns"]]


def ratio(result: dict[str, Any], baseline: dict[str, Any]) -> list[float]:
    """Speed over the baseline's, round by round."""
    return [a / b for a, b in zip(speeds(result), speeds(baseline), strict=True)]


def spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


# ------------------------------------------------------------------------------------------ commands


def make_spec(side: str, model: str, length: int, args: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """Everything a worker must know, as JSON."""
    kind, *form, short = side.split("-")
    if kind not in ("jaxpt", "plain", "torch") or short not in DTYPES or (kind == "torch") != bool(form):
        raise ValueError(
            f"--sides: {side!r} is none of jaxpt-f32, plain-bf16, torch-eager-f32, torch-compile-bf16, ..."
        )
    family = model.partition("-")[0]
    spec = {"kind": kind, "compiled": form == ["compile"], "dtype": DTYPES[short], "model": model, "family": family}
    spec |= {"length": length, "tokens": args.tokens, "vocab": VOCAB.get(family, 4096), "device": args.device}
    spec |= {"dropout": args.dropout, "clip": args.clip_norm, "layers": args.layers, "without": [], "corruption": None}
    if family != "quickstart":
        net = network(spec)
        spec |= {"depth": net.depth, "width": net.width, "heads": net.heads}
    return spec | changes


def measure_facts(spec: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    worker = Worker("facts", spec | {"kind": "facts"}, args)
    worker.close()
    return worker.ready


def command_step(args: argparse.Namespace) -> list[dict[str, Any]]:
    lines = [
        [
            "model",
            "side",
            "tokens/s",
            f"ratio to {args.baseline}",
            "CPU s/step",
            "compile s",
            "peak GB",
            "GFLOP/s",
            "of peak",
        ]
    ]
    found = []
    for model in args.models:
        for length in args.lengths:
            specs = {side: make_spec(side, model, length, args) for side in args.sides}
            for trick in args.plain_without:
                specs |= {
                    f"{side} without {trick}": spec | {"without": [trick]}
                    for side, spec in list(specs.items())
                    if spec["kind"] == "plain" and not spec["without"]
                }
            title = f"{model} at {length}"
            known = measure_facts(make_spec("jaxpt-f32", model, length, args), args)
            results = run_rounds(specs, args, title)
            peak = max([known["peak"]] + [r["ready"].get("matmul", 0) for r in results.values() if "ready" in r])
            for name, result in results.items():
                found.append({"model": model, "length": length, "side": name, **known, **result})
                if "failed" in result:
                    lines.append([title, name, result["failed"], *[""] * 6])
                    continue
                rate = statistics.median(speeds(result)) / args.tokens * known["flops"]
                base = results.get(args.baseline, {})
                against = spread(ratio(result, base), ".2f") if "turns" in base else ""
                last, took = result["turns"][-1], f"{result['ready']['compile']:.1f}"
                memory = f"{(last['device'] or last['memory']) / 1e9:.2f}"
                cpu = statistics.median(turn["cpu"] / turn["steps"] for turn in result["turns"])
                row = [title, name, spread(speeds(result), ",.0f"), against, f"{cpu:.3f}", took, memory]
                lines.append([*row, f"{rate / 1e9:,.0f}", f"{rate / peak:.0%}"])
            say(
                f"{title}: {known['parameters']:,} parameters, {known['flops'] / 1e9:,.0f} GFLOP a step; "
                f"matmul peak {known['peak'] / 1e9:,.0f} GFLOP/s by JAX, best of all sides {peak / 1e9:,.0f}"
            )
    print_table(lines)
    return found


def command_corruption(args: argparse.Namespace) -> list[dict[str, Any]]:
    lines = [["model", "step, ms", "faster without corruption", "corruption alone, ms", "share of the step"]]
    found = []
    for model in args.models:
        for length in args.lengths:
            specs = {
                where or "inside": make_spec(args.side, model, length, args, corruption=where)
                for where in (None, "before", "alone")
            }
            results = run_rounds(specs, args, f"corruption, {model} at {length}")
            found += [{"model": model, "length": length, "side": name, **r} for name, r in results.items()]
            if any("failed" in result for result in results.values()):
                raise ValueError(f"corruption, {model} at {length}: a side failed")
            inside, before, alone = (
                [1000 * turn["seconds"] / turn["steps"] for turn in results[name]["turns"]]
                for name in ("inside", "before", "alone")
            )
            saved = [1 - b / a for a, b in zip(inside, before, strict=True)]
            share = [b / a for a, b in zip(inside, alone, strict=True)]
            row = [f"{model} at {length}", spread(inside, ".1f"), spread(saved, ".1%")]
            lines.append([*row, spread(alone, ".2f"), spread(share, ".2%")])
    print_table(lines)
    return found


def command_data(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Alternate the pipeline and the quickstart's step; sample the memory of this process, which only reads."""
    config = load_config(str(CONFIGS / "quickstart.py"))
    folder = data_folder(args.path, config.vocab_size)
    objective = config.objective.build(random_vocab(config.vocab_size))
    phase = Phase(0, (Source(folder, 1.0),), config.seq_len or 128, config.batch_size)
    pipeline = Pipeline([phase], objective.rows, config.seed)
    spec = make_spec("jaxpt-f32", "quickstart", phase.length, args)
    spec |= {"tokens": phase.length * phase.batch_size, "vocab": config.vocab_size}
    worker = Worker("quickstart", spec, args)
    found, begin, step, total = [], time.monotonic(), 0, 0
    batches = pipeline.batches(0)
    print_table([["minute", "pipeline, tokens/s", "quickstart, tokens/s", "ratio", "tokens so far", "resident, MB"]])
    while time.monotonic() - begin < 60 * args.minutes:
        start, tokens = time.monotonic(), 0
        while time.monotonic() - start < args.seconds:
            tokens += int(np.count_nonzero(next(batches).segment_ids))
            step += 1
        rate, total = tokens / (time.monotonic() - start), total + tokens
        used = worker.turn(f"seconds {min(args.seconds, 5.0)}")
        line = {"minute": (time.monotonic() - begin) / 60, "pipeline": rate, "model": used["tokens"] / used["seconds"]}
        line |= {"tokens": total, "resident": resident_memory()}
        found.append(line)
        cells = [f"{line['minute']:.1f}", f"{rate:,.0f}", f"{line['model']:,.0f}", f"{rate / line['model']:.0f}"]
        print_table([[*cells, f"{total:,}", f"{line['resident'] / 1e6:.1f}"]], rule=False)
    worker.close()
    return found


def resident_memory() -> int:
    """Bytes of this process that are resident now; the most there ever were, where the system does not say."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else peak_memory()


def print_table(lines: list[list[str]], *, rule: bool = True) -> None:
    for number, line in enumerate(lines):
        print("| " + " | ".join(line) + " |", flush=True)
        if rule and not number:
            print("|" + "---|" * len(line), flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    teaching, form = (__doc__ or ""), argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="bench.py", description=teaching, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--device", choices=("cpu", "gpu", "tpu"), help="the platform; by default what JAX (and torch) finds")
    add("--rounds", type=int, default=5, help="turns of each contender (5)")
    add("--seconds", type=float, default=5.0, help="of one turn, in whole steps (5)")
    add("--steps", type=int, help="of one turn, in place of --seconds")
    add("--tokens", type=int, default=4096, help="per step (4096)")
    add("--dropout", type=float, default=0.0, help="of jaxpt and torch (0); the plain step has none")
    add("--clip-norm", type=float, help="clip the gradient's norm, on all sides; by default it is not clipped")
    add("--layers", choices=("auto", "scan", "unroll"), help="of jaxpt's network; by default as configured")
    add("--no-huge-pages", dest="huge_pages", action="store_false", help="JAX sides without transparent huge pages")
    add("--json", metavar="FILE", help="write every turn there")
    names = "bert-SIZE, gpt2-SIZE or FAMILY-DEPTHxWIDTH, e.g. bert-mini (4x256), bert-small (12x256), bert-24x256"
    step = commands.add_parser("step", parents=[shared], help="speed, memory and compile time of whole steps")
    step.add_argument("--models", nargs="+", default=["bert-mini"], help=names)
    step.add_argument("--lengths", nargs="+", type=int, default=[128], help="tokens per row (128)")
    sides = "jaxpt-DTYPE, plain-DTYPE, torch-eager-DTYPE, torch-compile-DTYPE; DTYPE is f32 or bf16"
    step.add_argument("--sides", nargs="+", default=["jaxpt-bf16", "plain-bf16", "jaxpt-f32", "plain-f32"], help=sides)
    step.add_argument("--baseline", help="the side that ratios refer to; by default the first")
    tricks = "; ".join(f"{name}: {what}" for name, what in TRICKS.items()).replace("%", "%%")
    step.add_argument(
        "--plain-without", nargs="+", default=[], choices=TRICKS, metavar="TRICK",
        help=f"also run the plain step without one of its tricks, for each of these. {tricks}",
    )  # fmt: skip
    step.add_argument(
        "--torch-python", metavar="PATH", help="an interpreter with torch and transformers; else this one"
    )
    corruption = commands.add_parser("corruption", parents=[shared], help="the step with corruption, without, alone")
    corruption.add_argument("--models", nargs="+", default=["bert-mini"], help=names)
    corruption.add_argument("--lengths", nargs="+", type=int, default=[128])
    corruption.add_argument("--side", default="jaxpt-bf16", choices=("jaxpt-f32", "jaxpt-bf16"))
    data = commands.add_parser("data", parents=[shared], help="the pipeline beside the quickstart's model")
    data.add_argument("path", nargs="?", default="prose", help="a data folder, or prose or code, which are built")
    data.add_argument("--minutes", type=float, default=2.0, help="of the whole run (2)")
    args = parser.parse_args(argv)
    if args.command == "step" and not args.baseline:
        args.baseline = args.sides[0]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        found = {"step": command_step, "corruption": command_corruption, "data": command_data}[args.command](args)
    except (ValueError, ChildProcessError) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 2
    if args.json:
        Path(args.json).write_text(json.dumps({"arguments": vars(args), "results": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
