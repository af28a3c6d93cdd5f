"""DeBERTaV3-Base: 12 layers of width 768 with disentangled attention, replaced-token detection, 6 layers generate.

    jaxpt train configs/deberta_v3_base.py --data DIR

Settings as published for the paper's comparisons of embedding sharing (He et al. 2021, arXiv:2111.09543): 125,000
steps of 2,048 rows, a generator as wide and half as deep, gradient-disentangled embeddings, every selected token
masked, ELECTRA's optimizer; a vocabulary of 128,100. Here both networks take one optimizer step together, the
generator has no enhanced mask decoder, and nothing is dropped from the table of distances. Attention is dense, as
these scores depend on the tokens: its memory grows with the square of the length.
"""

from dataclasses import replace

from jaxpt.config import RunConfig
from jaxpt.models.presets import deberta_v3
from jaxpt.objectives import ReplacedTokenDetection
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    encoder = deberta_v3("base", dtype="bfloat16", remat="full")
    return RunConfig(
        objective=ReplacedTokenDetection(
            encoder=encoder,
            generator=replace(encoder, depth=encoder.depth // 2),
            embeddings="gradient_disentangled",
            rate=0.15,
            mask=1.0,
            with_first=True,
        ),
        vocab_size=128_100,
        steps=125_000,
        batch_size=2048,
        seq_len=512,
        microbatches=8,
        optimizer=OptimizerConfig(
            learning_rate=5e-4, schedule="linear", warmup_steps=10_000, epsilon=1e-6, weight_decay=0.01, clip_norm=1.0
        ),
        log_every=100,
        eval_every=5000,
        eval_rows=2048,
        checkpoint_every=1000,
    )
