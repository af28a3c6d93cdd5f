"""Mean-teacher masked language modelling: 12 layers of width 768 that agree with their own moving average.

    jaxpt train configs/mean_teacher_mlm.py --data DIR

A recipe of this project, not of a paper: BERT-Base masks 30 % of the tokens in two views of each row, half of them in
both, and predicts there what a moving average of its parameters predicts from the other view (Tarvainen & Valpola 2017,
arXiv:1703.01780: decay 0.99 at first and 0.999 later, weight of the agreement rising from 0; divergence KL, as the
outputs are distributions). All else is BERT's first phase at half the batch, since each row is read twice.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import bert
from jaxpt.objectives import Consistency
from jaxpt.objectives.consistency import MovingAverage
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=Consistency(
            encoder=bert("base", dtype="bfloat16"),
            views=2,
            rate=0.3,
            shared=0.15,
            divergence="kl",
            scale=1.0,
            ramp_steps=40_000,
            teacher=MovingAverage(decay=0.99, final_decay=0.999, steps=40_000),
        ),
        steps=900_000,
        batch_size=128,
        seq_len=128,
        optimizer=OptimizerConfig(
            learning_rate=1e-4, schedule="linear", warmup_steps=10_000, epsilon=1e-6, weight_decay=0.01, clip_norm=1.0
        ),
        log_every=100,
        eval_every=5000,
        eval_rows=2048,
        checkpoint_every=1000,
    )
