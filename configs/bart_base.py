"""BART-Base's decoder stack: 6 layers of width 768, next-token prediction.

    jaxpt train configs/bart_base.py --data DIR

It is NOT denoising: until the sequence-to-sequence objectives are here, the decoder stack is trained alone as a
causal language model (the paper's own comparison has one, Lewis et al. 2020, arXiv:1910.13461, section 4.1).
For the base size the paper gives neither batch nor learning rate; these are RoBERTa's at a quarter of its
batch.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import bart
from jaxpt.objectives import CausalLM
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=CausalLM(decoder=bart("base", dtype="bfloat16").decoder),
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
