"""Every file of configs/: at its published size it is traced, nothing is allocated; at a tiny size it learns."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from support import packed_batch, tiny, tiny_vocab

from jaxpt.config import RunConfig, load_config, resolve_phases, validate, with_layers
from jaxpt.objectives import (
    CPC,
    ContrastiveLM,
    DeCLUTR,
    MaskedDiffusion,
    Mixture,
    ReplacedTokenDetection,
    SimCSE,
    SpanCorruption,
    TwoTower,
)
from jaxpt.optimizer import OptimizerConfig
from jaxpt.sharding import MeshConfig, check_rows, make_mesh
from jaxpt.step import make_eval_step, make_train_step
from jaxpt.train import Parts, make_parts
from jaxpt.types import Batch, ObjectiveConfig, RowSpec, Vocab

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parent.parent / "configs").glob("*.py"))}

# Published vocabulary, and parameters of the network with its output: Hugging Face's ...ForMaskedLM, ...ForCausalLM and
# (for pairs) ...ForPreTraining of the same sizes count as many. The decoders of T5 and BART alone have no published
# count.
PUBLISHED = {
    "bert_tiny": (30522, 4_416_698),
    "bert_mini": (30522, 11_201_594),
    "bert_small": (30522, 17_519_674),
    "bert_base": (30522, 110_106_428),
    "bert_large": (30522, 336_226_108),
    "roberta_base": (50265, 124_697_433),
    "albert_base": (30000, 11_813_810),
    "electra_small": (30522, 13_549_057 + 4_620_026 - 3_972_864),  # ...ForPreTraining, the generator, one embedding
    "electra_base": (30522, 109_483_009 + 33_740_602 - 23_837_184),
    "gpt2_small": (50257, 124_439_808),
    "llama_1b": (128_256, 1_235_814_400),
    "llama_7b": (32_000, 6_738_415_616),
    "bart_base": (50_265, 139_420_416),
    "t5_base": (32_128, 222_903_552),  # ...ForConditionalGeneration
    "t5_large": (32_128, 737_668_096),
    "t5_v1_1_base": (32_128, 247_577_856),
    "modernbert_base": (50_368, 149_655_232),
    "xlnet_base": (32_000, 116_750_336 - 12 * 3 * 768 - 768),  # without segment encodings and the vector of queries
    "llada_8b": (126_464, 8_015_581_184),
    "tsdae_base": (30522, 109_514_298 + 12 * 2 * (768 * 769 + 768)),  # ...ForMaskedLM; W_v, W_o, a norm per layer
}

every_config = pytest.mark.parametrize("name", CONFIGS)


@functools.cache
def run_of(name: str) -> RunConfig:
    return load_config(CONFIGS[name])


def parts_of(config: RunConfig, vocab: Vocab) -> Parts:
    return make_parts(config, vocab, make_mesh(MeshConfig(data=1), jax.devices()[:1]))


def abstract_batch(rows: RowSpec, length: int, size: int) -> Batch:
    """The shapes of a batch of the pipeline."""
    small = packed_batch(rows, tiny_vocab(), 24)
    shape = {1: (size,), 2: (size, rows.tokens(length))}
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(shape[leaf.ndim], leaf.dtype), small)


@every_config
def test_published_size(name: str):
    """Every phase of the run can be traced as it stands: parameters, update and evaluation."""
    config = run_of(name)
    validate(replace(config, out="run"))
    # as accelerators run them: layers that are written out take half a minute to trace
    config = replace(config, objective=with_layers(config.objective, layers="scan"))
    vocab_size, count = PUBLISHED.get(name, (config.vocab_size, None))
    parts = parts_of(config, tiny_vocab(vocab_size, sentinels=130))
    shapes = jax.tree.leaves(parts.abstract.params)
    assert count in (None, sum(leaf.size for leaf in shapes))
    step = make_train_step(
        parts.objective, parts.optimizer, parts.specs, seed=0, microbatches=config.microbatches,
        spike_factor=config.spike_factor, averaging=config.optimizer.averaging,
    )  # fmt: skip
    for phase in resolve_phases(config):
        assert phase.seq_len and phase.batch_size  # resolved
        check_rows(phase.batch_size, config.microbatches, make_mesh(MeshConfig(data=8)))
        batch = abstract_batch(parts.objective.rows, phase.seq_len, phase.batch_size)
        state, measured = jax.eval_shape(step, parts.abstract, batch)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), parts.abstract
        )
        assert measured.loss.shape == ()
        batch = abstract_batch(parts.judge.rows, phase.seq_len, phase.batch_size)
        sums = jax.eval_shape(
            make_eval_step(parts.judge, seed=0), parts.abstract.params, parts.abstract.carry, parts.abstract.step, batch
        )
        assert {leaf.dtype for leaf in jax.tree.leaves(sums.losses)} == {np.dtype("float32")}


@functools.cache
def losses_at_tiny_size(objective: ObjectiveConfig, optimizer: OptimizerConfig) -> list[float]:
    """The losses of 24 updates on one batch; sizes of one family are the same at tiny size and share a run."""
    vocab = tiny_vocab(sentinels=16) if isinstance(objective, SpanCorruption) else tiny_vocab()
    config = RunConfig(objective, optimizer=optimizer, steps=24, batch_size=8, seq_len=24, out="run")
    parts = parts_of(config, vocab)
    step = jax.jit(make_train_step(parts.objective, parts.optimizer, parts.specs, seed=0))
    state, losses, measured = parts.born(), [], None
    # 15 rows of 16 are masked; seven denoisers divide a batch
    size = 16 if isinstance(objective, Mixture) else 14 if parts.objective.rows.kinds else 8
    batch = packed_batch(parts.objective.rows, vocab, size=size)
    for _ in range(config.steps):
        state, measured = step(state, batch)
        losses.append(float(measured.loss))
    assert measured is not None
    assert int(measured.guard.applied) == config.steps
    assert int(measured.guard.skipped) == 0
    return losses


# nearly the programs of others, or of objectives that the conformance suite trains
ALIKE = {
    "roberta_base",
    "albert_base",
    "electra_base",
    "modernbert_base",
    "prefix_lm_base",
    "protein_bert",
    "code_fim",
    "llada_8b",
    "pegasus_base",
    "xlnet_base",
    "glm_base",
    "mass_base",
    "translation_base",
    "t5_large",
    "t5_v1_1_base",
    "llama_7b",
    "bart_base",
    "ul2_base",
    "gpt_bert",
    "deberta_v3_base",
    "electra_small",
    "mdlm_base",
    "clip_text",
    "consert_base",
    "contrastive_lm",
    "cpc_base",
    "declutr_base",
    "siglip_text",
    "simcse_supervised",
    "tsdae_base",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in CONFIGS])
def test_learns_at_tiny_size(name: str):
    config = run_of(name)
    # the published learning rate and its warm-up are for other sizes; all else is as published
    rate = 1e-2 if config.optimizer.name == "adamw" else 1e-1
    rate = 3e-3 if isinstance(config.objective, TwoTower) else rate  # two networks that must find each other
    optimizer = replace(
        config.optimizer, learning_rate=rate, schedule="constant", warmup_steps=0, decay_steps=0, schedule_steps=None
    )
    losses = losses_at_tiny_size(tiny(config.objective), optimizer)
    guess = math.log(tiny_vocab().size)
    if isinstance(config.objective, ReplacedTokenDetection):
        guess += config.objective.scale * math.log(2)
    boundary = getattr(config.objective, "boundary", None)
    guess *= 1 + (boundary.scale if boundary else 0)  # SpanBERT predicts the same tokens a second time
    of_vectors = isinstance(config.objective, ContrastiveLM | SimCSE | TwoTower)
    if isinstance(config.objective, ContrastiveLM):
        guess = math.log(8)  # of a text and the seven others
    if isinstance(config.objective, SimCSE):
        # of the rows of a batch, which all look alike; beside it stands the noise of dropout
        others = (14 if config.objective.form == "nt_xent" else 7) + 8 * max(config.objective.texts - 2, 0)
        guess = config.objective.scale * math.log(1 + others)
    if isinstance(config.objective, TwoTower):  # whose networks have nothing to do with each other yet
        guess = -config.objective.initial_bias if config.objective.loss == "sigmoid" else math.log(8)
    if isinstance(config.objective, CPC):
        guess = math.log(20)  # of the sentences of a batch
    if isinstance(config.objective, DeCLUTR):
        guess += math.log(27)  # of the others of 7 documents' anchors and positives
    assert losses[0] == pytest.approx(guess, rel=0.7 if of_vectors else 0.5)
    # diffusion weighs tokens by up to 1 / t: of so few, one step's loss alone says little
    start = guess if isinstance(config.objective, MaskedDiffusion) else losses[0]
    assert np.mean(losses[-6:]) < start - 0.1, losses
