"""TSDAE, BERT-Base: sentences are written again from the vector of two fifths of their words.

    jaxpt train configs/tsdae_base.py --data DIR --init-from RUN

Settings as published (Wang et al. 2021, arXiv:2104.06979, and the authors' code): 8 sentences at a time and at most 75
tokens of each, a constant learning rate, no weight decay, [CLS] as the vector, encoder and decoder with the same
parameters. The steps are those of 100,000 sentences once; the authors take all sentences of the domain. It goes on from
a trained BERT (`--init-from`, whose head begins as the decoder's), on data of one sentence per document.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import bert
from jaxpt.objectives import TSDAE
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=TSDAE(encoder=bert("base", dtype="bfloat16")),
        steps=12_500,
        batch_size=8,
        seq_len=75,
        optimizer=OptimizerConfig(
            learning_rate=3e-5, schedule="constant", warmup_steps=0, epsilon=1e-8, weight_decay=0.0, clip_norm=1.0
        ),
        log_every=100,
        eval_every=1250,
        eval_rows=1024,
        checkpoint_every=1250,
    )
