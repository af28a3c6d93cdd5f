"""MDLM: masked diffusion with 12 layers of width 768, rotary positions, no time input.

    jaxpt train configs/mdlm_base.py --data DIR

Settings as published for OpenWebText (Sahoo et al. 2024, arXiv:2406.07524, and the authors' code): rows of 1,024
tokens cut from the text as it comes, 512 per batch, 1,000,000 steps, AdamW without decay at a constant 3e-4 after
2,500 steps, dropout 0.1, a moving average of 0.9999 that is evaluated, GPT-2's vocabulary with [MASK] beside it. The
network is the authors' without the modulation by time, which is a constant where no time is given; here the output
layer begins at random weights, not at 0, and dropout also covers the embeddings.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import gpt2
from jaxpt.objectives import MaskedDiffusion
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=MaskedDiffusion(
            encoder=gpt2(
                "small",
                positions="rotary",
                attention_dropout=0.0,
                qkv_bias=False,
                out_bias=False,
                tie_embeddings=False,
                logits_bias=True,
                scale_residual_init=False,
                dtype="bfloat16",
            ),
            noise="mdlm",
        ),
        vocab_size=50_258,
        steps=1_000_000,
        batch_size=512,
        seq_len=1024,
        optimizer=OptimizerConfig(
            learning_rate=3e-4,
            schedule="constant",
            warmup_steps=2500,
            weight_decay=0.0,
            clip_norm=1.0,
            averaging=0.9999,
        ),
        log_every=100,
        eval_every=5000,
        eval_rows=2048,
        checkpoint_every=1000,
    )
