"""BERT-Mini: 4 layers of width 256, masked language modelling.

    jaxpt train configs/bert_mini.py --data DIR

The size is of Turc et al. 2019 (arXiv:1908.08962), who do not publish all settings; these are the ones that
Clark et al. 2020 (arXiv:2003.10555, table 6) give for their BERT-Small, shortened. There is no next-sentence
prediction here, and attention stays inside a document.
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
            encoder=bert("mini", dtype="bfloat16"),
            rate=0.15,
            selection=FixedCount(rounding="nearest", minimum=1, count_special=True),
        ),
        steps=250_000,
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
