"""Every recipe of configs/ at mini size on real text: does it begin where theory says, does it learn, at what cost?

    python tools/recipes.py                                         # all that need no data of their own
    python tools/recipes.py electra_small t5_base --json recipes.json
    python tools/recipes.py protein_bert --data protein_bert=data/protein
    python tools/recipes.py --json recipes.json --table             # the table of what is known, nothing is run

Networks shrink to 2 layers of width 128 (the parts of a pair in proportion), rows to 8 x 128 tokens and the optimizer
to a constant rate after 20 steps; all else is as published. A recipe is a process of its own: 200 steps of `train`,
then turns of its step and of a causal language model's of the same width, alternated, and its corruption alone. What
is done is kept in the JSON file, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from bench import print_table, spread

from jaxpt.config import RunConfig, load_config
from jaxpt.config import parts as dataclasses_of
from jaxpt.models.config import TransformerConfig
from jaxpt.objectives import ContrastiveLM, DeCLUTR, SimCSE, TwoTower
from jaxpt.types import ObjectiveConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
WIDTH, DEPTH, ROWS, LENGTH = 128, 2, 8, 128
BINARY = ("discriminator", "next", "order")  # terms of two classes; others predict tokens, or are named below
TURNS, STEPS = 5, 3

# ------------------------------------------------------------------------------------------------- mini


def mini(value: Any, scale: float, depth: float) -> Any:
    """The same configuration with every network's width and depth multiplied."""

    def of(width: int) -> int:
        return max(16, 16 * round(width * scale / 16))

    if isinstance(value, TransformerConfig):
        heads = max(1, of(value.width) // 32)
        return replace(
            value,
            depth=max(1, round(value.depth * depth)),
            width=of(value.width),
            heads=heads,
            kv_heads=max(1, heads // 2) if value.groups < value.heads else None,
            head_width=None,
            mlp_width=of(value.mlp_width or 4 * value.width),
            embed_width=of(value.embedding) if value.embedding != value.width else None,
            window=None if value.window is None else min(value.window, LENGTH // 8),
            max_length=max(value.max_length, LENGTH),
            dtype="float32",
        )
    if is_dataclass(value) and not isinstance(value, type):
        inner = {each.name: mini(getattr(value, each.name), scale, depth) for each in fields(value) if each.init}
        return replace(value, **inner)
    if isinstance(value, tuple):
        return tuple(mini(entry, scale, depth) for entry in value)
    return value


def networks_of(config: RunConfig) -> list[TransformerConfig]:
    return [part for _, part in dataclasses_of("objective", config.objective) if isinstance(part, TransformerConfig)]


def mini_run(config: RunConfig, data: str | None, steps: int, out: str) -> RunConfig:
    """The run of a recipe at mini size."""
    networks = [
        part for _, part in dataclasses_of("objective", config.objective) if isinstance(part, TransformerConfig)
    ]
    scale = WIDTH / max(network.width for network in networks)
    depth = DEPTH / max(network.depth for network in networks)
    shares = sum(getattr(part, "share", 0) for _, part in dataclasses_of("objective", config.objective)) or 1
    rate = 1e-3 if config.optimizer.name not in ("adafactor", "lamb") else 1e-2
    optimizer = replace(
        config.optimizer, learning_rate=rate, schedule="constant", warmup_steps=20, decay_steps=0, schedule_steps=None
    )
    return replace(
        config,
        objective=mini(config.objective, scale, depth),
        data=(data or config.data[0],),
        vocab_size=4096,
        optimizer=optimizer,
        phases=(),
        seq_len=LENGTH,
        batch_size=max(1, ROWS // shares) * shares,  # what divides the rows of a batch gets its share
        microbatches=1,
        steps=steps,
        log_every=1,
        eval_every=0,
        eval_rows=64,
        checkpoint_every=steps,
        out=out,
    )


# ------------------------------------------------------------------------------------------------- one recipe


def measure(name: str, data: str | None, steps: int) -> dict[str, Any]:
    """Train a recipe for some steps and time its step beside a causal language model's."""
    import jax

    from jaxpt.data.pipeline import Pipeline
    from jaxpt.models.presets import gpt2
    from jaxpt.objectives import CausalLM
    from jaxpt.process import calm_cpu, keep_compiled_programs
    from jaxpt.train import open_phases, train
    from jaxpt.types import RowSpec

    keep_compiled_programs()
    calm_cpu()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = mini_run(load_config(CONFIGS / f"{name}.py"), data, steps, f"{folder}/run")
        code = train(config)
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    assert code == 0, f"{name}: exit code {code}"
    lines = [line for line in lines if "loss" in line]  # of training
    widest = max(networks_of(config), key=lambda network: network.width)
    baseline = CausalLM(
        decoder=gpt2("small", depth=DEPTH, width=widest.width, heads=widest.heads, mlp_width=4 * widest.width)
    )
    own, alone = stepper(config)
    other, _ = stepper(replace(config, objective=baseline, data=(config.data[0],)))
    rounds = [[seconds(each) for each in (own, other, alone)] for _ in range(TURNS)]
    terms = {key.partition("/")[2]: value for key, value in lines[0].items() if key.startswith("loss/")}
    return {
        "objective": type(config.objective).__name__,
        "data": config.data[0],
        "vocab": Pipeline(open_phases(config), RowSpec(), config.seed).vocab.size,
        "device": jax.devices()[0].device_kind,
        "first_terms": terms,
        "losses": [line["loss"] for line in lines],
        "skipped": lines[-1]["skipped_steps"],
        "warnings": sorted({f"{each.category.__name__}: {each.message}" for each in caught}),
        "speed": [theirs / ours for ours, theirs, _ in rounds],
        "corruption": [corrupt / ours for ours, _, corrupt in rounds],
    }


def stepper(config: RunConfig) -> tuple[Callable[[], None], Callable[[], None]]:
    """A run's step on its first batch, and its corruption alone, compiled and warm."""
    import jax

    from jaxpt.data.pipeline import Pipeline
    from jaxpt.sharding import make_mesh
    from jaxpt.step import make_example
    from jaxpt.train import compiled_train_step, make_parts, open_phases
    from jaxpt.types import RowSpec, Snapshot

    mesh = make_mesh(config.mesh)
    phases = open_phases(config)
    with jax.set_mesh(mesh):
        parts = make_parts(config, Pipeline(phases, RowSpec(), config.seed).vocab, mesh)
        batch = jax.device_put(Pipeline(phases, parts.objective.rows, config.seed).batch(0))
        state = parts.born()
        step = compiled_train_step(config, parts, mesh)
        corrupt = jax.jit(
            lambda state: make_example(
                parts.objective, Snapshot(state.params, state.carry, state.step), batch, jax.random.key(0)
            )
        )
        jax.block_until_ready(corrupt(state))
        state, measured = step(state, batch)
        jax.block_until_ready(measured)

    def turn() -> None:
        nonlocal state
        with jax.set_mesh(mesh):
            state, measured = step(state, batch)
            jax.block_until_ready(measured)

    def alone() -> None:
        with jax.set_mesh(mesh):
            jax.block_until_ready(corrupt(state))

    return turn, alone


def seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    for _ in range(STEPS):
        work()
    return (time.perf_counter() - begin) / STEPS


# ------------------------------------------------------------------------------------------------- the table


def row(name: str, found: dict[str, Any]) -> list[str]:
    """One line of the table."""
    losses = np.array(found["losses"])
    first, last = losses[:20], losses[-20:]
    error = math.sqrt(first.var(ddof=1) / len(first) + last.var(ddof=1) / len(last))
    begin = ", ".join(f"{term} {value:.3f}" for term, value in found["first_terms"].items())
    objective = load_config(CONFIGS / f"{name}.py").objective
    guesses = [theory(term, found["vocab"], objective) for term in found["first_terms"]]
    return [
        f"[{name}](../configs/{name}.py)",
        begin,
        ", ".join(dict.fromkeys(guesses)),
        f"{losses[0]:.3f}",
        f"{last.mean():.3f}",
        f"{(first.mean() - last.mean()) / error:.0f}",
        spread(found["speed"], ".2f"),
        spread(found["corruption"], ".1%"),
    ]


def theory(term: str, vocab: int, objective: ObjectiveConfig) -> str:
    """What an untrained network gives; of vectors, what they give where all are the same."""
    name = term.rpartition("/")[2]
    if name in BINARY:
        return f"ln 2 = {math.log(2):.3f}"
    if name == "contrastive":
        return equal_vectors(objective)
    if name == "predictive":
        return "ln of the segments of a batch"
    if name == "z_loss":
        return f"(ln V)^2 = {math.log(vocab) ** 2:.2f}"
    if name == "consistency":
        return "0"
    return f"ln V = {math.log(vocab):.3f}"


def equal_vectors(objective: ObjectiveConfig) -> str:
    """A contrastive loss of ``ROWS`` rows whose vectors are all the same."""
    if isinstance(objective, TwoTower) and objective.loss == "sigmoid":
        logit = objective.initial_scale + objective.initial_bias
        yes, no = (float(np.logaddexp(0, x)) for x in (-logit, logit))
        return f"equal: {yes + (ROWS - 1) * no:.3f}"
    candidates = ROWS
    if isinstance(objective, SimCSE):
        candidates = 2 * ROWS - 1 if objective.form == "nt_xent" else ROWS * max(1, objective.texts - 1)
    if isinstance(objective, ContrastiveLM) and objective.negatives:
        candidates = 1 + min(objective.negatives, ROWS - 1)
    if isinstance(objective, DeCLUTR):
        candidates = 2 * objective.anchors * ROWS - 1
    return f"equal: ln {candidates} = {math.log(candidates):.3f}"


HEAD = ["recipe", "loss terms, step 0", "untrained, by theory", "loss, step 0", "last 20 steps", "fall, in SE"]
HEAD += ["tokens/s over `causal_lm`'s", "corruption alone / step"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="recipes.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = sorted(path.stem for path in CONFIGS.glob("*.py"))
    parser.add_argument("configs", nargs="*", metavar="NAME", help="names of configs/; all by default")
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=FOLDER", help="data for single recipes")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each (200)")
    parser.add_argument("--json", default="recipes.json", metavar="FILE", help="what is kept (recipes.json)")
    parser.add_argument("--again", action="store_true", help="run also what the file has")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    data = dict(entry.partition("=")[::2] for entry in args.data)
    if args.one:
        print(json.dumps(measure(args.one, data.get(args.one), args.steps)))
        return 0
    strange = [name for name in [*args.configs, *data] if name not in known]
    if strange:
        parser.error(f"{', '.join(strange)}: no such recipe; configs/ has {', '.join(known)}")

    file = Path(args.json)
    found = json.loads(file.read_text()) if file.exists() else {}
    wanted = [name for name in args.configs or known if args.again or name not in found or "failed" in found[name]]
    for number, name in enumerate([] if args.table else wanted, 1):
        print(f"{time.strftime('%H:%M:%S')} {name} ({number} of {len(wanted)})", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--one", name, "--steps", str(args.steps)]
        command += ["--data", f"{name}={data[name]}"] if name in data else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found[name] = json.loads(done.stdout.splitlines()[-1])
        else:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            found[name] = {"failed": lines[-1]}
            print(f"{name}: {lines[-1]}", file=sys.stderr)
        file.write_text(json.dumps(found, indent=1) + "\n")
    shown = [name for name in found if not args.configs or name in args.configs]
    sound = [name for name in shown if "failed" not in found[name]]
    print_table([HEAD, *[row(name, found[name]) for name in sound]])
    for name in sorted(set(shown) - set(sound)):
        print(f"{name}: failed: {found[name]['failed']}")
    for name in sound:
        for each in found[name]["warnings"]:
            print(f"{name}: {each}")
    return 1 if len(sound) < len(shown) else 0


if __name__ == "__main__":
    sys.exit(main())
