"""LLaDA 8B: masked diffusion with 32 layers of width 4096, rotary positions, SwiGLU.

    jaxpt train configs/llada_8b.py --data DIR --mesh.data 1 --mesh.fsdp -1

Settings as published (Nie et al. 2025, arXiv:2502.09992, section 2.2 and appendix B): 2.3 trillion tokens in batches
of 1,280 rows of 4,096, AdamW with weight decay 0.1, warm-up over 2,000 steps to 4e-4, 1e-4 after 1.2 trillion tokens,
over the last 0.3 trillion linearly to 1e-5, one row in a hundred of a random length. The paper does not say
beta2 and clipping; here they are Llama's. Layers are rematerialised; spread them with --mesh.fsdp.
"""

from jaxpt.config import PhaseConfig, RunConfig
from jaxpt.models.presets import llama
from jaxpt.objectives import MaskedDiffusion
from jaxpt.optimizer import OptimizerConfig

TOKENS = 1280 * 4096  # per step


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=MaskedDiffusion(
            encoder=llama("8b", kv_heads=32, mlp_width=12_288, max_length=4096, dtype="bfloat16", remat="full"),
            noise="llada",
            predict_mask=True,
            short_rate=0.01,
        ),
        vocab_size=126_464,
        steps=int(2.3e12 / TOKENS),
        batch_size=1280,
        seq_len=4096,
        phases=(PhaseConfig(from_step=int(1.2e12 / TOKENS), learning_rate=0.25),),
        optimizer=OptimizerConfig(
            learning_rate=4e-4,
            schedule="wsd",
            warmup_steps=2_000,
            decay_steps=int(0.3e12 / TOKENS),
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
