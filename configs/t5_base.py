"""T5-Base: span corruption, encoder and decoder of 12 layers of width 768.

    jaxpt train configs/t5_base.py --data DIR

The baseline of the T5 paper (Raffel et al. 2020, arXiv:1910.10683, section 3.1) with its objective: 15 % of the tokens
hidden in spans of mean length 3, 568 tokens of text making inputs of 512 and targets of 114; a row is one text,
documents following one another without a token between them (`documents=1`). Adafactor, 1 / sqrt(max(step, 10,000)),
524,288 steps of 128 rows, z-loss 1e-4 as in the authors' code. The warm-up rises from 0; the paper's starts at its
peak.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import t5
from jaxpt.objectives import SpanCorruption
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=SpanCorruption(network=t5("base", dtype="bfloat16"), documents=1, z_loss=1e-4),
        vocab_size=32_128,
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
