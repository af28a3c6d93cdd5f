"""One layer of a Transformer: attention, perhaps cross-attention, MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
from flax import nnx

from jaxpt.models.attention import attend
from jaxpt.models.config import TransformerConfig
from jaxpt.models.distances import DistanceScores
from jaxpt.models.layers import ACTIVATIONS, Dense, Norm, dropout, normal, project
from jaxpt.models.params import Initializer, constrain
from jaxpt.models.positions import rotate
from jaxpt.types import Array, AttentionPattern

CrossAttention: TypeAlias = bool | Literal["vector"]  # "vector": to one vector, not to the places of a row


def kernel_init(config: TransformerConfig, inputs: int, *, residual: bool = False, factor: float = 1.0) -> Initializer:
    """The initializer of a kernel with this many inputs."""
    scale = config.init_scale * factor
    if config.init == "fan_in":
        scale *= inputs**-0.5
    if residual and config.scale_residual_init:
        scale *= (2 * config.depth) ** -0.5
    return normal(scale, 2.0 if config.init == "truncated_normal" else None)


def table_init(config: TransformerConfig) -> Initializer:
    """The initializer of an embedding table."""
    return normal(config.init_scale, 2.0 if config.init == "truncated_normal" else None)


def config_norm(config: TransformerConfig, width: int) -> Norm:
    """The norm that the configuration asks for."""
    return Norm(config.norm, width, config.norm_epsilon, bias=config.norm_bias)


# ------------------------------------------------------------------------------------------ layers


class Sight(NamedTuple):
    """What an attention sublayer needs to know besides its input."""

    pattern: AttentionPattern
    window: int | None = None
    angles: tuple[Array, Array] | None = None  # rotary, of queries and keys alike
    bias: Array | None = None  # see ``attend``
    distances: tuple[Array, Array] | None = None  # a vector per distance [P, D], and its row for each pair [R, Q, L]


class Attention(nnx.Module):
    """Multi-head attention with grouped queries."""

    def __init__(self, config: TransformerConfig):
        c = config
        self.config = c
        queries, keys = c.heads * c.head_dim, c.groups * c.head_dim
        # T5 has no scale on the scores: it is in the first numbers of the queries instead.
        factor = c.head_dim**-0.5 if c.init == "fan_in" and c.attention_scale == 1 else 1.0
        self.query = Dense(
            (c.width, queries), ("embed", "heads"), kernel_init(c, c.width, factor=factor), bias=c.qkv_bias
        )
        self.key = Dense((c.width, keys), ("embed", "kv_heads"), kernel_init(c, c.width), bias=c.qkv_bias)
        self.value = Dense((c.width, keys), ("embed", "kv_heads"), kernel_init(c, c.width), bias=c.qkv_bias)
        self.out = Dense(
            (queries, c.width), ("heads", "embed"), kernel_init(c, queries, residual=True), bias=c.out_bias
        )
        own, init = c.relative_projections and c.positions == "disentangled", kernel_init(c, c.width)
        self.distance_query = Dense((c.width, queries), ("embed", "heads"), init, bias=True) if own else None
        self.distance_key = Dense((c.width, keys), ("embed", "kv_heads"), init, bias=True) if own else None
        relative = c.positions == "transformer_xl"
        self.relative = DistanceScores(c.width, queries, init) if relative else None
        self.query_norm = _norm_of_heads(c) if c.qk_norm else None
        self.key_norm = _norm_of_heads(c) if c.qk_norm else None

    def __call__(self, x: Array, memory: Array, sight: Sight, keys_R: Array | None, site: int) -> Array:
        """[R, Q, D] from what asks, ``x`` [R, Q, D], and what is looked at, ``memory`` [R, L, D]."""
        c = self.config
        if memory is x:
            asked, keyed, valued = project(x, self.query, self.key, self.value)
        else:
            asked, (keyed, valued) = self.query(x), project(memory, self.key, self.value)
        query_RQHC = asked.reshape(*x.shape[:2], c.heads, c.head_dim)
        key_RLGC = keyed.reshape(*memory.shape[:2], c.groups, c.head_dim)
        value_RLGC = valued.reshape(*memory.shape[:2], c.groups, c.head_dim)
        if self.query_norm is not None and self.key_norm is not None:
            query_RQHC, key_RLGC = self.query_norm(query_RQHC), self.key_norm(key_RLGC)
        if sight.angles is not None:
            query_RQHC, key_RLGC = rotate(query_RQHC, sight.angles), rotate(key_RLGC, sight.angles)
        scale, bias, form = c.attention_scale, sight.bias, c.attention
        if scale is None:
            scale = (3 * c.head_dim if c.positions == "disentangled" else c.head_dim) ** -0.5
        if self.relative is not None and sight.distances is not None:
            query_RQHC, scores_RHQL = self.relative(query_RQHC, *sight.distances)
            bias, form = scale * scores_RHQL, "dense"
        elif sight.distances is not None:
            bias, form = scale * self.distance_scores(query_RQHC, key_RLGC, *sight.distances), "dense"
        out_RQHC = attend(
            query_RQHC,
            key_RLGC,
            value_RLGC,
            sight.pattern,
            scale=scale,
            window=sight.window,
            bias=bias,
            dropout=(lambda w: dropout(w, keys_R, c.attention_dropout, site)) if drops_weights(c, keys_R) else None,
            form=form,
        )
        return self.out(out_RQHC.reshape(*x.shape[:2], c.heads * c.head_dim))

    def distance_scores(self, query_RQHC: Array, key_RLHC: Array, table_PD: Array, rows_RQL: Array) -> Array:
        """DeBERTa's disentangled attention (He et al. 2021, arXiv:2006.03654, eq. 4), without its scale::

            score[q, k] = query[q] . K(table[d]) + key[k] . Q(table[d])        d = row of the distance from k to q

        Args:
          query_RQHC, key_RLHC: of the tokens.
          table_PD: one vector per bucket of distance.
          rows_RQL: [R, Q, L] i32, the bucket of each pair.

        Returns:
          [R, H, Q, L] f32. Memory and time grow with Q * L.
        """
        heads, width = query_RQHC.shape[2:]
        table_PD = table_PD.astype(query_RQHC.dtype)
        layers = (self.distance_query or self.query, self.distance_key or self.key)
        query_PHC, key_PHC = (x.reshape(-1, heads, width) for x in project(table_PD, *layers))
        by_query_RHQP = jnp.einsum("rqhc,phc->rhqp", query_RQHC, key_PHC, preferred_element_type=jnp.float32)
        by_key_RHPL = jnp.einsum("rlhc,phc->rhpl", key_RLHC, query_PHC, preferred_element_type=jnp.float32)
        rows_R1QL = rows_RQL[:, None]
        by_query_RHQL = jnp.take_along_axis(by_query_RHQP, rows_R1QL, axis=3)
        return by_query_RHQL + jnp.take_along_axis(by_key_RHPL, rows_R1QL, axis=2)


def drops_weights(config: TransformerConfig, keys_R: Array | None) -> bool:
    """Whether attention weights are dropped, which only the dense form does."""
    return keys_R is not None and config.attention_dropout > 0


class VectorAttention(nnx.Module):
    """``Attention`` to one vector: its weight is 1 whatever asks, so that queries and keys are left out."""

    def __init__(self, config: TransformerConfig):
        c = config
        self.config = c
        queries, keys = c.heads * c.head_dim, c.groups * c.head_dim
        self.value = Dense((c.width, keys), ("embed", "kv_heads"), kernel_init(c, c.width), bias=c.qkv_bias)
        self.out = Dense(
            (queries, c.width), ("heads", "embed"), kernel_init(c, queries, residual=True), bias=c.out_bias
        )

    def __call__(self, x: Array, memory: Array, sight: Sight, keys_R: Array | None, site: int) -> Array:
        """[R, Q, D] from what asks, ``x`` [R, Q, D], and what is looked at, ``memory`` [R, 1, D]."""
        del sight  # all see it
        c = self.config
        rows, queries = x.shape[:2]
        value_R1GC = self.value(memory).reshape(rows, 1, c.groups, c.head_dim)
        value_RQHC = jnp.repeat(value_R1GC, c.heads // c.groups, axis=2)
        if drops_weights(c, keys_R):
            ones_RHQ1 = jnp.ones((rows, c.heads, queries, 1), x.dtype)
            value_RQHC *= dropout(ones_RHQ1, keys_R, c.attention_dropout, site).swapaxes(1, 2)
        out_RQD = self.out(value_RQHC.reshape(rows, -1, c.heads * c.head_dim))
        return jnp.broadcast_to(out_RQD, x.shape)


def _norm_of_heads(config: TransformerConfig) -> Norm:
    return Norm(config.norm, config.head_dim, config.norm_epsilon, bias=False)


class MLP(nnx.Module):
    """The feed-forward sublayer, gated or not (GLU variants: Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: TransformerConfig):
        c = config
        self.config = c
        axes, init = ("embed", "mlp"), kernel_init(c, c.width)
        self.up = Dense((c.width, c.hidden), axes, init, bias=c.mlp_bias)
        self.gate = Dense((c.width, c.hidden), axes, init, bias=c.mlp_bias) if c.gated else None
        down = kernel_init(c, c.hidden, residual=True)
        self.down = Dense((c.hidden, c.width), ("mlp", "embed"), down, bias=c.mlp_bias)

    def __call__(self, x: Array, keys_R: Array | None, site: int) -> Array:
        """[R, L, D] from [R, L, D]."""
        activation = ACTIVATIONS[self.config.activation]
        if self.gate is None:
            hidden_RLF = activation(self.up(x))
        else:
            gate_RLF, up_RLF = project(x, self.gate, self.up)
            hidden_RLF = activation(gate_RLF) * up_RLF
        hidden_RLF = constrain(hidden_RLF, "batch", "length", "mlp")
        return self.down(dropout(hidden_RLF, keys_R, self.config.mlp_dropout, site))


class Block(nnx.Module):
    """One layer: attention, perhaps cross-attention, MLP; each normalised before or after, and added."""

    def __init__(self, config: TransformerConfig, *, cross_attention: CrossAttention, attention_norm: bool):
        self.config = config
        self.attention = Attention(config)
        self.attention_norm = config_norm(config, config.width) if attention_norm else None
        kind = VectorAttention if cross_attention == "vector" else Attention
        self.cross_attention = kind(config) if cross_attention else None
        self.cross_attention_norm = config_norm(config, config.width) if cross_attention else None
        self.mlp = MLP(config)
        self.mlp_norm = config_norm(config, config.width)

    def __call__(
        self,
        x: Array,
        sight: Sight,
        context: Array | None,
        context_sight: Sight | None,
        keys_R: Array | None,
        memory: Array | None = None,
    ) -> Array:
        """[R, L, D] from [R, L, D]; the attention also looks at ``memory`` [R, M, D], as it stood before the layer."""

        def add(x: Array, norm: Norm | None, sublayer: Callable[[Array], Array], site: int) -> Array:
            pre = self.config.norm_placement == "pre"
            y = sublayer(norm(x) if pre and norm is not None else x)
            x = x + dropout(y, keys_R, self.config.dropout, site)
            x = x if pre or norm is None else norm(x)
            return constrain(x, "batch", "length", None)

        def attention(y: Array) -> Array:
            if memory is None:
                return self.attention(y, y, sight, keys_R, 0)
            norm = self.attention_norm if self.config.norm_placement == "pre" else None
            before = memory if norm is None else norm(memory)
            return self.attention(y, jnp.concatenate([before.astype(y.dtype), y], axis=1), sight, keys_R, 0)

        x = add(x, self.attention_norm, attention, 1)
        cross = self.cross_attention
        if cross is not None:
            assert context is not None and context_sight is not None
            x = add(x, self.cross_attention_norm, lambda y: cross(y, context, context_sight, keys_R, 2), 3)
        return add(x, self.mlp_norm, lambda y: self.mlp(y, keys_R, 4), 5)
