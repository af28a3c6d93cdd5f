"""Two towers over pairs of texts, with CLIP's loss and its text network.

    jaxpt data build DIR --input pairs.jsonl --fields source target --text-tokens 74 --vocab-size 49408
    jaxpt train configs/clip_text.py --data DIR

The text network, the loss and the optimizer as published (Radford et al. 2021, arXiv:2103.00020, section 2.5 and table
18): 12 layers of width 512, 76 tokens, the state of the last one projected to 512 places without a bias; a learned
temperature from 0.07 on and at least 0.01; 32,768 pairs at once, 32 epochs of 400 million, which are 390,625 steps. The
other side, there a network for images, is a second network of the same shape here: sentences and their translations,
questions and answers, titles and texts. Both read from both sides, where CLIP's reads from the left.
"""

from jaxpt.config import RunConfig
from jaxpt.models.config import TransformerConfig
from jaxpt.objectives import TwoTower
from jaxpt.optimizer import OptimizerConfig

TEXT = TransformerConfig(
    depth=12, width=512, heads=8, max_length=77, scale_residual_init=True, dtype="bfloat16", remat="dots"
)


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=TwoTower(first=TEXT, second=TEXT, pooling="last", projection=512),
        steps=390_625,
        batch_size=32_768,
        seq_len=76,
        microbatches=8,
        optimizer=OptimizerConfig(
            learning_rate=5e-4,
            schedule="cosine",
            warmup_steps=2000,
            beta2=0.98,
            epsilon=1e-6,
            weight_decay=0.2,
            clip_norm=None,
        ),
        log_every=100,
        eval_every=5000,
        eval_rows=32_768,
        checkpoint_every=1000,
    )
