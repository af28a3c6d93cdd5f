"""Published models: their sizes and choices.

Each function takes a size and any fields to change, for example ``bert("mini", dtype="bfloat16")``. Changes of an
encoder-decoder go to both stacks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from jaxpt.models.config import TransformerConfig
from jaxpt.models.encoder_decoder import EncoderDecoderConfig

_BERT = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (12, 256, 4),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}
_ALBERT = {"base": (12, 768, 12), "large": (24, 1024, 16), "xlarge": (24, 2048, 16), "xxlarge": (12, 4096, 64)}
_DEBERTA_V3 = {"xsmall": (12, 384, 6), "small": (6, 768, 12), "base": (12, 768, 12), "large": (24, 1024, 16)}
_GPT2 = {"small": (12, 768, 12), "medium": (24, 1024, 16), "large": (36, 1280, 20), "xl": (48, 1600, 25)}
_BART = {"base": (6, 768, 12), "large": (12, 1024, 16)}
_VASWANI = {"base": (6, 512, 8), "big": (6, 1024, 16)}
_PEGASUS = {"base": (12, 768, 12), "large": (16, 1024, 16)}


def _shape(sizes: dict[str, tuple[int, int, int]], family: str, size: str) -> dict[str, Any]:
    _known(sizes, family, size)
    return dict(zip(("depth", "width", "heads"), sizes[size], strict=True))


def _known(sizes: dict[str, Any], family: str, size: str) -> None:
    if size not in sizes:
        raise ValueError(f"{family} has no size {size!r}: choose one of {', '.join(sizes)}")


def bert(size: str, **changes: Any) -> TransformerConfig:
    """BERT (Devlin et al. 2019, arXiv:1810.04805): tiny, mini (4 x 256), small (12 x 256), base, large.

    Example:
      >>> config = bert("mini", dtype="bfloat16")
      >>> config.depth, config.width, config.dtype
      (4, 256, 'bfloat16')
    """
    config = TransformerConfig(
        **_shape(_BERT, "bert", size),
        norm_placement="post",
        norm_epsilon=1e-12,
        embedding_norm=True,
        final_norm=False,
        token_types=2,
        logits_bias=True,
        dropout=0.1,
        attention_dropout=0.1,
        init="truncated_normal",
    )
    return replace(config, **changes)


def roberta(size: str, **changes: Any) -> TransformerConfig:
    """RoBERTa (Liu et al. 2019, arXiv:1907.11692): base, large."""
    _known({"base": None, "large": None}, "roberta", size)
    config = bert(size, norm_epsilon=1e-5, token_types=1, position_offset=2, init="normal")
    return replace(config, **changes)


def albert(size: str, **changes: Any) -> TransformerConfig:
    """ALBERT, second version (Lan et al. 2020, arXiv:1909.11942): base, large, xlarge, xxlarge."""
    config = bert(
        "base",
        **_shape(_ALBERT, "albert", size),
        embed_width=128,
        shared_layers=True,
        activation="gelu_tanh",
        dropout=0.0,
        attention_dropout=0.0,
    )
    return replace(config, **changes)


def electra(size: str, **changes: Any) -> TransformerConfig:
    """The discriminator of ELECTRA (Clark et al. 2020, arXiv:2003.10555): small, base, large."""
    _known({"small": None, "base": None, "large": None}, "electra", size)
    config = bert(size, embed_width=128 if size == "small" else None)
    return replace(config, **changes)


def electra_generator(size: str, **changes: Any) -> TransformerConfig:
    """The generator beside it: as deep, a quarter (small, large) or a third (base) as wide, heads of width 64."""
    discriminator = electra(size)
    width = {"small": 64, "base": 256, "large": 256}[size]
    config = replace(discriminator, width=width, heads=width // 64, embed_width=discriminator.embedding)
    return replace(config, **changes)


def deberta_v3(size: str, **changes: Any) -> TransformerConfig:
    """The discriminator of DeBERTaV3 (He et al. 2021, arXiv:2111.09543): xsmall, small, base, large.

    The generator beside it is as wide and half as deep. Unlike the original, no dropout on the table of distances.
    """
    config = bert(
        "base",
        **_shape(_DEBERTA_V3, "deberta_v3", size),
        norm_epsilon=1e-7,
        token_types=0,
        positions="disentangled",
        relative_buckets=256,
        relative_distance=512,
        init="normal",
    )
    return replace(config, **changes)


def xlnet(size: str, **changes: Any) -> TransformerConfig:
    """XLNet (Yang et al. 2019, arXiv:1906.08237): base, large.

    Its segment encodings are left out: where a token sees one text only, they add the same to all of its scores.
    """
    _known({"base": None, "large": None}, "xlnet", size)
    config = TransformerConfig(
        **_shape(_BERT, "xlnet", size),
        norm_placement="post",
        norm_epsilon=1e-12,
        final_norm=False,
        positions="transformer_xl",
        relative_distance=1024,
        activation="gelu_tanh",
        qkv_bias=False,
        out_bias=False,
        logits_bias=True,
        dropout=0.1,
        attention_dropout=0.1,
        mlp_dropout=0.1,
    )
    return replace(config, **changes)


def glm(size: str, **changes: Any) -> TransformerConfig:
    """GLM (Du et al. 2022, arXiv:2103.10360): base, large; the token types are the positions inside spans."""
    _known({"base": None, "large": None}, "glm", size)
    config = TransformerConfig(
        **_shape(_BERT, "glm", size),
        max_length=513,
        token_types=513,
        activation="gelu_tanh",
        dropout=0.1,
        attention_dropout=0.1,
        scale_residual_init=True,
    )
    return replace(config, **changes)


def gpt2(size: str, **changes: Any) -> TransformerConfig:
    """GPT-2 (Radford et al. 2019): small, medium, large, xl."""
    config = TransformerConfig(
        **_shape(_GPT2, "gpt2", size),
        max_length=1024,
        activation="gelu_tanh",
        dropout=0.1,
        attention_dropout=0.1,
        scale_residual_init=True,
    )
    return replace(config, **changes)


def llama(size: str, **changes: Any) -> TransformerConfig:
    """Llama: 1b (the shape of 3.2), 7b (of 2, arXiv:2307.09288), 8b (of 3, arXiv:2407.21783); rotary unscaled."""
    sizes: dict[str, dict[str, Any]] = {
        "1b": {"depth": 16, "width": 2048, "kv_heads": 8, "mlp_width": 8192, "tie_embeddings": True},
        "7b": {"depth": 32, "width": 4096, "kv_heads": 32, "mlp_width": 11008, "tie_embeddings": False},
        "8b": {"depth": 32, "width": 4096, "kv_heads": 8, "mlp_width": 14336, "tie_embeddings": False},
    }
    _known(sizes, "llama", size)
    config = TransformerConfig(
        **sizes[size],
        heads=32,
        max_length=4096 if size == "7b" else 8192,
        norm="rms",
        positions="rotary",
        rope_theta=10_000.0 if size == "7b" else 500_000.0,
        activation="silu",
        gated=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )
    return replace(config, **changes)


def modernbert(size: str, **changes: Any) -> TransformerConfig:
    """ModernBERT (Warner et al. 2024, arXiv:2412.13663): base, large."""
    sizes: dict[str, dict[str, Any]] = {
        "base": {"depth": 22, "width": 768, "heads": 12, "mlp_width": 1152},
        "large": {"depth": 28, "width": 1024, "heads": 16, "mlp_width": 2624},
    }
    _known(sizes, "modernbert", size)
    config = TransformerConfig(
        **sizes[size],
        max_length=8192,
        norm_bias=False,
        embedding_norm=True,
        first_norm=False,
        positions="rotary",
        rope_theta=160_000.0,
        local_rope_theta=10_000.0,
        window=64,
        global_every=3,
        gated=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        head_bias=False,
        logits_bias=True,
        init="truncated_normal",
        scale_residual_init=True,
    )
    return replace(config, **changes)


def vaswani(size: str, **changes: Any) -> EncoderDecoderConfig:
    """The first Transformer (Vaswani et al. 2017, arXiv:1706.03762): base, big."""
    stack = TransformerConfig(
        **_shape(_VASWANI, "vaswani", size),
        norm_placement="post",
        final_norm=False,
        positions="sinusoidal",
        activation="relu",
        embed_scale=True,
        dropout=0.1 if size == "base" else 0.3,
    )
    return _both(stack, stack, changes)


def t5(size: str, version: Literal["1.0", "1.1"] = "1.0", **changes: Any) -> EncoderDecoderConfig:
    """T5 (Raffel et al. 2020, arXiv:1910.10683), first or gated second version: small, base, large."""
    sizes = {
        "1.0": {"small": (6, 512, 8, 2048), "base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096)},
        "1.1": {"small": (8, 512, 6, 1024), "base": (12, 768, 12, 2048), "large": (24, 1024, 16, 2816)},
    }
    _known(sizes, "t5, by version,", version)
    _known(sizes[version], f"t5 {version}", size)
    depth, width, heads, mlp_width = sizes[version][size]
    first = version == "1.0"
    encoder = TransformerConfig(
        depth=depth,
        width=width,
        heads=heads,
        head_width=64,
        mlp_width=mlp_width,
        norm="rms",
        norm_epsilon=1e-6,
        positions="relative",
        activation="relu" if first else "gelu_tanh",
        gated=not first,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        attention_scale=1.0,
        tie_embeddings=first,
        scale_logits=first,
        dropout=0.1 if first else 0.0,
        attention_dropout=0.1 if first else 0.0,
        mlp_dropout=0.1 if first else 0.0,
        init="fan_in",
        init_scale=1.0,
    )
    return _both(encoder, replace(encoder, relative_causal=True), changes)


def bart(size: str, **changes: Any) -> EncoderDecoderConfig:
    """BART (Lewis et al. 2020, arXiv:1910.13461): base, large."""
    stack = TransformerConfig(
        **_shape(_BART, "bart", size),
        max_length=1024,
        norm_placement="post",
        embedding_norm=True,
        final_norm=False,
        position_offset=2,
        dropout=0.1,
        attention_dropout=0.1,
        mlp_dropout=0.1,
    )
    return _both(stack, stack, changes)


def pegasus(size: str, **changes: Any) -> EncoderDecoderConfig:
    """PEGASUS (Zhang et al. 2020, arXiv:1912.08777): base, large."""
    stack = TransformerConfig(
        **_shape(_PEGASUS, "pegasus", size),
        max_length=1024,
        positions="sinusoidal",
        activation="relu",
        embed_scale=True,
        dropout=0.1,
        attention_dropout=0.1,
        mlp_dropout=0.1,
    )
    return _both(stack, stack, changes)


def _both(encoder: TransformerConfig, decoder: TransformerConfig, changes: dict[str, Any]) -> EncoderDecoderConfig:
    return EncoderDecoderConfig(replace(encoder, **changes), replace(decoder, **changes))
