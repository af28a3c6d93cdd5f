"""CPC for text: vectors of sentences, by telling the next three from 8,000 others.

    jaxpt train configs/cpc_base.py --data DIR

As published (van den Oord et al. 2018, arXiv:1807.03748, section 3.3): the next 3 sentences are predicted, by Adam at
2e-4, from 512 texts at a time (8 x 64). The networks are not the authors': a Transformer and the mean of its states
where they have one convolution of 2,400 features, two causal layers of width 256 where they have a GRU of 2,400. The
warm-up, the clipping and the number of steps are ours, as the paper names none; rows hold 16 sentences of at most 32
tokens.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import bert
from jaxpt.objectives import CPC
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=CPC(encoder=bert("base", dtype="bfloat16"), segments="sentences", window=32, ahead=3),
        steps=100_000,
        batch_size=512,
        microbatches=8,
        seq_len=512,
        optimizer=OptimizerConfig(
            learning_rate=2e-4, schedule="constant", warmup_steps=1000, weight_decay=0.0, clip_norm=1.0
        ),
        log_every=100,
        eval_every=5000,
        eval_rows=2048,
        checkpoint_every=1000,
    )
