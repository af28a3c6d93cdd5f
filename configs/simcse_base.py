"""SimCSE, unsupervised: the vectors of BERT-Base, told apart by dropout.

    jaxpt train configs/simcse_base.py --data DIR --init-from RUN

Settings as published (Gao et al. 2021, arXiv:2104.08821, and the authors' code): 1,000,000 sentences of Wikipedia once,
64 at a time and at most 32 tokens of each, temperature 0.05, [CLS] through dense and tanh in training only, no warm-up
and no weight decay. It goes on from a trained BERT (`--init-from`), on data of one sentence per document; the authors
keep the best step of a development set, which need not be the last.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import bert
from jaxpt.objectives import SimCSE
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=SimCSE(encoder=bert("base", dtype="bfloat16")),
        steps=15_625,
        batch_size=64,
        seq_len=32,
        optimizer=OptimizerConfig(
            learning_rate=3e-5, schedule="linear", warmup_steps=0, epsilon=1e-8, weight_decay=0.0, clip_norm=1.0
        ),
        log_every=125,
        eval_every=1250,
        eval_rows=1024,
        checkpoint_every=1250,
    )
