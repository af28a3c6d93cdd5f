"""T5-Large: span corruption, encoder and decoder of 24 layers of width 1024.

    jaxpt train configs/t5_large.py --data DIR --mesh.fsdp 8

The settings of the paper's large models (Raffel et al. 2020, arXiv:1910.10683, section 3.7), of span corruption alone
(theirs mix in supervised tasks): 1,000,000 steps of 2,048 rows of 512 tokens, Adafactor, 1 / sqrt(max(step, 10,000)),
z-loss 1e-4. Spans have mean length 3, as in the released models. The warm-up rises from 0; the paper's starts at its
peak.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import t5
from jaxpt.objectives import SpanCorruption
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=SpanCorruption(network=t5("large", dtype="bfloat16"), documents=1, z_loss=1e-4),
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
