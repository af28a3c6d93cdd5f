"""Prediction heads: from hidden states to what the logits over the vocabulary are made of."""

from __future__ import annotations

import functools

from flax import nnx

from jaxpt.models.blocks import kernel_init
from jaxpt.models.config import TransformerConfig
from jaxpt.models.layers import ACTIVATIONS, Dense, Norm, zeros
from jaxpt.models.params import Declared, constrain, initializer_of, param, specs_of, split
from jaxpt.types import Array, Network, Params, Readout


class Head(nnx.Module):
    """An optional transform, then the projection to the vocabulary."""

    def __init__(self, config: TransformerConfig, vocab_size: int, *, transform: bool):
        c, width = config, config.embedding
        self.config = c
        axes = ("embed", None)
        init = kernel_init(c, c.width)
        self.transform = Dense((c.width, width), axes, init, bias=c.head_bias) if transform else None
        self.norm = Norm(c.norm, width, c.norm_epsilon, bias=c.norm_bias) if transform else None
        project = not transform and width != c.width
        self.project = Dense((c.width, width), axes, init, bias=False) if project else None
        shape = (vocab_size, width)
        self.table = None if c.tie_embeddings else param(shape, ("vocab", "embed"), "kernel", kernel_init(c, width))
        self.bias = param((vocab_size,), ("vocab",), "bias", zeros) if c.logits_bias else None

    def __call__(self, hidden: Array, table: Array | None) -> Readout:
        """The logits over the vocabulary, not multiplied out, from hidden [..., D]."""
        x = hidden.astype(self.config.dtype)
        if self.transform is not None and self.norm is not None:
            x = self.norm(ACTIVATIONS[self.config.activation](self.transform(x)))
        if self.project is not None:
            x = self.project(x)
        if self.config.scale_logits and self.table is None:
            x *= self.config.width**-0.5
        if self.table is not None:
            table = self.table[...]
        assert table is not None, "a tied head needs the token table"
        # split over fsdp by width, as any kernel is: gathered before it is used
        return Readout(x, constrain(table, "vocab", None), None if self.bias is None else self.bias[...])


def lm_head(config: TransformerConfig, vocab_size: int) -> Network:
    """The projection to the vocabulary, tied to the token table or with a table of its own.

    ``apply(params, hidden [..., D], table [V, E] or None)`` returns a ``Readout``: ``linear_cross_entropy`` makes
    losses of it, ``logits_of`` float32 logits [..., V]. ``table`` is ``embedding_table(params_of_the_network)``; an
    untied head ignores it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> head = lm_head(TransformerConfig(depth=1, width=4, heads=1, tie_embeddings=False), vocab_size=7)
      >>> readout = head.apply(head.init(jax.random.key(0)), jnp.ones((2, 3, 4)), None)
      >>> readout.hidden.shape, readout.table.shape
      ((2, 3, 4), (7, 4))
    """
    return _network(split(Head(config, vocab_size, transform=False)))


def mlm_head(config: TransformerConfig, vocab_size: int) -> Network:
    """BERT's head: dense, activation and norm before the projection. Otherwise as ``lm_head``."""
    return _network(split(Head(config, vocab_size, transform=True)))


def _network(head: Declared[Head]) -> Network:
    return Network(specs_of(head.tree), initializer_of(head.tree), functools.partial(_apply, head))


def _apply(head: Declared[Head], params: Params, hidden: Array, table: Array | None = None) -> Readout:
    return head.bind(params)(hidden, table)
