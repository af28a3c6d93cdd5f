"""SpanBERT-Base: BERT-Base on spans of whole words, each also predicted from the two tokens around it.

    jaxpt train configs/spanbert_base.py --data DIR

Settings of the published command (Joshi et al. 2020, arXiv:1907.10529): 2,400,000 steps of 256 rows of 512 tokens,
geometric spans of 1 to 10 words, one choice of replacement per span, boundary objective of weight 1 on the first 15
tokens of a span, no next-sentence prediction. Three things differ: documents share a row (attention stays inside
each), the places of spans are uniform, and random tokens are uniform over the vocabulary, not drawn from the text.
"""

from jaxpt.config import RunConfig
from jaxpt.corruption.selection import Spans
from jaxpt.models.presets import bert
from jaxpt.objectives import MaskedLM
from jaxpt.objectives.masked_lm import SpanBoundary
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=MaskedLM(
            encoder=bert("base", dtype="bfloat16"),
            rate=0.15,
            selection=Spans(stop=0.2, longest=10, unit="word", rounding="ceil"),
            decide_per="span",
            boundary=SpanBoundary(scale=1.0, places=15, place_width=200),
        ),
        steps=2_400_000,
        batch_size=256,
        seq_len=512,
        optimizer=OptimizerConfig(
            learning_rate=1e-4, schedule="linear", warmup_steps=10_000, epsilon=1e-8, weight_decay=0.01, clip_norm=1.0
        ),
        log_every=100,
        eval_every=5000,
        eval_rows=2048,
        checkpoint_every=1000,
    )
