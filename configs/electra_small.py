"""ELECTRA-Small's discriminator: 12 layers of width 256, embeddings of width 128, trained as a masked LM.

    jaxpt train configs/electra_small.py --data DIR

This is the encoder of ELECTRA-Small (Clark et al. 2020, arXiv:2003.10555, table 6) with its optimizer, batch
and length, but NOT its objective: replaced-token detection has an issue of its own, and until it is here the
encoder learns by masked language modelling.
"""

from jaxpt.config import RunConfig
from jaxpt.corruption.selection import FixedCount
from jaxpt.models.presets import electra
from jaxpt.objectives import MaskedLM
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=MaskedLM(
            encoder=electra("small", dtype="bfloat16"),
            rate=0.15,
            selection=FixedCount(rounding="nearest", minimum=1, count_special=True),
        ),
        steps=1_000_000,
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
