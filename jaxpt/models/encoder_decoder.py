"""Encoder and decoder with one token table (T5, BART)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import jax

from jaxpt.models.config import TransformerConfig
from jaxpt.models.layers import fold_keys
from jaxpt.models.transformer import embedding_table, transformer
from jaxpt.types import Array, AttentionPattern, Key, Network, Params


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """The two stacks; the decoder's settings also hold for the head.

    Args:
      encoder: reads the inputs.
      decoder: reads what it has said so far, and the encoder's output in each layer.

    Raises:
      ValueError: the two do not fit together.
    """

    encoder: TransformerConfig
    decoder: TransformerConfig

    def __post_init__(self) -> None:
        """Refuse stacks that do not fit."""
        for name in ("width", "embedding"):
            ours, theirs = getattr(self.encoder, name), getattr(self.decoder, name)
            if ours != theirs:
                raise ValueError(
                    f"encoder and decoder need one width of layers and embeddings, not {ours} and {theirs}"
                )


def encoder_decoder(config: EncoderDecoderConfig, vocab_size: int) -> Network:
    """An encoder, a decoder that looks at it, and one token table for both.

    ``apply(params, inputs_RL, pattern, positions_RL, outputs_RK, output_pattern, output_positions_RK,
    cross_pattern, *, keys=None, return_layers=False)`` returns the decoder's hidden states [R, K, D];
    ``return_layers`` adds what the layers of both gave. ``patterns.cross`` makes the cross pattern.

    Args:
      config: of both stacks.
      vocab_size: rows of the token table.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxpt.models.patterns import bidirectional, causal, cross
      >>> stack = TransformerConfig(depth=1, width=8, heads=2)
      >>> network = encoder_decoder(EncoderDecoderConfig(stack, stack), vocab_size=11)
      >>> tokens, one, place = jnp.array([[3, 1, 4]]), jnp.ones((1, 3), int), jnp.arange(3)[None]
      >>> sights = bidirectional(one, place), causal(one, place), cross(one, place, one, place)
      >>> def run(key):
      ...     params = network.init(key)
      ...     return network.apply(params, tokens, sights[0], place, tokens, sights[1], place, sights[2])
      >>> jax.eval_shape(run, jax.random.key(0)).shape
      (1, 3, 8)
    """
    networks = {
        "encoder": transformer(config.encoder, vocab_size),
        "decoder": transformer(config.decoder, None, cross_attention=True),
    }

    def init(key: Key) -> Params:
        return {name: net.init(jax.random.fold_in(key, crc32(name.encode()))) for name, net in networks.items()}

    apply = functools.partial(_apply, networks["encoder"], networks["decoder"])
    return Network({name: net.specs for name, net in networks.items()}, init, apply)


def _apply(
    encoder: Network,
    decoder: Network,
    params: Params,
    inputs: Array,
    pattern: AttentionPattern,
    positions: Array,
    outputs: Array,
    output_pattern: AttentionPattern,
    output_positions: Array,
    cross_pattern: AttentionPattern,
    *,
    keys: Array | None = None,
    return_layers: bool = False,
) -> Any:
    encode = functools.partial(encoder.apply, params["encoder"], inputs, pattern, positions, keys=fold_keys(keys, 0))
    context, encoder_layers = encode(return_layers=True) if return_layers else (encode(), None)
    result = decoder.apply(
        params["decoder"],
        outputs,
        output_pattern,
        output_positions,
        keys=fold_keys(keys, 1),
        context=context,
        context_pattern=cross_pattern,
        table=embedding_table(params),
        return_layers=return_layers,
    )
    return (result[0], (encoder_layers, result[1])) if return_layers else result
