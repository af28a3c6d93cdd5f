"""What a Transformer is: one frozen dataclass of plain fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxpt.models.layers import Activation

Positions = Literal["learned", "sinusoidal", "rotary", "relative", "disentangled", "transformer_xl", "none"]
DENSE_ONLY = ("disentangled", "transformer_xl")  # positions whose scores no kernel makes


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and options of one stack of layers; ``presets`` holds the published ones.

    Args:
      depth: layers.
      width: of the residual stream.
      heads: query heads.
      kv_heads: key/value heads (grouped-query attention); None = ``heads``.
      head_width: None = ``width / heads``.
      mlp_width: None = ``4 * width``.
      embed_width: width of the embeddings, projected to ``width`` where it differs; None = ``width``.
      max_length: rows of a learned position table.
      norm_placement: "pre" normalises what a sublayer reads, "post" the sum after it.
      norm: LayerNorm or RMSNorm.
      norm_epsilon: added under the root.
      norm_bias: LayerNorm has a bias.
      embedding_norm: normalise the sum of the embeddings.
      first_norm: the first layer normalises what its attention reads ("pre" only; ModernBERT does not).
      final_norm: normalise the output ("pre" stacks need it).
      positions: how order enters: tables or sines that are added to the tokens, turned queries and keys, T5's bias by
        distance, or scores between tokens and distances, dense attention only: DeBERTa's ("disentangled") or
        Transformer-XL's ("transformer_xl").
      position_offset: rows of the learned table before position 0 (BART and RoBERTa keep 2).
      rope_theta: base of rotary positions.
      local_rope_theta: its value in layers with a window; None = ``rope_theta``.
      relative_buckets: of T5's relative positions; of DeBERTa's, for each direction.
      relative_distance: from which all distances share a bucket; Transformer-XL's are as long as this at most.
      relative_projections: DeBERTa's positions have query and key projections of their own; otherwise they share the
        tokens'.
      relative_causal: T5's decoder rule, which spends no bucket on later keys.
      activation: of the MLP and of prediction heads.
      gated: multiply the activation by a second projection (GeGLU, SwiGLU).
      qkv_bias: bias of the query, key and value projections.
      out_bias: bias of the attention's output projection.
      mlp_bias: bias of the MLP's projections.
      qk_norm: normalise queries and keys per head.
      window: in local layers, a token sees no further than this many positions; None = no local layers.
      global_every: with a window, layers 0, n, 2n, ... are global; 0 = none is.
      attention_scale: of the scores; None = ``head_width ** -0.5``.
      token_types: rows of the token type table, 0 = none.
      embed_scale: multiply token embeddings by ``embed_width ** 0.5``.
      shared_layers: one layer's parameters used ``depth`` times.
      tie_embeddings: the output projection is the token table.
      head_bias: bias of the dense layer of a masked-LM head.
      logits_bias: a bias per word on the logits.
      scale_logits: multiply what a tied output reads by ``width ** -0.5``.
      dropout: of embeddings and of what sublayers add.
      attention_dropout: of attention weights.
      mlp_dropout: of the MLP's hidden units.
      init: "normal" and "truncated_normal" (at two deviations) draw kernels and embeddings with deviation
        ``init_scale``; "fan_in" draws kernels with ``init_scale / sqrt(inputs)`` and embeddings with ``init_scale``.
      init_scale: see ``init``.
      scale_residual_init: divide what projects into the residual stream by ``sqrt(2 * depth)``.
      dtype: of activations and matmul operands; parameters, norms, softmax and logits are float32.
      remat: what the backward pass recomputes: nothing, all but matmul outputs, or whole layers.
      attention: how attention is computed: "dense" with the whole mask, "blockwise" in tiles, "splash" on TPU, "fused"
        on GPU; "auto" takes what is fastest for the length, the pattern and the platform. All agree to rounding.
      layers: run layers by a scan (compile time flat in depth) or unrolled (a quarter faster on a CPU); "auto"
        unrolls up to 12 layers on a CPU and scans everything else.

    Raises:
      ValueError: sizes that do not fit.
    """

    depth: int
    width: int
    heads: int
    kv_heads: int | None = None
    head_width: int | None = None
    mlp_width: int | None = None
    embed_width: int | None = None
    max_length: int = 512
    norm_placement: Literal["pre", "post"] = "pre"
    norm: Literal["layer", "rms"] = "layer"
    norm_epsilon: float = 1e-5
    norm_bias: bool = True
    embedding_norm: bool = False
    first_norm: bool = True
    final_norm: bool = True
    positions: Positions = "learned"
    position_offset: int = 0
    rope_theta: float = 10_000.0
    local_rope_theta: float | None = None
    relative_buckets: int = 32
    relative_distance: int = 128
    relative_projections: bool = False
    relative_causal: bool = False
    activation: Activation = "gelu"
    gated: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    window: int | None = None
    global_every: int = 0
    attention_scale: float | None = None
    token_types: int = 0
    embed_scale: bool = False
    shared_layers: bool = False
    tie_embeddings: bool = True
    head_bias: bool = True
    logits_bias: bool = False
    scale_logits: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    init: Literal["normal", "truncated_normal", "fan_in"] = "normal"
    init_scale: float = 0.02
    scale_residual_init: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["auto", "dense", "blockwise", "splash", "fused"] = "auto"
    layers: Literal["auto", "scan", "unroll"] = "auto"

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit."""
        for name in ("depth", "width", "heads", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not a multiple of heads {self.heads}: change one or set head_width"
            )
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.head_dim}")
        if self.positions == "relative" and self.relative_buckets < 4:
            raise ValueError(f"relative_buckets is {self.relative_buckets}; it must be at least 4")
        if self.positions in DENSE_ONLY:
            if self.attention not in ("auto", "dense"):
                raise ValueError(
                    f'attention="{self.attention}" cannot do {self.positions} positions, whose scores depend on what '
                    f'the tokens are: set attention="dense"'
                )
            if self.groups != self.heads:
                raise ValueError(f"{self.positions} positions need a key per query head: set kv_heads=None")
        if self.positions == "disentangled" and not 4 <= self.relative_buckets < self.relative_distance:
            raise ValueError("disentangled positions need 4 <= relative_buckets < relative_distance")
        if (self.window is not None and self.window < 0) or self.global_every < 0:
            raise ValueError("window and global_every must not be negative")
        if self.norm_placement == "post" and not self.first_norm:
            raise ValueError('first_norm=False needs norm_placement="pre"')
        if self.shared_layers and not self.first_norm:
            raise ValueError("shared layers are all alike: first_norm=False cannot be")
        for name in ("dropout", "attention_dropout", "mlp_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")

    @property
    def groups(self) -> int:
        """Key/value heads."""
        return self.kv_heads or self.heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.head_width or self.width // self.heads

    @property
    def hidden(self) -> int:
        """Width of the MLP."""
        return self.mlp_width or 4 * self.width

    @property
    def embedding(self) -> int:
        """Width of the embeddings."""
        return self.embed_width or self.width

    def window_of(self, layer: int) -> int | None:
        """The window of a layer, None where it is global."""
        is_global = self.global_every > 0 and layer % self.global_every == 0
        return None if is_global else self.window
