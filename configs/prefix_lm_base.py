"""The prefix language model of the T5 paper's comparison of architectures: 12 layers of width 768, relative positions.

    jaxpt train configs/prefix_lm_base.py --data DIR

Raffel et al. 2020 (arXiv:1910.10683), section 3.2, "Prefix LM" with its own objective: one stack of T5-Base's size, the
prefix read from both sides, loss on the rest, the border uniform in every row; Adafactor, 1 / sqrt(max(step, 10,000)),
524,288 steps of 128 rows of 512 tokens. The relative biases are those of an encoder, which tell earlier from later.
The warm-up rises from 0; the paper's starts at its peak.
"""

from dataclasses import replace

from jaxpt.config import RunConfig
from jaxpt.models.presets import t5
from jaxpt.objectives import PrefixLM
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=PrefixLM(decoder=replace(t5("base", dtype="bfloat16").decoder, relative_causal=False)),
        steps=524_288,
        batch_size=128,
        seq_len=512,
        optimizer=OptimizerConfig(
            name="adafactor",
            learning_rate=1e-2,
            schedule="inverse_sqrt",
            warmup_steps=10_000,
            weight_decay=0.0,
            clip_norm=None,
        ),
        log_every=100,
        eval_every=5000,
        eval_rows=2048,
        checkpoint_every=1000,
    )
