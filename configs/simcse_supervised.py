"""SimCSE, supervised: the vectors of BERT-Base, by what entails what and what contradicts what.

    jaxpt data build DIR --input nli.csv --fields sent0 sent1 hard_neg --text-tokens 30 --long-texts cut
    jaxpt train configs/simcse_supervised.py --data DIR --init-from RUN

Settings as published (Gao et al. 2021, arXiv:2104.08821, and the authors' code): 275,601 triples of a premise, a
hypothesis that it entails and one that it contradicts, three times, 512 at once and at most 32 tokens of each text,
temperature 0.05, [CLS] through dense and tanh also in the vectors that are used, no warm-up and no weight decay. It
goes on from a trained BERT (`--init-from`). Without the third text of each example (`--objective.texts 2`) it is the
loss of any pairs of texts that are alike.
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import bert
from jaxpt.objectives import SimCSE
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=SimCSE(encoder=bert("base", dtype="bfloat16"), texts=3, mlp="always"),
        steps=1_617,
        batch_size=512,
        seq_len=32,
        optimizer=OptimizerConfig(
            learning_rate=5e-5, schedule="linear", warmup_steps=0, epsilon=1e-8, weight_decay=0.0, clip_norm=1.0
        ),
        log_every=25,
        eval_every=125,
        eval_rows=1024,
        checkpoint_every=125,
    )
