"""BART-Base: 6 + 6 layers of width 768, text infilling and sentence permutation.

    jaxpt train configs/bart_base.py --data DIR

The noise is the one that the released models were trained with (Lewis et al. 2020, arXiv:1910.13461, section 5, and
fairseq's options for it): all sentences permuted, 30 % of the words hidden in spans of Poisson(3.5) words, a tenth of
the masks random tokens. For the base size the paper gives neither batch nor learning rate; these are RoBERTa's at a
quarter of its batch.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import bart
from jaxpt.objectives import Denoising
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=Denoising(network=bart("base", dtype="bfloat16")),
        steps=500_000,
        batch_size=2048,
        seq_len=512,
        optimizer=OptimizerConfig(
            learning_rate=3e-4,
            schedule="linear",
            warmup_steps=10_000,
            beta2=0.98,
            epsilon=1e-6,
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        log_every=100,
        eval_every=5000,
        eval_rows=2048,
        checkpoint_every=1000,
    )
