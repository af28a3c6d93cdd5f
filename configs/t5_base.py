"""T5-Base's decoder stack: 12 layers of width 768, relative positions, next-token prediction.

    jaxpt train configs/t5_base.py --data DIR

This is the decoder-only language model of the T5 paper's comparison of architectures (Raffel et al. 2020,
arXiv:1910.10683, section 3.2), with its optimizer: Adafactor, 1 / sqrt(max(step, 10,000)), 524,288 steps of 128
rows of 512 tokens. It is NOT span corruption: until the sequence-to-sequence objectives are here, no encoder
takes part. The warm-up rises from 0; the paper's starts at its peak.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import t5
from jaxpt.objectives import CausalLM
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=CausalLM(decoder=t5("base", dtype="bfloat16").decoder),
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
