"""ModernBERT-Base: 22 layers of width 768, alternating local and global attention, GeGLU, masking 30 %.

    jaxpt train configs/modernbert_base.py --data DIR

Settings of the first phase (Warner et al. 2024, arXiv:2412.13663, appendix A): 1.7 trillion tokens in batches
of 4,608 rows of 1,024, warm-up over 3 billion tokens, then a stable rate. Three things differ: AdamW stands for
StableAdamW, the batch is not warmed up from 768 rows, and the last tenth decays linearly, where the paper
decays by one minus the square root after its context extension.
"""

from jaxpt.config import RunConfig
from jaxpt.corruption.selection import Independent
from jaxpt.models.presets import modernbert
from jaxpt.objectives import MaskedLM
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=MaskedLM(
            encoder=modernbert("base", dtype="bfloat16"),
            packing="best_fit",
            rate=0.3,
            selection=Independent(),
        ),
        steps=364_000,
        batch_size=4608,
        seq_len=1024,
        optimizer=OptimizerConfig(
            learning_rate=8e-4,
            schedule="wsd",
            warmup_steps=636,
            decay_steps=36_400,
            beta2=0.98,
            epsilon=1e-6,
            weight_decay=1e-5,
            clip_norm=1.0,
        ),
        log_every=100,
        eval_every=5000,
        eval_rows=2048,
        checkpoint_every=1000,
    )
