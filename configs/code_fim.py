"""A code model that fills in the middle: 4 layers of width 128 on the standard library's own sources, no download.

    jaxpt train configs/code_fim.py
    jaxpt data build --out DIR --input SOURCE_TREE    then    jaxpt train configs/code_fim.py --data DIR

Rate, forms and level are those of SantaCoder and StarCoder (Ben Allal et al. 2023, arXiv:2301.03988; Li et al. 2023,
arXiv:2305.06161): half of the files of a row rearranged, half of them SPM, rotary positions in place of learned ones.
At their size: 24 layers of width 2,048, 16 heads that share one key and value head, rows of 2,048 tokens.
"""

from jaxpt.config import RunConfig
from jaxpt.models.config import TransformerConfig
from jaxpt.objectives import FillInTheMiddle
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    decoder = TransformerConfig(
        depth=4,
        width=128,
        heads=4,
        kv_heads=1,
        mlp_width=512,
        max_length=2048,
        norm="rms",
        positions="rotary",
        activation="gelu_tanh",
    )
    return RunConfig(
        objective=FillInTheMiddle(decoder=decoder, pieces=2),
        data=("code",),
        vocab_size=4096,
        steps=500,
        batch_size=16,
        seq_len=256,
        optimizer=OptimizerConfig(
            learning_rate=3e-3, schedule="cosine", warmup_steps=25, final_fraction=0.1, beta2=0.95, weight_decay=0.1
        ),
        log_every=10,
        eval_every=100,
        eval_rows=128,
        checkpoint_every=100,
    )
