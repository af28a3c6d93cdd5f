"""XLNet-Base: 12 layers of width 768 with Transformer-XL's relative positions, permutation language modelling.

    jaxpt train configs/xlnet_base.py --data DIR

The paper's settings for its large model at base size (Yang et al. 2019, arXiv:1906.08237, appendix A.4): 500,000 steps
of 8,192 rows of 512 tokens, one token in six predicted, 4e-4 with a linear decay; the second half of a row sees the
first; a vocabulary of 32,000. Here a token sees its own document only, and rows keep no memory of the row before
(`memory`). Attention is dense, as these scores depend on the tokens: its memory grows with the square of the length.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import xlnet
from jaxpt.objectives import PermutationLM
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=PermutationLM(encoder=xlnet("base", dtype="bfloat16", remat="full")),
        vocab_size=32_000,
        steps=500_000,
        batch_size=8192,
        seq_len=512,
        microbatches=8,
        optimizer=OptimizerConfig(
            learning_rate=4e-4, schedule="linear", warmup_steps=40_000, epsilon=1e-6, weight_decay=0.01, clip_norm=1.0
        ),
        log_every=100,
        eval_every=5000,
        eval_rows=2048,
        checkpoint_every=1000,
    )
