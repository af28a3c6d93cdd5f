"""UL2 at base size: seven denoisers with mode tokens, encoder and decoder.

    jaxpt data build DIR --input TEXT --vocab-size 32128 --sentinels 130
    jaxpt train configs/ul2_base.py --data DIR

The mixture of Tay et al. 2022 (arXiv:2205.05131, table 1): R (mean length 3 and 8, 15 %), S (the last quarter), X (3
and 8 at 50 %, 64 at 15 and 50 %), in equal parts, each after its mode token [NLU], [S2S] or [NLG]. 500,000 steps of
rows of 512 tokens, Adafactor, 1 / sqrt(max(step, 10,000)), SwiGLU, no dropout, z-loss 1e-4. 112 rows where the paper
has 128, since seven denoisers divide a batch. The targets are as wide as the longest, 512. Half of 765 tokens in spans
of three are 127 spans, so that the tokenizer needs 130 sentinels. For one decoder: `network=` a TransformerConfig.
"""

from jaxpt.config import RunConfig
from jaxpt.corruption.span_plan import UL2
from jaxpt.models.presets import t5
from jaxpt.objectives import SpanCorruption
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=SpanCorruption(
            network=t5("base", "1.1", activation="silu", dtype="bfloat16"), denoisers=UL2, documents=1, z_loss=1e-4
        ),
        vocab_size=32_128,
        steps=500_000,
        batch_size=112,
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
