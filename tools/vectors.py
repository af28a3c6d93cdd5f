"""Which vectors of texts are good, and what for? Small networks, three seeds, beside averaged static vectors.

    jaxpt data build data/wiki --input articles.jsonl --field sents --vocab-size 8192
    jaxpt data build data/sentences --input lines.txt --document line --tokenizer data/wiki/tokenizer/*.model
    jaxpt data build data/multi30k --aligned train.en train.de --text-tokens 62 --long-texts cut
    python tools/vectors.py --data wiki=data/wiki --data sentences=data/sentences --data multi30k=data/multi30k \\
        --ask stsb=sts:stsb-dev.csv --ask sts12=sts:a.tsv,b.tsv --ask multi30k=retrieval:val.en,val.de --out vectors

The table ARMS says what is trained on which data, and from where it starts. An arm whose data is called as a retrieval
answers that one, all others answer the similarities; arms whose data is not given are left out. Data of arms that start
from each other share a tokenizer.

The static vectors are made of the same tokens of the same data: positive pointwise mutual information of tokens within
a window (of pairs: within a pair, across languages), factorised (Levy & Goldberg 2014). A text is their mean, or their
mean weighed by a / (a + frequency) less the first principal direction of all texts (SIF, Arora et al. 2017).

Each run is a process of its own; what is done is kept in OUT, and a second call goes on from there. OUT/vectors.md has
the table and OUT/vectors.png the plot.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from study import run_all

from jaxpt.config import RunConfig
from jaxpt.models.config import TransformerConfig
from jaxpt.objectives import CPC, TSDAE, ContrastiveLM, DeCLUTR, MaskedLM, SimCSE, TwoTower
from jaxpt.optimizer import OptimizerConfig
from jaxpt.types import ObjectiveConfig

NETWORK = TransformerConfig(
    depth=2, width=128, heads=4, positions="rotary", final_norm=True, logits_bias=True, init_scale=0.02
)
NOISY = replace(NETWORK, dropout=0.1)
CONTEXT = TransformerConfig(depth=1, width=128, heads=4, positions="rotary")
MASKED = MaskedLM(encoder=NETWORK)
TOWERS = TwoTower(first=NETWORK, projection=None)


ASKED = 64  # tokens, with [CLS] and [SEP], at which every arm's texts are cut when it is asked


class Arm(NamedTuple):
    """What is trained, on what, from where; 0 steps = as it is born."""

    objective: ObjectiveConfig
    data: str
    steps: int
    batch: int = 64
    length: int = 32
    rate: float = 1e-3
    start: str | None = None


class Static(NamedTuple):
    """Static vectors of tokens; ``window`` tokens to each side are near, None = all of the document."""

    data: str
    window: int | None = 5
    sif: bool = False


ARMS: dict[str, Arm | Static] = {
    "untrained": Arm(MASKED, "wiki", 0, length=64),
    "static, mean": Static("wiki"),
    "static, SIF": Static("wiki", sif=True),
    "masked_lm": Arm(MASKED, "wiki", 500, length=64),
    "simcse": Arm(SimCSE(encoder=NOISY, pooling="mean"), "sentences", 200, rate=3e-4, start="masked_lm"),
    "contrastive_lm": Arm(
        ContrastiveLM(encoder=NETWORK, negatives=None), "sentences", 200, rate=3e-4, start="masked_lm"
    ),
    "declutr": Arm(DeCLUTR(encoder=NETWORK, shortest=16), "wiki", 200, 16, 64, 3e-4, "masked_lm"),
    "cpc": Arm(CPC(encoder=NETWORK, context=CONTEXT), "wiki", 200, 16, 256, 3e-4, "masked_lm"),
    "tsdae": Arm(TSDAE(encoder=NETWORK, pooling="mean"), "sentences", 200, rate=3e-4, start="masked_lm"),
    "simcse, supervised": Arm(
        SimCSE(encoder=NOISY, pooling="mean", texts=2), "alike", 100, rate=3e-4, start="masked_lm"
    ),
    **{
        f"{name} ({data})": arm
        for data, length, steps in (("multi30k", 32, 600), ("pydocs", 64, 250))
        for name, arm in {
            "untrained": Arm(TOWERS, data, 0),
            "static, mean": Static(data, None),
            "static, SIF": Static(data, None, sif=True),
            "two_tower": Arm(TOWERS, data, steps, length=length),
            "two_tower, sigmoid": Arm(
                replace(TOWERS, loss="sigmoid", initial_scale=10.0, initial_bias=-4.1), data, steps, length=length
            ),
        }.items()
    },
}
SHOWN = {
    "sts": ("spearman", "alignment", "uniformity", "effective_rank"),
    "retrieval": ("forward/recall@1", "backward/recall@1", "forward/recall@10", "forward/mrr"),
}
PLAIN = ("uniformity", "alignment", "effective_rank")  # not in per cent

# ------------------------------------------------------------------------------------------------- one run


def run_config(arm: Arm, data: str, seed: int, out: Path, start: Path | None, scale: float) -> RunConfig:
    """One run; ``scale`` multiplies its steps."""
    steps = max(1, round(arm.steps * scale))
    return RunConfig(
        objective=arm.objective,
        data=(data,),
        steps=steps,
        batch_size=arm.batch,
        seq_len=arm.length,
        seed=seed,
        optimizer=OptimizerConfig(learning_rate=arm.rate, schedule="cosine", warmup_steps=max(1, steps // 10)),
        out=str(out),
        init_from=None if start is None else str(start),
        log_every=max(1, steps // 20),
        eval_every=0,
        eval_rows=256,
        checkpoint_every=steps,
        keep=1,
    )


def train_and_ask(name: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train an arm, or make its static vectors, and measure what it is asked."""
    from jaxpt.process import calm_cpu, keep_compiled_programs

    keep_compiled_programs()
    calm_cpu()
    arm, begin = ARMS[name], time.monotonic()
    asks = {ask: asked for ask, asked in args.ask.items() if answers(arm, ask, args.ask)}
    if isinstance(arm, Static):
        found = ask_static(arm, args.data[arm.data], seed, asks)
    else:
        found = ask_network(name, arm, args, seed, asks)
    minutes = (time.monotonic() - begin) / 60
    return {"arm": name, "seed": seed, "of": fingerprint(name, args), "minutes": minutes, "found": found}


def fingerprint(name: str, args: argparse.Namespace) -> str:
    """What a result is of: the arm, its data and what it was asked; of another one, it is made again."""
    from jaxpt.data.manifest import Manifest

    arm = ARMS[name]
    asked = {ask: files for ask, (_, files) in args.ask.items() if answers(arm, ask, args.ask)}
    return f"{arm!r}, {Manifest.load(args.data[arm.data]).digest}, {ASKED}, {asked}, {args.scale}"


def drop_stale(args: argparse.Namespace, arms: Sequence[str]) -> None:
    """Remove the results of arms, data or questions that have changed since, and say so."""
    for name in arms:
        for file in Path(args.out, "results").glob(f"{name}-[0-9]*.json"):
            if json.loads(file.read_text()).get("of") != fingerprint(name, args):
                print(f"{file}: of another arm, other data or other questions; made again", file=sys.stderr)
                file.unlink()


def answers(arm: Arm | Static, ask: str, asks: dict[str, tuple[str, Sequence[str]]]) -> bool:
    """Whether an arm is asked something: the retrieval of its own data, or else every similarity."""
    of_pairs = arm.data in asks and asks[arm.data][0] == "retrieval"
    return ask == arm.data if of_pairs else asks[ask][0] == "sts"


def ask_network(name: str, arm: Arm, args: argparse.Namespace, seed: int, asks: dict) -> dict[str, dict[str, float]]:
    """Train an arm from where it starts, and measure."""
    import jax

    from jaxpt.checkpoint import Checkpoints
    from jaxpt.data.manifest import Manifest
    from jaxpt.data.tokenizer import built_tokenizer
    from jaxpt.sharding import make_mesh
    from jaxpt.tasks import measure_task, open_task, vectors_of
    from jaxpt.train import make_parts, train
    from jaxpt.types import Snapshot

    runs = Path(args.out, "runs")
    data, start = args.data[arm.data], runs / f"{arm.start}-{seed}" if arm.start else None
    config = run_config(arm, data, seed, runs / f"{name}-{seed}", start, args.scale)
    manifest, mesh = Manifest.load(data), make_mesh(config.mesh)
    vocab = manifest.load_vocab()
    folder = Path(str(config.out), "checkpoints")
    if arm.steps:
        with Checkpoints(folder) as store:
            done = store.latest == config.steps
        assert done or train(config) == 0
    with jax.set_mesh(mesh):
        parts = make_parts(config, vocab, mesh)
        if arm.steps:
            with Checkpoints(folder) as store:
                params = store.restore_params(parts.abstract.params).state
        else:
            params = parts.born().params
        vectors = vectors_of(config.objective.for_evaluation(), vocab, ASKED, mesh)
        snapshot = Snapshot(params, {}, jax.numpy.int32(config.steps))
        found = {}
        for ask, (kind, files) in asks.items():
            task = open_task(kind, files, built_tokenizer(manifest), vectors.longest)
            made = measure_task(task, vectors, snapshot, mesh)
            found[ask] = {metric.removeprefix(f"{task.name}/"): value for metric, value in made.items()}
        return found


# ---------------------------------------------------------------------------------------- static vectors


def ask_static(arm: Static, data: str, seed: int, asks: dict) -> dict[str, dict[str, float]]:
    """Make static vectors of a data build, and measure the means of a text's."""
    from jaxpt.data.manifest import Manifest
    from jaxpt.data.tokenizer import built_tokenizer
    from jaxpt.tasks import open_task, task_metrics

    manifest = Manifest.load(data)
    counts_V = manifest.load_vocab().unigram_counts
    table_VE = static_vectors(near_tokens(manifest, arm.window), NETWORK.width, seed)
    found = {}
    for ask, (kind, files) in asks.items():
        task = open_task(kind, files, built_tokenizer(manifest), ASKED - 2)
        sides = [
            mean_vectors(table_VE, texts, counts_V if arm.sif else None) if texts else None for texts in task.texts
        ]
        assert sides[0] is not None
        found[ask] = task_metrics(task, sides[0], sides[1])
    return found


def near_tokens(manifest: Any, window: int | None) -> Any:
    """How often tokens are near each other in the training split: sparse, symmetric, [V, V] f64.

    Args:
      manifest: of the data.
      window: how far; nearer tokens weigh more, as 1 / distance. None = within a document, all the same.
    """
    from scipy import sparse

    from jaxpt.data.shards import Documents

    documents, size = Documents(manifest, "train", keep_above=1 << 30), manifest.vocab["size"]
    total = sparse.csr_matrix((size, size))
    for begin in range(0, len(documents), 4096):
        read = [tokens for tokens, *_ in documents.read(range(begin, min(begin + 4096, len(documents))))]
        tokens = np.concatenate(read).astype(np.int64)
        of = np.repeat(np.arange(len(read)), [len(each) for each in read])
        if window is None:
            held = sparse.csr_matrix((np.ones(len(tokens)), (of, tokens)), (len(read), size))
            held.sum_duplicates()
            total = total + held.T @ held - sparse.diags(np.bincount(tokens, minlength=size).astype(float))
            continue
        for distance in range(1, window + 1):
            one, two = tokens[:-distance], tokens[distance:]
            same = of[:-distance] == of[distance:]
            weight = np.full(int(same.sum()), 1 / distance)
            near = sparse.csr_matrix((weight, (one[same], two[same])), (size, size))
            total = total + near + near.T
    return total


def static_vectors(near_VV: Any, width: int, seed: int, smoothing: float = 0.75) -> np.ndarray:
    """Factorise positive pointwise mutual information: [V, E] f32, 0 for tokens that do not occur.

    PMI(i, j) = ln p(i, j) / (p(i) p_s(j)), with p_s raised to ``smoothing`` (Levy, Goldberg & Dagan 2015).
    """
    from scipy import sparse
    from scipy.sparse.linalg import svds

    near = sparse.coo_matrix(near_VV)
    near.eliminate_zeros()
    rows_V = np.asarray(near_VV.sum(1)).ravel()
    columns_V = rows_V**smoothing
    pmi = np.log(near.data * columns_V.sum() / (rows_V[near.row] * columns_V[near.col]))
    kept = pmi > 0
    matrix = sparse.csr_matrix((pmi[kept], (near.row[kept], near.col[kept])), near_VV.shape)
    first_V = np.random.default_rng(seed).normal(size=len(rows_V))  # where the iteration begins
    left, values, _ = svds(matrix, k=min(width, len(rows_V) - 1), v0=first_V)
    return (left * np.sqrt(values)).astype(np.float32)


def mean_vectors(table_VE: np.ndarray, texts: Sequence[np.ndarray], counts_V: np.ndarray | None) -> np.ndarray:
    """Return the mean of each text's static vectors [N, E] f32; with counts, that of SIF."""
    if counts_V is None:
        return np.stack([table_VE[tokens].mean(0) for tokens in texts])
    weights_V = 1e-3 / (1e-3 + counts_V / counts_V.sum())
    made = np.stack([(weights_V[tokens, None] * table_VE[tokens]).mean(0) for tokens in texts])
    first_E = np.linalg.svd(made, full_matrices=False)[2][0]
    return (made - np.outer(made @ first_E, first_E)).astype(np.float32)


# ------------------------------------------------------------------------------------------------- all runs


def waves(arms: Sequence[str]) -> list[list[str]]:
    """Arms in the order in which they can run: first those from which others start."""
    first = [name for name in arms if getattr(ARMS[name], "start", None) is None]
    return [first, [name for name in arms if name not in first]]


def table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and write the tables and the plot of what is done; return it."""
    runs = [json.loads(file.read_text()) for file in sorted(Path(args.out, "results").glob("*.json"))]
    lines: list[str] = []
    for ask, (kind, _) in args.ask.items():
        mine = [run for run in runs if ask in run["found"]]
        lines += [
            f"**{ask}**",
            "",
            "| vectors | " + " | ".join(SHOWN[kind]) + " |",
            "|---" * (1 + len(SHOWN[kind])) + "|",
        ]
        for arm in [arm for arm in ARMS if any(run["arm"] == arm for run in mine)]:
            cells = []
            for metric in SHOWN[kind]:
                factor, form = (1, ".2f") if metric in PLAIN else (100, ".1f")
                found = [factor * run["found"][ask][metric] for run in mine if run["arm"] == arm]
                cells.append(f"{statistics.mean(found):{form}} ({min(found):{form}} to {max(found):{form}})")
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
        lines.append("")
    text = "\n".join(lines)
    print(text)
    Path(args.out, "vectors.md").write_text(text)
    plot(runs, args.ask, Path(args.out, "vectors.png"))
    return runs


def plot(runs: Sequence[dict[str, Any]], asks: dict[str, Any], file: Path) -> None:
    """A panel per question, every run a dot and the mean of the seeds a bar; and alignment over uniformity."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = [ask for ask in asks if any(ask in run["found"] for run in runs)]
    similar = [ask for ask in panels if asks[ask][0] == "sts"][:1]
    figure, axes = plt.subplots(1, len(panels) + len(similar), figsize=(2 + 5.2 * len(panels), 4.2), squeeze=False)
    for axis, ask in zip(axes[0], panels, strict=False):
        metric = SHOWN[asks[ask][0]][0]
        arms = [arm for arm in ARMS if any(run["arm"] == arm and ask in run["found"] for run in runs)]
        for height, arm in enumerate(reversed(arms)):
            found = [100 * run["found"][ask][metric] for run in runs if run["arm"] == arm and ask in run["found"]]
            axis.plot(found, [height] * len(found), "o", color="#3366aa", alpha=0.6, markersize=6)
            axis.plot([statistics.mean(found)], [height], "|", color="#111111", markersize=18, markeredgewidth=2)
        axis.set_yticks(range(len(arms)), list(reversed(arms)))
        axis.set_title(ask)
        axis.set_xlabel(f"{metric.replace('forward/', '')} x 100")
        axis.grid(axis="x", alpha=0.3)
    for axis, ask in zip(axes[0][len(panels) :], similar, strict=True):
        for arm in dict.fromkeys(run["arm"] for run in runs if ask in run["found"]):
            spots = [run["found"][ask] for run in runs if run["arm"] == arm and ask in run["found"]]
            x, y = ([spot[name] for spot in spots] for name in ("uniformity", "alignment"))
            axis.plot(x, y, "o", label=arm, markersize=6, alpha=0.8)
        axis.set_xlabel("uniformity (lower: spread wider)")
        axis.set_ylabel("alignment (lower: pairs nearer)")
        axis.set_title(ask)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="vectors.py", description=__doc__, formatter_class=form)
    parser.add_argument("--out", default="vectors", help="folder of runs, results, table and plot (vectors)")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=DIR", help="a data build of ARMS")
    parser.add_argument("--ask", action="append", default=[], metavar="NAME=KIND:FILE[,FILE]", help="what is measured")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its own cores (1)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all steps, to try it out (1)")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS], metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.data = dict(entry.partition("=")[::2] for entry in args.data)
    args.ask = {name: (rest.partition(":")[0], rest.partition(":")[2].split(",")) for name, _, rest in
                (entry.partition("=") for entry in args.ask)}  # fmt: skip
    for name, (kind, files) in args.ask.items():
        if kind not in SHOWN or not all(Path(file).is_file() for file in files):
            parser.error(f"--ask {name}: write {name}=sts:FILE or {name}=retrieval:FILE,FILE, of files that are there")
    if args.one:
        cores = [int(core) for core in os.environ.get("JAXPT_STUDY_CORES", "").split(",") if core]
        if cores:
            os.sched_setaffinity(0, cores)
        found = train_and_ask(args.one, args, args.seed)
        Path(args.out, "results", f"{args.one}-{args.seed}.json").write_text(json.dumps(found) + "\n")
        return 0
    able = [name for name, arm in ARMS.items() if arm.data in args.data]
    arms = [name for name in args.arms or able if name in able]
    if not arms or not args.ask:
        parser.error("there is nothing to do: give --data and --ask (of ARMS in this file)")
    drop_stale(args, arms)
    for wave in waves(arms):
        run_all(args, [(name, seed) for seed in range(args.seeds) for name in wave], __file__)
    return 0 if len(table(args)) >= len(arms) * args.seeds else 1


if __name__ == "__main__":
    sys.exit(main())
