"""PEGASUS-Base: 12 + 12 layers of width 768, gap sentences.

    jaxpt data build DIR --input FILES --gap-scores
    jaxpt train configs/pegasus_base.py --data DIR

The base size of the paper's comparisons (Zhang et al. 2020, arXiv:1912.08777, section 6.1): 30 % of the sentences,
those that share most with the rest of their document, 512 tokens of text and targets of up to 256, 500,000 steps of
256 rows. (The paper's 512 are the inputs, without the sentences that are missing.) Adafactor and its schedule are T5's,
whose rate falls with the root of the step as the paper's does. The released large model mixes shares and chooses at
random:

    --objective.ratio 0.45 --objective.lowest-ratio 0.15 --objective.noise 0.04
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import pegasus
from jaxpt.objectives import GapSentences
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=GapSentences(network=pegasus("base", dtype="bfloat16")),
        steps=500_000,
        batch_size=256,
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
