"""Llama 2 7B: 32 layers of width 4096, rotary positions, SwiGLU.

    jaxpt train configs/llama_7b.py --data DIR --mesh.data 1 --mesh.fsdp -1

Settings as published (Touvron et al. 2023, arXiv:2307.09288, section 2.2): batches of 4 million tokens, 4,096 per
row, AdamW with beta2 0.95 and epsilon 1e-5, cosine from 3e-4 to 3e-5 after 2,000 steps, 2 trillion tokens. Layers
are rematerialised; spread them with --mesh.fsdp. docs/scaling.md says what that takes on TPU pods.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import llama
from jaxpt.objectives import CausalLM
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=CausalLM(decoder=llama("7b", dtype="bfloat16", remat="full"), bos=True),
        steps=477_000,
        batch_size=1024,
        seq_len=4096,
        optimizer=OptimizerConfig(
            learning_rate=3e-4,
            schedule="cosine",
            warmup_steps=2_000,
            final_fraction=0.1,
            beta2=0.95,
            epsilon=1e-5,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        log_every=100,
        eval_every=2500,
        eval_rows=2048,
        checkpoint_every=500,
    )
