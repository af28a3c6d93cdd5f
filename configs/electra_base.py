"""ELECTRA-Base: 12 layers of width 768, replaced-token detection beside a generator of a third of its width.

    jaxpt train configs/electra_base.py --data DIR

Settings as published (Clark et al. 2020, arXiv:2003.10555, table 6, and the authors' code): 766,000 steps of 256
rows of 512 tokens, all embeddings shared at width 768, the discriminator's loss weighed 50 times. Selection is
without replacement, where the authors' code draws a token twice in 7 % of its draws; attention stays inside a
document.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import electra, electra_generator
from jaxpt.objectives import ReplacedTokenDetection
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=ReplacedTokenDetection(
            encoder=electra("base", dtype="bfloat16"),
            generator=electra_generator("base", dtype="bfloat16"),
            embeddings="tied",
            rate=0.15,
        ),
        steps=766_000,
        batch_size=256,
        seq_len=512,
        optimizer=OptimizerConfig(
            learning_rate=2e-4, schedule="linear", warmup_steps=10_000, epsilon=1e-6, weight_decay=0.01, clip_norm=1.0
        ),
        log_every=100,
        eval_every=5000,
        eval_rows=2048,
        checkpoint_every=1000,
    )
