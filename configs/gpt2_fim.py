"""GPT-2 small that also fills in the middle: half of the documents rearranged, PSM and SPM mixed.

    jaxpt train configs/gpt2_fim.py --data DIR

The recipe of Bavarian et al. 2022 (arXiv:2207.14255): context level, rate 0.5, half of it SPM, loss on all tokens,
100 billion tokens in rows of 2,048 and batches of 2 million. The size and the learning rate are those of GPT-3 Small
(Brown et al. 2020, arXiv:2005.14165, table 2.1); the paper cuts text between characters, this run between tokens.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import gpt2
from jaxpt.objectives import FillInTheMiddle
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=FillInTheMiddle(decoder=gpt2("small", max_length=2048, dtype="bfloat16"), pieces=6),
        steps=47_700,
        batch_size=1024,
        seq_len=2048,
        optimizer=OptimizerConfig(
            learning_rate=6e-4,
            schedule="cosine",
            warmup_steps=180,
            final_fraction=0.1,
            beta2=0.95,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        log_every=100,
        eval_every=1000,
        eval_rows=2048,
        checkpoint_every=500,
    )
