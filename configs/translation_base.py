"""The base Transformer on pairs of texts: 6 + 6 layers of width 512.

    jaxpt data build DIR --input pairs.jsonl --fields source target --text-tokens 240 --vocab-size 37000
    jaxpt train configs/translation_base.py --data DIR

Its first task was translation (Vaswani et al. 2017, arXiv:1706.03762, sections 5 and 6): label smoothing 0.1, a rate of
width^-0.5 * min(step^-0.5, step * 4000^-1.5), 100,000 steps of about 25,000 source and 25,000 target tokens, which are
64 rows of 512 slots on each side. Any pairs will do: articles and summaries, questions and answers (with
`--objective.source-share 1.0 --objective.target-share 0.3`, for example).
"""

from jaxpt.config import RunConfig
from jaxpt.models.presets import vaswani
from jaxpt.objectives import Seq2Seq
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=Seq2Seq(network=vaswani("base", dtype="bfloat16"), source_share=0.6, target_share=0.6),
        steps=100_000,
        batch_size=64,
        seq_len=512,
        optimizer=OptimizerConfig(
            learning_rate=(512 * 4000) ** -0.5,
            schedule="inverse_sqrt",
            warmup_steps=4000,
            beta2=0.98,
            epsilon=1e-9,
            weight_decay=0.0,
            clip_norm=None,
        ),
        log_every=100,
        eval_every=5000,
        eval_rows=1024,
        checkpoint_every=1000,
    )
