"""ProtBert: the 30-layer protein encoder of width 1024, masked language modelling of residues.

    jaxpt data build DIR --input uniref100.fasta.gz --model char --vocab-size 400
    jaxpt train configs/protein_bert.py --data DIR

A record of a FASTA file is a document and a residue a token. Settings as published (Elnaggar et al. 2021,
arXiv:2007.06225, ProtBert): 300,000 steps of 15,360 rows of 512 residues, then 100,000 of 2,560 rows of 2,048, LAMB
at 0.002 after 40,000 steps of warm-up, 15 % of the residues masked. The warm-up is not repeated for the long rows.
"""

from jaxpt.config import PhaseConfig, RunConfig
from jaxpt.corruption.selection import FixedCount
from jaxpt.models.presets import bert
from jaxpt.objectives import MaskedLM
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    return RunConfig(
        objective=MaskedLM(
            encoder=bert("large", depth=30, max_length=40_000, dtype="bfloat16", dropout=0.0, attention_dropout=0.0),
            packing="best_fit",
            rate=0.15,
            selection=FixedCount(rounding="nearest", minimum=1, count_special=True),
        ),
        steps=400_000,
        batch_size=15_360,
        seq_len=512,
        phases=(PhaseConfig(from_step=300_000, seq_len=2048, batch_size=2560),),
        optimizer=OptimizerConfig(
            name="lamb", learning_rate=2e-3, schedule="linear", warmup_steps=40_000, epsilon=1e-6, weight_decay=0.01
        ),
        log_every=100,
        eval_every=5000,
        eval_rows=2048,
        checkpoint_every=1000,
    )
