"""ALBERT-Base: one layer of width 768 used 12 times, embeddings of width 128, n-gram masking and sentence order.

    jaxpt train configs/albert_base.py --data DIR

Steps, batch and warm-up as published (Lan et al. 2020, arXiv:1909.11942: 125,000 steps of 4,096 rows of 512
tokens). Masked are n-grams of 1 to 3 words with p(n) ~ 1/n, which may touch. Two things differ: the paper uses LAMB
at 0.00176 and this is AdamW at RoBERTa's peak; and a text of one sentence says nothing about order, where the
authors' code follows it by a foreign one.
"""

from jaxpt.config import RunConfig
from jaxpt.corruption.selection import Spans
from jaxpt.models.presets import albert
from jaxpt.objectives import MaskedLM, SentencePair
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=SentencePair(
            encoder=albert("base", dtype="bfloat16"),
            kind="order",
            packing="one_document",
            masked=MaskedLM(rate=0.15, selection=Spans(lengths=(6, 3, 2), unit="word", touching=True)),
        ),
        steps=125_000,
        batch_size=4096,
        seq_len=512,
        optimizer=OptimizerConfig(
            learning_rate=6e-4, schedule="linear", warmup_steps=3_125, epsilon=1e-6, weight_decay=0.01, clip_norm=1.0
        ),
        log_every=100,
        eval_every=5000,
        eval_rows=2048,
        checkpoint_every=1000,
    )
