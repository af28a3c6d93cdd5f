"""DeCLUTR-Base: vectors of texts from spans of long documents, beside masked language modelling.

    jaxpt train configs/declutr_base.py --data DIR --init-from RUN

Settings as published (Giorgi et al. 2021, arXiv:2006.03659, and the authors' code): it goes on from RoBERTa-Base
(`--init-from`), once over half a million documents of at least 2,048 tokens, 16 at a time; of each 2 anchors and 2
positives per anchor, of 32 to 510 tokens between [CLS] and [SEP]; temperature 0.05; up for a tenth of the steps, then
down to 1/32. Spans are counted in tokens, where the authors count words and cut what is then too long; their AdamW has
no bias correction.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import roberta
from jaxpt.objectives import DeCLUTR
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=DeCLUTR(encoder=roberta("base", dtype="bfloat16"), anchors=2, positives=2, shortest=32),
        steps=31_000,
        batch_size=16,
        seq_len=512,
        optimizer=OptimizerConfig(
            learning_rate=5e-5,
            schedule="linear",
            warmup_steps=3_100,
            final_fraction=1 / 32,
            epsilon=1e-6,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        log_every=100,
        eval_every=1000,
        eval_rows=512,
        checkpoint_every=1000,
    )
