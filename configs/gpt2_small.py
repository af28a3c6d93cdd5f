"""GPT-2 small: 12 layers of width 768, next-token prediction.

    jaxpt train configs/gpt2_small.py --data DIR

The size is of Radford et al. 2019, who do not publish the optimizer; it is that of GPT-3 Small (Brown et al.
2020, arXiv:2005.14165, tables 2.1 and appendix B): 300 billion tokens in batches of half a million, cosine to a
tenth of the peak, warm-up over 375 million tokens. Rows are 1,024 tokens, as in GPT-2; attention stays inside a
document.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import gpt2
from jaxpt.objectives import CausalLM
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=CausalLM(decoder=gpt2("small", dtype="bfloat16")),
        steps=572_000,
        batch_size=512,
        seq_len=1024,
        optimizer=OptimizerConfig(
            learning_rate=6e-4,
            schedule="cosine",
            warmup_steps=715,
            final_fraction=0.1,
            beta2=0.95,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        log_every=100,
        eval_every=5000,
        eval_rows=2048,
        checkpoint_every=1000,
    )
