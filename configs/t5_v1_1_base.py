"""T5 v1.1 Base: gated layers, an output of its own, no dropout; span corruption alone.

    jaxpt train configs/t5_v1_1_base.py --data DIR

The second version of T5 (release notes of google-research/text-to-text-transfer-transformer; Shazeer 2020,
arXiv:2002.05202): GEGLU, embeddings and output apart, no dropout in pre-training, no supervised tasks; otherwise the
settings of the paper (Raffel et al. 2020, arXiv:1910.10683): 1,000,000 steps of 2,048 rows of 512 tokens, Adafactor,
1 / sqrt(max(step, 10,000)), z-loss 1e-4, 15 % hidden in spans of mean length 3. The warm-up rises from 0.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import t5
from jaxpt.objectives import SpanCorruption
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=SpanCorruption(network=t5("base", "1.1", dtype="bfloat16"), documents=1, z_loss=1e-4),
        vocab_size=32_128,
        steps=1_000_000,
        batch_size=2048,
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
