"""RoBERTa-Base: 12 layers of width 768, masked language modelling with big batches of full rows.

    jaxpt train configs/roberta_base.py --data DIR

Settings as published (Liu et al. 2019, arXiv:1907.11692, table 9): 500,000 steps of 8,192 rows of 512 tokens,
no clipping. Rows are cut from the running text; unlike in the paper, attention stays inside a document.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import roberta
from jaxpt.objectives import MaskedLM
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=MaskedLM(encoder=roberta("base", dtype="bfloat16"), packing="concatenate", rate=0.15),
        steps=500_000,
        batch_size=8192,
        seq_len=512,
        optimizer=OptimizerConfig(
            learning_rate=6e-4,
            schedule="linear",
            warmup_steps=24_000,
            beta2=0.98,
            epsilon=1e-6,
            weight_decay=0.01,
            clip_norm=None,
        ),
        log_every=100,
        eval_every=5000,
        eval_rows=2048,
        checkpoint_every=1000,
    )
