"""Two towers over pairs of texts, with SigLIP's loss and its text network.

    jaxpt data build DIR --input pairs.jsonl --fields source target --text-tokens 62 --vocab-size 32000
    jaxpt train configs/siglip_text.py --data DIR

The text network, the loss and the optimizer as published (Zhai et al. 2023, arXiv:2303.15343, and the authors' code):
12 layers of width 768, 64 tokens, the state of the last one; a scale from 10 and a bias from -10 on, both learned and
without a bound; 32,768 pairs at once, Adam with beta2 0.95 at 0.001, weight decay 0.0001. The length of the run is a
choice of ours. A bias of -10 is the log-odds of a pair among 22,000; for batches of B pairs, -ln(B - 1)
starts better (`--objective.initial-bias`). The other side, there a network for images, is a second network of the same
shape here.
"""

from jaxpt.config import RunConfig
from jaxpt.models.config import TransformerConfig
from jaxpt.objectives import TwoTower
from jaxpt.optimizer import OptimizerConfig

TEXT = TransformerConfig(depth=12, width=768, heads=12, max_length=64, dtype="bfloat16", remat="dots")


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=TwoTower(
            first=TEXT, second=TEXT, pooling="last", projection=768, loss="sigmoid", initial_scale=10.0, max_scale=None
        ),
        steps=122_070,
        batch_size=32_768,
        seq_len=64,
        microbatches=8,
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=5000,
            beta2=0.95,
            weight_decay=1e-4,
            clip_norm=1.0,
        ),
        log_every=100,
        eval_every=5000,
        eval_rows=32_768,
        checkpoint_every=1000,
    )
