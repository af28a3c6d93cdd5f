"""Prediction heads: from hidden states to what the logits over the vocabulary are made of, or to one logit each."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
from flax import nnx

from jaxpt.models.blocks import config_norm, kernel_init, table_init
from jaxpt.models.config import TransformerConfig
from jaxpt.models.layers import ACTIVATIONS, Dense, Norm, normal, zeros
from jaxpt.models.params import Declared, Initializer, constrain, initializer_of, param, specs_of, split
from jaxpt.types import Array, Network, Params, Readout

Pooling: TypeAlias = Literal["first", "mean", "last"]


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


class BoundaryHead(nnx.Module):
    """SpanBERT's: a token from the states at both ends of its span and its place in it (arXiv:1907.10529, eq. 1)."""

    def __init__(self, config: TransformerConfig, vocab_size: int, places: int, place_width: int):
        c = config
        self.config = c
        self.places = param((places, place_width), (None, None), "embedding", table_init(c))
        inputs = 2 * c.width + place_width
        self.first = Dense((inputs, c.width), (None, "embed"), kernel_init(c, inputs), bias=True)
        self.first_norm = Norm(c.norm, c.width, c.norm_epsilon, bias=c.norm_bias)
        self.rest = Head(c, vocab_size, transform=True)

    def __call__(self, left: Array, right: Array, places: Array, table: Array | None) -> Readout:
        """The logits, not multiplied out, from hidden [..., D] at both ends and places [...] i32, 0 = first."""
        place = jnp.take(self.places[...], places, axis=0).astype(left.dtype)
        x = self.first(jnp.concatenate([left, right, place], -1))
        return self.rest(self.first_norm(ACTIVATIONS[self.config.activation](x)), table)


def lm_head(config: TransformerConfig, vocab_size: int) -> Network:
    """The projection to the vocabulary, tied to the token table or with a table of its own.

    ``apply(params, hidden [..., D], table [V, E] or None)`` returns a ``Readout``: ``linear_cross_entropy`` makes
    losses of it, ``logits_of`` float32 logits [..., V]. ``table`` is ``embedding_table(params_of_the_network)``; an
    untied head ignores it.

    Example:
      >>> import jax
      >>> head = lm_head(TransformerConfig(depth=1, width=4, heads=1, tie_embeddings=False), vocab_size=7)
      >>> readout = head.apply(head.init(jax.random.key(0)), jnp.ones((2, 3, 4)), None)
      >>> readout.hidden.shape, readout.table.shape
      ((2, 3, 4), (7, 4))
    """
    return _network(split(Head(config, vocab_size, transform=False)))


def mlm_head(config: TransformerConfig, vocab_size: int) -> Network:
    """BERT's head: dense, activation and norm before the projection. Otherwise as ``lm_head``."""
    return _network(split(Head(config, vocab_size, transform=True)))


def boundary_head(config: TransformerConfig, vocab_size: int, *, places: int, place_width: int) -> Network:
    """SpanBERT's head for the tokens of a span: two layers of dense, activation and norm before the projection.

    ``apply(params, left [..., D], right [..., D], place [...] i32 in 0 .. places - 1, table)`` returns a ``Readout``.
    """
    return _network(split(BoundaryHead(config, vocab_size, places, place_width)))


def _network(head: Declared[Any]) -> Network:
    return Network(specs_of(head.tree), initializer_of(head.tree), functools.partial(_apply, head))


def _apply(head: Declared[Any], params: Params, *arrays: Array | None) -> Readout:
    return head.bind(params)(*arrays)


# --------------------------------------------------------------------------------------- detection


class Detector(nnx.Module):
    """Dense, activation, one logit per token; before it, perhaps, the sum with the document's first token, normed."""

    def __init__(self, config: TransformerConfig, *, with_first: bool):
        c = config
        self.config = c
        self.norm = config_norm(c, c.width) if with_first else None
        self.transform = Dense((c.width, c.width), ("embed", None), kernel_init(c, c.width), bias=True)
        self.score = Dense((c.width, 1), ("embed", None), kernel_init(c, c.width), bias=True)

    def __call__(self, hidden: Array, positions: Array) -> Array:
        """Logits [R, L] f32 from hidden [R, L, D]."""
        if self.norm is not None:
            first_RL = jnp.arange(positions.shape[1]) - positions
            hidden = self.norm(hidden + jnp.take_along_axis(hidden, first_RL[..., None], axis=1))
        hidden = ACTIVATIONS[self.config.activation](self.transform(hidden))
        return self.score(hidden.astype(jnp.float32))[..., 0]


def detection_head(config: TransformerConfig, *, with_first: bool = False) -> Network:
    """A question of yes or no about every token (ELECTRA; with ``with_first`` that of DeBERTaV3).

    ``apply(params, hidden [R, L, D], positions [R, L])`` returns logits [R, L] f32.

    Args:
      config: of the network that gives the hidden states.
      with_first: each token is read together with the first token of its document, [CLS], where positions are 0.

    Example:
      >>> import jax
      >>> head = detection_head(TransformerConfig(depth=1, width=4, heads=1), with_first=True)
      >>> head.apply(head.init(jax.random.key(0)), jnp.ones((2, 3, 4)), jnp.array([[0, 1, 0]] * 2)).shape
      (2, 3)
    """
    detector = split(Detector(config, with_first=with_first))
    return Network(
        specs_of(detector.tree),
        initializer_of(detector.tree),
        lambda params, hidden, positions: detector.bind(params)(hidden, positions),
    )


# ------------------------------------------------------------------------------------------ whole texts


class Pooler(nnx.Module):
    """Dense and tanh."""

    def __init__(self, config: TransformerConfig):
        width = config.width
        self.transform = Dense((width, width), ("embed", None), kernel_init(config, width), bias=True)

    def __call__(self, hidden: Array) -> Array:
        """Pooled [..., D] from hidden [..., D]."""
        return jnp.tanh(self.transform(hidden))


class Classifier(nnx.Module):
    """Dense, in float32."""

    def __init__(self, config: TransformerConfig, classes: int):
        self.score = Dense((config.width, classes), ("embed", None), kernel_init(config, config.width), bias=True)

    def __call__(self, pooled: Array) -> Array:
        """Logits [..., classes] f32 from [..., D]."""
        return self.score(pooled.astype(jnp.float32))


def pool(kind: Pooling, hidden: Array, segment_ids: Array) -> Array:
    """Return the vector of each row that holds one text: the state of its first or last token, or the mean of all.

    Args:
      kind: which.
      hidden: [R, L, D].
      segment_ids: [R, L] i32, 0 = padding; the text stands from the first place on.

    Returns:
      [R, D], of the type of ``hidden``; the mean is taken in float32, and 0 for a row without a text.

    >>> hidden = jnp.array([[[1.0], [2.0], [6.0], [9.0]]])
    >>> [pool(kind, hidden, jnp.array([[1, 1, 1, 0]])).item() for kind in ("first", "mean", "last")]
    [1.0, 3.0, 6.0]
    """
    if kind == "first":
        return hidden[:, 0]
    inside = segment_ids > 0
    size = inside.sum(1, keepdims=True)
    if kind == "mean":
        total = jnp.sum(jnp.where(inside[..., None], hidden.astype(jnp.float32), 0), axis=1)
        return (total / jnp.maximum(size, 1)).astype(hidden.dtype)
    return jnp.take_along_axis(hidden, jnp.maximum(size - 1, 0)[..., None], axis=1)[:, 0]


def pooler(config: TransformerConfig) -> Network:
    """BERT's pooling of a text: the hidden state of [CLS] through dense and tanh.

    ``apply(params, hidden [..., D])`` returns [..., D].
    """
    declared = split(Pooler(config))
    return Network(
        specs_of(declared.tree), initializer_of(declared.tree), lambda params, hidden: declared.bind(params)(hidden)
    )


def projection(config: TransformerConfig, width: int) -> Network:
    """A linear map of a text's vector into another space, without a bias.

    ``apply(params, pooled [..., D])`` returns [..., width] of the same type.
    """
    declared = split(Dense((config.width, width), ("embed", None), kernel_init(config, config.width), bias=False))
    return Network(
        specs_of(declared.tree), initializer_of(declared.tree), lambda params, pooled: declared.bind(params)(pooled)
    )


def predictions(width: int, number: int, scale: float = 1.0) -> Network:
    """Several linear maps of a space into itself, W_k ~ N(0, scale^2 / width) (CPC, arXiv:1807.03748).

    ``apply(params, vectors [..., width])`` returns W_k x for each k, [..., number, width], of the same type.
    """
    declared = split(Dense((width, number * width), ("embed", None), normal(scale * width**-0.5), bias=False))

    def apply(params: Params, vectors: Array) -> Array:
        return declared.bind(params)(vectors).reshape(*vectors.shape[:-1], number, width)

    return Network(specs_of(declared.tree), initializer_of(declared.tree), apply)


class Similarity(nnx.Module):
    """Two numbers."""

    def __init__(self, scale: float, bias: float | None):
        self.log_scale = param((), (), "bias", _constant(math.log(scale)))
        self.bias = None if bias is None else param((), (), "bias", _constant(bias))

    def __call__(self) -> tuple[Array, Array | None]:
        """(scale, bias), [] f32."""
        return jnp.exp(self.log_scale[...]), None if self.bias is None else self.bias[...]


def _constant(value: float) -> Initializer:
    return lambda key, shape: jnp.full(shape, value, jnp.float32)


def similarity(scale: float, bias: float | None = None) -> Network:
    """What makes logits of cosines: a factor, learned as its logarithm (CLIP), and perhaps a bias (SigLIP).

    ``apply(params)`` returns (scale [] f32, bias [] f32 or None). Neither decays. A bound on the scale belongs into
    ``Objective.advance`` (``bounded``): within the forward pass, it would stop the gradient of what has reached it.

    Args:
      scale: the first; CLIP's is 1 / 0.07, SigLIP's 10.
      bias: the first, or None for none; SigLIP's is -10.

    Example:
      >>> import jax
      >>> network = similarity(1 / 0.07)
      >>> params = network.init(jax.random.key(0))
      >>> round(float(params["log_scale"]), 6), round(float(network.apply(params)[0]), 4)
      (2.65926, 14.2857)
    """
    declared = split(Similarity(scale, bias))
    return Network(specs_of(declared.tree), initializer_of(declared.tree), lambda params: declared.bind(params)())


def bounded(params: Params, highest: float) -> Params:
    """Return the parameters of a ``similarity`` with a scale of at most ``highest``.

    >>> params = {"log_scale": jnp.float32(9.0)}
    >>> round(float(bounded(params, 100.0)["log_scale"]), 5)
    4.60517
    """
    return params | {"log_scale": jnp.minimum(params["log_scale"], math.log(highest))}


def classifier(config: TransformerConfig, classes: int) -> Network:
    """A question with some answers about a vector: ``apply(params, pooled [..., D])`` returns [..., classes] f32."""
    declared = split(Classifier(config, classes))
    return Network(
        specs_of(declared.tree), initializer_of(declared.tree), lambda params, pooled: declared.bind(params)(pooled)
    )
