"""BERT-Large: 24 layers of width 1024, masked language modelling and next-sentence prediction.

    jaxpt train configs/bert_large.py --data DIR

Settings as published (Devlin et al. 2019, arXiv:1810.04805, appendix A.2): 1,000,000 steps of 256 rows, the
first 90 % of them of 128 tokens and the rest of 512, one pair of texts per row. Texts end where the row is full,
not at the end of a sentence. Without next-sentence prediction it is `MaskedLM(encoder=..., selection=...)`.
"""

from jaxpt.config import PhaseConfig, RunConfig
from jaxpt.corruption.selection import FixedCount
from jaxpt.models.presets import bert
from jaxpt.objectives import MaskedLM, SentencePair
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=SentencePair(
            encoder=bert("large", dtype="bfloat16"),
            kind="next",
            packing="one_document",
            masked=MaskedLM(rate=0.15, selection=FixedCount(rounding="nearest", minimum=1, count_special=True)),
        ),
        steps=1_000_000,
        batch_size=256,
        seq_len=128,
        phases=(PhaseConfig(from_step=900_000, seq_len=512),),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, schedule="linear", warmup_steps=10_000, epsilon=1e-6, weight_decay=0.01, clip_norm=1.0
        ),
        log_every=100,
        eval_every=5000,
        eval_rows=2048,
        checkpoint_every=1000,
    )
