"""GPT-BERT-Base: one network of 12 layers of width 768 that is both; 15 rows of 16 are masked, one is causal.

    jaxpt train configs/gpt_bert.py --data DIR

Settings as published (Charpentier & Samuel 2024, arXiv:2410.24159, and the authors' code): masked tokens are
predicted from the place before them, so that both halves share trunk and head; 15,625 steps of LAMB; rows of 128,
then 256 and 512 tokens, with as many tokens per batch; a share falling from 30 to 15 % in spans of 1 to 3 tokens.
The batch is theirs on average over each phase, where theirs grows evenly from 8,192 rows of 128 tokens to four times
as many tokens. Here positions are DeBERTa's (disentangled, so attention is dense), without the paper's second norm,
attention gate and learned weights between layers; tokens are not chosen by how seldom they were masked before; [SEP]
ends a document; the last 1.6 % of the steps do not go to learning rate 0.
"""

from jaxpt.config import PhaseConfig, RunConfig
from jaxpt.corruption.selection import Spans
from jaxpt.models.config import TransformerConfig
from jaxpt.objectives import CausalLM, MaskedLM, Mixture
from jaxpt.objectives.combine import Portion
from jaxpt.optimizer import OptimizerConfig

STEPS = 15_625


def config() -> RunConfig:
    """Return the run."""
    network = TransformerConfig(
        depth=12,
        width=768,
        heads=12,
        mlp_width=2560,
        gated=True,
        positions="disentangled",
        relative_buckets=32,
        relative_distance=512,
        embedding_norm=True,
        logits_bias=True,
        dropout=0.1,
        attention_dropout=0.1,
        init="truncated_normal",
        dtype="bfloat16",
        remat="full",
    )
    masked = MaskedLM(
        encoder=network,
        predict_from="previous",
        rate=0.3,
        final_rate=0.15,
        rate_steps=STEPS,
        selection=Spans(lengths=(1, 1, 1)),
        decide_per="span",
        mask=0.8,
        random=0.1,
        z_loss=1e-4,
    )
    causal = CausalLM(decoder=network, packing="best_fit", z_loss=1e-4)
    return RunConfig(
        objective=Mixture((Portion("mlm", masked, share=15), Portion("clm", causal, share=1)), rows="mlm"),
        vocab_size=16_384,
        steps=STEPS,
        batch_size=14_336,
        seq_len=128,
        microbatches=8,
        phases=(
            PhaseConfig(from_step=STEPS // 2, batch_size=22_528),
            PhaseConfig(from_step=int(0.7 * STEPS), batch_size=14_336, seq_len=256),
            PhaseConfig(from_step=int(0.9 * STEPS), batch_size=8192, seq_len=512),
        ),
        optimizer=OptimizerConfig(
            name="lamb",
            learning_rate=1e-2,
            schedule="cosine",
            warmup_steps=250,
            final_fraction=0.1,
            beta2=0.98,
            epsilon=1e-8,
            weight_decay=0.1,
            clip_norm=2.0,
            averaging=0.999,
        ),
        log_every=100,
        eval_every=1000,
        eval_rows=2048,
        checkpoint_every=1000,
    )
