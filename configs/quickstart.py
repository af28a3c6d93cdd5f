"""The quickstart: a causal language model of 4 layers of width 128 on the built-in English prose, minutes on a laptop.

    jaxpt train configs/quickstart.py

The text is the documentation in the Python standard library and in the packages that jaxpt needs: no download.
"""

from jaxpt.config import RunConfig
from jaxpt.models.config import TransformerConfig
from jaxpt.objectives import CausalLM
from jaxpt.optimizer import OptimizerConfig


def config() -> RunConfig:
    """Return the run."""
    decoder = TransformerConfig(
        depth=4,
        width=128,
        heads=4,
        mlp_width=512,
        max_length=1024,
        norm="rms",
        positions="rotary",
        activation="gelu_tanh",
    )
    return RunConfig(
        objective=CausalLM(decoder=decoder),
        data=("prose",),
        vocab_size=4096,
        steps=250,
        batch_size=32,
        seq_len=128,
        optimizer=OptimizerConfig(
            learning_rate=3e-3, schedule="cosine", warmup_steps=25, final_fraction=0.1, beta2=0.99, weight_decay=0.1
        ),
        log_every=10,
        eval_every=50,
        eval_rows=128,
        checkpoint_every=50,
    )
