"""GLM-Base: 12 layers of width 768, blank infilling.

    jaxpt train configs/glm_base.py --data DIR

Sizes, schedule and optimizer of the published launch scripts (Du et al. 2022, arXiv:2103.10360): rows of 512 tokens,
warm-up over a twentieth of 120,000 steps, then a cosine to a twentieth of the peak; weight decay 0.1, BERT's uncased
vocabulary. The peak of 4e-4 and the batch of 1,024 rows are from the paper's appendix as remembered. Blanks only, as
for its base and large models; the mixture of the 10B model is `sentences=0.3, generation=0.2`.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import glm
from jaxpt.objectives import BlankInfilling
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=BlankInfilling(decoder=glm("base", dtype="bfloat16")),
        vocab_size=30_522,
        steps=120_000,
        batch_size=1024,
        seq_len=512,
        optimizer=OptimizerConfig(
            learning_rate=4e-4,
            schedule="cosine",
            warmup_steps=6000,
            final_fraction=0.05,
            beta2=0.98,
            epsilon=1e-6,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        log_every=100,
        eval_every=5000,
        eval_rows=2048,
        checkpoint_every=1000,
    )
