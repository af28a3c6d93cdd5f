"""Contrastive learning from damaged texts, BERT-Base: each text is told from eight random others.

    jaxpt train configs/contrastive_lm.py --data DIR --init-from RUN

The textbook's form; there is no published run. Damage as in easy data augmentation (Wei & Zou 2019, arXiv:1901.11196):
a tenth of the tokens, by one of three operators. Temperature, learning rate and batch are those of SimCSE (Gao et al.
2021, arXiv:2104.08821). It goes on from a trained BERT (`--init-from`), on data of one sentence or paragraph per
document; above a share of about 0.3 the damage makes other texts of them.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import bert
from jaxpt.objectives import ContrastiveLM
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=ContrastiveLM(encoder=bert("base", dtype="bfloat16")),
        steps=15_625,
        batch_size=64,
        seq_len=64,
        optimizer=OptimizerConfig(
            learning_rate=3e-5, schedule="linear", warmup_steps=0, epsilon=1e-8, weight_decay=0.0, clip_norm=1.0
        ),
        log_every=125,
        eval_every=1250,
        eval_rows=1024,
        checkpoint_every=1250,
    )
