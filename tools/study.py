"""Which objective learns most from the same text at the same compute? Small networks, three seeds, one probe for all.

    python tools/study.py --out study                               # on the built-in prose
    jaxpt data build data/wiki --input articles.jsonl --field sents --vocab-size 4096
    python tools/study.py --data data/wiki --task topic=topics.tsv --task subjective=sentences.jsonl --out study

Every objective trains the same Transformer on rows of the same text, for as many steps as fit into the same matrix
FLOPs (what a generator or a scoring pass computes counts). Then the trunk is frozen, every layer's states are averaged
over the tokens of a text, and a ridge classifier is fitted on them, its penalty chosen on a fifth of its training
texts. One task comes from the data: which of the longest held-out documents is this passage from? Others are files of
a text and a label: JSON lines with "text" and "label", or tab-separated columns; also .gz and .xz.

Each run is a process of its own on cores of its own; what is done is kept in OUT, and a second call goes on from there.
OUT/study.md has the table and OUT/study.png the plot. Nothing is tuned: all runs share learning rate and schedule.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxpt.config import RunConfig
from jaxpt.corruption.selection import Informative, InverseFrequency, Spans
from jaxpt.models.config import TransformerConfig
from jaxpt.objectives import (
    CausalLM,
    MaskedDiffusion,
    MaskedLM,
    Mixture,
    ReplacedTokenDetection,
    SpanCorruption,
)
from jaxpt.objectives.combine import Portion
from jaxpt.optimizer import OptimizerConfig
from jaxpt.types import Objective, ObjectiveConfig, Params

NETWORK = TransformerConfig(
    depth=2, width=128, heads=4, positions="rotary", final_norm=True, logits_bias=True, init_scale=0.02
)
GENERATOR = replace(NETWORK, width=64, heads=2)  # of replaced-token detection: half as wide, on its own
PASSAGE, ARTICLES, TEXTS = 64, 40, 4000  # tokens of a passage; documents to tell apart; texts of a task at most
PENALTIES = 10.0 ** np.arange(-1, 6)

ARMS: dict[str, ObjectiveConfig] = {
    "masked_lm, uniform": MaskedLM(encoder=NETWORK),
    "masked_lm, spans": MaskedLM(encoder=NETWORK, selection=Spans(unit="word"), decide_per="span"),
    "masked_lm, inverse frequency": MaskedLM(encoder=NETWORK, selection=InverseFrequency()),
    "masked_lm, surprisal": MaskedLM(encoder=NETWORK, selection=Informative()),
    "replaced_token_detection": ReplacedTokenDetection(encoder=NETWORK, generator=GENERATOR, embeddings="none"),
    "causal_lm": CausalLM(decoder=NETWORK),
    "hybrid, 7 masked : 1 causal": Mixture(
        (
            Portion("mlm", MaskedLM(encoder=NETWORK, predict_from="previous"), share=7),
            Portion("clm", CausalLM(decoder=NETWORK, packing="best_fit")),
        ),
        rows="mlm",
    ),
    "span_corruption": SpanCorruption(network=NETWORK),
    "masked_diffusion": MaskedDiffusion(encoder=NETWORK, noise="fixed_count"),
}
UNTRAINED = "untrained"


def run_config(arm: str, data: str, seed: int, steps: int, out: str) -> RunConfig:
    """One run of the study."""
    return RunConfig(
        objective=ARMS[arm],
        data=(data,),
        vocab_size=4096,
        steps=steps,
        batch_size=16,
        seq_len=128,
        seed=seed,
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=max(1, steps // 10)),
        out=out,
        log_every=max(1, steps // 20),
        eval_every=0,
        eval_rows=64,
        checkpoint_every=steps,
        keep=1,
    )


# ------------------------------------------------------------------------------------------------- one run


def train_and_probe(arm: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train one arm for its share of the budget and probe it; "untrained" is probed as it is born."""
    import jax

    from jaxpt.checkpoint import Checkpoints
    from jaxpt.data.pipeline import Pipeline
    from jaxpt.process import calm_cpu, keep_compiled_programs
    from jaxpt.sharding import make_mesh
    from jaxpt.train import make_parts, open_phases, step_flops, train
    from jaxpt.types import RowSpec

    keep_compiled_programs()
    calm_cpu()
    folder = Path(args.out, "runs", f"{arm}-{seed}")

    def cost(config: RunConfig) -> tuple[Any, float]:
        """A run's parts, and the FLOPs of one of its steps."""
        mesh, phases = make_mesh(config.mesh), open_phases(config)
        with jax.set_mesh(mesh):
            parts = make_parts(config, Pipeline(phases, RowSpec(), config.seed).vocab, mesh)
            row = Pipeline(phases, parts.objective.rows, config.seed).batch(0, slice(1))
            return parts, step_flops(parts, row, phases[0])

    first = next(iter(ARMS))
    draft = run_config(first if arm == UNTRAINED else arm, args.data, seed, 1, str(folder))
    parts, flops = cost(draft)
    steps = 0 if arm == UNTRAINED else round(args.steps * cost(run_config(first, args.data, seed, 1, "-"))[1] / flops)
    found: dict[str, Any] = {"arm": arm, "seed": seed, "steps": steps, "flops": steps * flops}
    if steps:
        assert train(run_config(arm, args.data, seed, steps, str(folder))) == 0
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found["losses"] = [[line["step"], line["loss"]] for line in lines if "loss" in line]
        with Checkpoints(folder / "checkpoints") as store:
            params = store.restore_params(parts.abstract.params).state
    else:
        params = parts.born().params
    source = open_phases(draft)[0].sources[0].path
    return found | {"accuracy": probe(parts.objective, params["trunk"], source, args.task, causal=arm == "causal_lm")}


def probe(objective: Objective, trunk: Params, data: str, tasks: Sequence[str], *, causal: bool) -> dict[str, float]:
    """Accuracy of a linear classifier of each task on the frozen states of a network.

    Args:
      objective: whose rows say what stands before and after a text.
      trunk: the network's parameters.
      data: a data build: its tokenizer, and the passages of the first task.
      tasks: "NAME=FILE".
      causal: states see what stands before them only, as they were trained.
    """
    from jaxpt.data.manifest import Manifest
    from jaxpt.data.tokenizer import load_tokenizer

    manifest = Manifest.load(data)
    record = manifest.tokenizer
    tokenizer = load_tokenizer(Path(data, record["file"]).read_bytes(), record["kind"], record)
    given = {"article": passages(manifest)}
    for entry in tasks:
        name, _, file = entry.partition("=")
        pairs = read_task(Path(file))
        given[name] = [(tokenizer.encode(text)[0][:PASSAGE], label) for text, label in pairs]
    found = {}
    for name, texts in given.items():
        states_ND = features(objective, trunk, [tokens for tokens, _ in texts], manifest.load_vocab(), causal=causal)
        classes = sorted({label for _, label in texts})
        found[name] = classify(states_ND, np.array([classes.index(label) for _, label in texts]))
    return found


def passages(manifest: Any) -> list[tuple[np.ndarray, str]]:
    """Passages of the longest held-out documents, with the document as the label."""
    from jaxpt.data.shards import Documents

    documents = Documents(manifest, "validation", keep_above=1 << 30)
    longest = np.argsort(-documents.lengths(0, len(documents)), kind="stable")[:ARTICLES].tolist()
    return [
        (tokens[begin : begin + PASSAGE], str(index))
        for index in longest
        for tokens in [documents.read([index])[0][0]]
        for begin in range(0, min(len(tokens), 40 * PASSAGE) - PASSAGE + 1, PASSAGE)
    ]


def read_task(file: Path) -> list[tuple[str, str]]:
    """Texts and labels of a file, the first ones."""
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(file.suffix, open)
    with opener(file, "rt", encoding="utf-8") as lines:
        rows = [line.rstrip("\n") for line in lines]
    if ".jsonl" in file.suffixes:
        pairs = [(record["text"], str(record["label"])) for record in map(json.loads, rows)]
    else:
        pairs = [(text, label) for text, _, label in (row.rpartition("\t") for row in rows)]
    picked = np.random.default_rng(0).permutation(len(pairs))[:TEXTS]
    return [pairs[index] for index in picked]


def features(
    objective: Objective, trunk: Params, texts: Sequence[np.ndarray], vocab: Any, *, causal: bool
) -> np.ndarray:
    """The states of every layer, averaged over the tokens of each text: [texts, layers * width]."""
    import jax
    import jax.numpy as jnp

    from jaxpt.models import patterns
    from jaxpt.models.transformer import transformer

    network, rows = transformer(NETWORK, vocab.size), objective.rows
    before, after = list(rows.prefix), list(rows.suffix)
    width = PASSAGE + len(before) + len(after)

    @jax.jit
    def average(params: Params, tokens_RL: Any, segments_RL: Any, inside_RL: Any) -> Any:
        places_RL = jnp.broadcast_to(jnp.arange(width), tokens_RL.shape)
        pattern = (patterns.causal if causal else patterns.bidirectional)(segments_RL, places_RL)
        _, layers_NRLD = network.apply(params, tokens_RL, pattern, places_RL, return_layers=True)
        sums_NRD = jnp.einsum("nrld,rl->nrd", layers_NRLD, inside_RL)
        return (sums_NRD / inside_RL.sum(1)[:, None]).transpose(1, 0, 2).reshape(len(tokens_RL), -1)

    found = []
    for begin in range(0, len(texts), 64):
        chunk = list(texts[begin : begin + 64])
        tokens, segments, inside = (np.zeros((64, width), kind) for kind in (np.int32, np.int32, np.float32))
        tokens[:], inside[:, 0] = vocab.pad, 1
        for row, text in enumerate(chunk):
            line = [*before, *text, *after]
            tokens[row, : len(line)], segments[row, : len(line)] = line, 1
            inside[row] = (np.arange(width) >= len(before)) & (np.arange(width) < len(before) + len(text))
        found.append(np.asarray(average(trunk, tokens, segments, np.maximum(inside, 1e-9)))[: len(chunk)])
    return np.concatenate(found)


def classify(states_ND: np.ndarray, labels_N: np.ndarray) -> float:
    """Test accuracy of ridge regression on one-hot labels: every third text is for the test."""
    test = np.arange(len(labels_N)) % 3 == 2
    tuning = ~test & (np.arange(len(labels_N)) % 5 == 0)
    states_ND = (states_ND - states_ND[~test].mean(0)) / (states_ND[~test].std(0) + 1e-6)
    states_ND = np.concatenate([states_ND, np.ones((len(states_ND), 1))], 1).astype(np.float64)
    wanted_NC = np.eye(labels_N.max() + 1)[labels_N]

    def fit(train: np.ndarray, judged: np.ndarray, penalty: float) -> float:
        gram = states_ND[train].T @ states_ND[train] + penalty * np.eye(states_ND.shape[1])
        weights = np.linalg.solve(gram, states_ND[train].T @ wanted_NC[train])
        return float(((states_ND[judged] @ weights).argmax(1) == labels_N[judged]).mean())

    best = max(PENALTIES, key=lambda penalty: fit(~test & ~tuning, tuning, penalty))
    return fit(~test, test, best)


# ------------------------------------------------------------------------------------------------- all runs


def run_all(args: argparse.Namespace, wanted: Sequence[tuple[str, int]], script: str = __file__) -> None:
    """Run what is not done yet by a script, some at a time, each on its own cores."""
    results, logs = Path(args.out, "results"), Path(args.out, "logs")
    for folder in (results, logs):
        folder.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    waiting = [(arm, seed) for arm, seed in wanted if not (results / f"{arm}-{seed}.json").exists()]
    print(f"{len(wanted) - len(waiting)} runs are done, {len(waiting)} to do", file=sys.stderr)
    running: list[tuple[str, int, int, subprocess.Popen]] = []
    begin, done, total = time.monotonic(), 0, len(waiting)
    while waiting or running:
        while waiting and len(running) < args.jobs:
            arm, seed = waiting.pop(0)
            lane = next(lane for lane in range(args.jobs) if all(lane != taken for _, _, taken, _ in running))
            command = [sys.executable, script, *sys.argv[1:], "--one", arm, "--seed", str(seed)]
            pin = [] if not cores or args.jobs == 1 else cores[lane :: args.jobs]
            with (logs / f"{arm}-{seed}.log").open("w") as log:
                environment = os.environ | {"JAXPT_STUDY_CORES": ",".join(map(str, pin))}
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            running.append((arm, seed, lane, process))
        time.sleep(0.5)
        for entry in [entry for entry in running if entry[3].poll() is not None]:
            arm, seed, _, process = entry
            running.remove(entry)
            done += 1
            left = (time.monotonic() - begin) / done * (total - done)
            state = "done" if process.returncode == 0 else f"FAILED, see {logs / f'{arm}-{seed}.log'}"
            print(f"{time.strftime('%H:%M:%S')} {arm}, seed {seed}: {state}; {left / 60:.0f} min left", file=sys.stderr)


def table(out: Path) -> list[dict[str, Any]]:
    """Print and write the table and the plot of what is done; return it."""
    runs = [json.loads(file.read_text()) for file in sorted((out / "results").glob("*.json"))]
    tasks = list(dict.fromkeys(task for run in runs for task in run["accuracy"]))
    arms = [arm for arm in [UNTRAINED, *ARMS] if any(run["arm"] == arm for run in runs)]
    lines = ["| objective | steps | " + " | ".join(tasks) + " | mean |", "|---|---|" + "---|" * (1 + len(tasks))]
    for arm in arms:
        mine = [run for run in runs if run["arm"] == arm]
        columns = [[100 * run["accuracy"][task] for run in mine] for task in tasks]
        columns.append([statistics.mean(each) for each in zip(*columns, strict=True)])
        cells = [f"{statistics.mean(each):.1f} ({min(each):.1f} to {max(each):.1f})" for each in columns]
        lines.append(f"| {arm} | {mine[0]['steps']:,} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    (out / "study.md").write_text(text)
    plot(runs, arms, tasks, out / "study.png")
    return runs


def plot(runs: Sequence[dict[str, Any]], arms: Sequence[str], tasks: Sequence[str], file: Path) -> None:
    """One panel per task: every run a dot, the mean of the seeds a bar."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(tasks), figsize=(3 + 3.2 * len(tasks), 4.2), sharey=True, squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for height, arm in enumerate(reversed(arms)):
            found = [100 * run["accuracy"][task] for run in runs if run["arm"] == arm]
            axis.plot(found, [height] * len(found), "o", color="#3366aa", alpha=0.6, markersize=6)
            axis.plot([statistics.mean(found)], [height], "|", color="#111111", markersize=18, markeredgewidth=2)
        axis.set_title(task)
        axis.set_xlabel("accuracy of a linear probe, %")
        axis.set_yticks(range(len(arms)), list(reversed(arms)))
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="study.py", description=__doc__, formatter_class=form)
    parser.add_argument("--out", default="study", help="folder of runs, results, table and plot (study)")
    parser.add_argument("--data", default="prose", help="a data build, or a built-in corpus (prose)")
    parser.add_argument("--task", action="append", default=[], metavar="NAME=FILE", help="texts with labels, to probe")
    parser.add_argument("--steps", type=int, default=1000, help="steps of uniform masked_lm that the budget allows")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each objective (3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its own cores (1)")
    parser.add_argument("--arms", nargs="+", choices=[UNTRAINED, *ARMS], metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        cores = [int(core) for core in os.environ.get("JAXPT_STUDY_CORES", "").split(",") if core]
        if cores:
            os.sched_setaffinity(0, cores)
        found = train_and_probe(args.one, args, args.seed)
        Path(args.out, "results", f"{args.one}-{args.seed}.json").write_text(json.dumps(found) + "\n")
        return 0
    for task in args.task:
        if not Path(task.partition("=")[2]).is_file():
            parser.error(f"--task {task}: there is no such file")
    wanted = [(arm, seed) for seed in range(args.seeds) for arm in args.arms or [UNTRAINED, *ARMS]]
    run_all(args, wanted)
    return 0 if len(table(Path(args.out))) >= len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
