"""ConSERT: the vectors of BERT-Base, told apart by what is taken from their embeddings.

    jaxpt train configs/consert_base.py --data DIR --init-from RUN

Settings as published (Yan et al. 2021, arXiv:2105.11741, and the authors' code): the 89,192 texts of the STS tasks ten
times, 96 at once and at most 64 tokens of each; one view loses a fifth of the columns of its embeddings, the other one
has its positions mixed, and there is no dropout; each vector is told from all others of both views at temperature 0.1;
the vector is the mean of the last two layers. Their loss is 0.15 times the sum over both directions, 0.3 times the
mean. It goes on from a trained BERT (`--init-from`), on data of one sentence per document.
"""

from jaxpt.config import RunConfig
from jaxpt.corruption.views import Perturbation
from jaxpt.models.presets import bert
from jaxpt.objectives import SimCSE
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=SimCSE(
            encoder=bert("base", dtype="bfloat16", dropout=0.0, attention_dropout=0.0),
            views=(Perturbation(features=0.2), Perturbation(shuffle=True)),
            pooling="mean_last_two",
            mlp="none",
            temperature=0.1,
            form="nt_xent",
            scale=0.3,
        ),
        steps=9_300,
        batch_size=96,
        seq_len=64,
        optimizer=OptimizerConfig(
            learning_rate=5e-7, schedule="linear", warmup_steps=930, epsilon=1e-6, weight_decay=0.01, clip_norm=1.0
        ),
        log_every=100,
        eval_every=900,
        eval_rows=1024,
        checkpoint_every=900,
    )
