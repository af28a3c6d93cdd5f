"""A Llama of about a billion parameters: 16 layers of width 2048, rotary positions, SwiGLU, grouped queries.

    jaxpt train configs/llama_1b.py --data DIR

The shape is that of Llama 3.2 1B, the optimizer TinyLlama's (Zhang et al. 2024, arXiv:2401.02385): batches of 2
million tokens, 2,048 per row, cosine from 4e-4 to 4e-5 after 2,000 steps; 3 trillion tokens in the paper, 300
billion here. Layers are rematerialised; spread them with --mesh.fsdp.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import llama
from jaxpt.objectives import CausalLM
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=CausalLM(decoder=llama("1b", dtype="bfloat16", remat="full")),
        steps=143_000,
        batch_size=1024,
        seq_len=2048,
        optimizer=OptimizerConfig(
            learning_rate=4e-4,
            schedule="cosine",
            warmup_steps=2_000,
            final_fraction=0.1,
            beta2=0.95,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        log_every=100,
        eval_every=2500,
        eval_rows=2048,
        checkpoint_every=500,
    )
