"""jaxpt: pre-training of text models in JAX, every published objective through one jitted, sharded train step.

The public names are here, imported when they are first used. A training loop of your own takes about 20 lines:

>>> import pathlib, tempfile, jax, jaxpt
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> _ = (folder / "text.txt").write_text("".join(f"Line {i} says {i * 7}.\\n" for i in range(400)))
>>> manifest = jaxpt.build(jaxpt.BuildConfig(
...     out=str(folder / "data"), input=(str(folder / "text.txt"),), document="line", model="byte", workers=1))

>>> encoder = jaxpt.TransformerConfig(depth=2, width=32, heads=2, positions="rotary")
>>> objective = jaxpt.MaskedLM(encoder=encoder, rate=0.3).build(manifest.load_vocab())
>>> phase = jaxpt.Phase(from_step=0, sources=(jaxpt.Source(str(folder / "data")),), length=64, batch_size=8)
>>> pipeline = jaxpt.Pipeline([phase], objective.rows, seed=0)

>>> mesh = jaxpt.make_mesh(jaxpt.MeshConfig(data=-1))
>>> shapes = jax.eval_shape(objective.init, jax.random.key(0))
>>> config = jaxpt.OptimizerConfig(learning_rate=3e-3, schedule="constant")
>>> optimizer = jaxpt.make_optimizer(config, objective.specs, shapes, steps=4)  # or any optax transformation
>>> with jax.set_mesh(mesh):
...     state = jaxpt.initial_state(objective, optimizer, objective.specs, seed=0)
...     train_step = jax.jit(jaxpt.make_train_step(objective, optimizer, objective.specs, seed=0), donate_argnums=0)
...     for step in range(4):
...         rows = jaxpt.local_rows(phase.batch_size, mesh)  # the rows that this process reads
...         batch = jaxpt.put_batch(pipeline.batch(step, rows), rows, phase.batch_size, mesh)
...         state, measured = train_step(state, batch)
>>> int(state.step), 4.0 < float(measured.loss) < 7.0
(4, True)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxpt.checkpoint import Checkpoints as Checkpoints
    from jaxpt.config import PhaseConfig as PhaseConfig
    from jaxpt.config import RunConfig as RunConfig
    from jaxpt.data.build import BuildConfig as BuildConfig
    from jaxpt.data.build import build as build
    from jaxpt.data.manifest import Manifest as Manifest
    from jaxpt.data.pipeline import Phase as Phase
    from jaxpt.data.pipeline import Pipeline as Pipeline
    from jaxpt.data.pipeline import Source as Source
    from jaxpt.data.pipeline import held_out as held_out
    from jaxpt.evaluate import evaluate as evaluate
    from jaxpt.models.config import TransformerConfig as TransformerConfig
    from jaxpt.objectives import CPC as CPC
    from jaxpt.objectives import MASS as MASS
    from jaxpt.objectives import OBJECTIVES as OBJECTIVES
    from jaxpt.objectives import TSDAE as TSDAE
    from jaxpt.objectives import BlankInfilling as BlankInfilling
    from jaxpt.objectives import CausalLM as CausalLM
    from jaxpt.objectives import CausalMasking as CausalMasking
    from jaxpt.objectives import Consistency as Consistency
    from jaxpt.objectives import ContrastiveLM as ContrastiveLM
    from jaxpt.objectives import DeCLUTR as DeCLUTR
    from jaxpt.objectives import Denoising as Denoising
    from jaxpt.objectives import FillInTheMiddle as FillInTheMiddle
    from jaxpt.objectives import GapSentences as GapSentences
    from jaxpt.objectives import MaskedDiffusion as MaskedDiffusion
    from jaxpt.objectives import MaskedLM as MaskedLM
    from jaxpt.objectives import Mixture as Mixture
    from jaxpt.objectives import Multitask as Multitask
    from jaxpt.objectives import PermutationLM as PermutationLM
    from jaxpt.objectives import PrefixLM as PrefixLM
    from jaxpt.objectives import ReplacedTokenDetection as ReplacedTokenDetection
    from jaxpt.objectives import SentencePair as SentencePair
    from jaxpt.objectives import Seq2Seq as Seq2Seq
    from jaxpt.objectives import SimCSE as SimCSE
    from jaxpt.objectives import SpanCorruption as SpanCorruption
    from jaxpt.objectives import TwoTower as TwoTower
    from jaxpt.optimizer import OptimizerConfig as OptimizerConfig
    from jaxpt.optimizer import ParameterGroup as ParameterGroup
    from jaxpt.optimizer import make_optimizer as make_optimizer
    from jaxpt.sharding import MeshConfig as MeshConfig
    from jaxpt.sharding import local_rows as local_rows
    from jaxpt.sharding import make_mesh as make_mesh
    from jaxpt.sharding import put_batch as put_batch
    from jaxpt.sharding import state_shardings as state_shardings
    from jaxpt.step import initial_state as initial_state
    from jaxpt.step import make_eval_step as make_eval_step
    from jaxpt.step import make_train_step as make_train_step
    from jaxpt.train import evaluate_run as evaluate_run
    from jaxpt.train import train as train
    from jaxpt.types import AttentionPattern as AttentionPattern
    from jaxpt.types import Batch as Batch
    from jaxpt.types import Example as Example
    from jaxpt.types import Network as Network
    from jaxpt.types import Objective as Objective
    from jaxpt.types import Out as Out
    from jaxpt.types import ParamSpec as ParamSpec
    from jaxpt.types import RowSpec as RowSpec
    from jaxpt.types import Snapshot as Snapshot
    from jaxpt.types import Sums as Sums
    from jaxpt.types import TrainState as TrainState
    from jaxpt.types import Vocab as Vocab

_HOMES = {
    "checkpoint": ("Checkpoints",),
    "config": ("PhaseConfig", "RunConfig"),
    "data.build": ("BuildConfig", "build"),
    "data.manifest": ("Manifest",),
    "data.pipeline": ("Phase", "Pipeline", "Source", "held_out"),
    "evaluate": ("evaluate",),
    "models.config": ("TransformerConfig",),
    "objectives": (
        "CPC",
        "MASS",
        "OBJECTIVES",
        "TSDAE",
        "BlankInfilling",
        "CausalLM",
        "CausalMasking",
        "ContrastiveLM",
        "DeCLUTR",
        "Denoising",
        "Consistency",
        "FillInTheMiddle",
        "GapSentences",
        "MaskedDiffusion",
        "MaskedLM",
        "Mixture",
        "Multitask",
        "PermutationLM",
        "PrefixLM",
        "ReplacedTokenDetection",
        "SentencePair",
        "Seq2Seq",
        "SimCSE",
        "SpanCorruption",
        "TwoTower",
    ),
    "optimizer": ("OptimizerConfig", "ParameterGroup", "make_optimizer"),
    "sharding": ("MeshConfig", "local_rows", "make_mesh", "put_batch", "state_shardings"),
    "step": ("initial_state", "make_eval_step", "make_train_step"),
    "train": ("evaluate_run", "train"),
    "types": (
        "AttentionPattern",
        "Batch",
        "Example",
        "Network",
        "Objective",
        "Out",
        "ParamSpec",
        "RowSpec",
        "Snapshot",
        "Sums",
        "TrainState",
        "Vocab",
    ),
}
_HOME = {name: f"jaxpt.{home}" for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
