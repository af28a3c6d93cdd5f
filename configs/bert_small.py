"""BERT-Small: 12 layers of width 256, masked language modelling, the baseline of the ELECTRA paper.

    jaxpt train configs/bert_small.py --data DIR

Settings as published (Clark et al. 2020, arXiv:2003.10555, table 6: 1.45 million steps of 128 rows of 128
tokens). There is no next-sentence prediction here, and attention stays inside a document.
"""

from jaxpt.config import RunConfig
from jaxpt.corruption.selection import FixedCount
from jaxpt.models.presets import bert
from jaxpt.objectives import MaskedLM
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=MaskedLM(
            encoder=bert("small", dtype="bfloat16"),
            rate=0.15,
            selection=FixedCount(rounding="nearest", minimum=1, count_special=True),
        ),
        steps=1_450_000,
        batch_size=128,
        seq_len=128,
        optimizer=OptimizerConfig(
            learning_rate=5e-4, schedule="linear", warmup_steps=10_000, epsilon=1e-6, weight_decay=0.01, clip_norm=1.0
        ),
        log_every=100,
        eval_every=5000,
        eval_rows=2048,
        checkpoint_every=1000,
    )
