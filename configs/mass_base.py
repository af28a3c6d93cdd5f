"""MASS-Base: 6 + 6 layers of width 768, a fragment of every 64 tokens.

    jaxpt train configs/mass_base.py --data DIR

The recipe of the released summarisation model (Song et al. 2019, arXiv:1905.02450, and its command line): half of each
block of 64 tokens, anywhere in it, rows of 512 cut from the stream of documents, 125,000 steps of 4,096 rows. The
paper's translation models have one fragment per sentence, a fifth of them at its start and a fifth at its end:
`--objective.block None --objective.at-start 0.2 --objective.at-end 0.2`.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import bart
from jaxpt.objectives import MASS
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=MASS(
            network=bart("base", mlp_dropout=0.0, dtype="bfloat16"),
            packing="concatenate",
            at_start=0.0,
            at_end=0.0,
            block=64,
        ),
        steps=125_000,
        batch_size=4096,
        seq_len=512,
        optimizer=OptimizerConfig(
            learning_rate=5e-4,
            schedule="linear",
            warmup_steps=10_000,
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
