"""One Transformer (Vaswani et al. 2017, arXiv:1706.03762) for encoders, decoders and encoder-decoders."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpt.models.attention import choose, spell_out
from jaxpt.models.blocks import Block, CrossAttention, Sight, config_norm, drops_weights, kernel_init, table_init
from jaxpt.models.config import DENSE_ONLY, TransformerConfig
from jaxpt.models.distances import rows_of_distances, sines_of_distances
from jaxpt.models.layers import PRODUCT, Dense, dropout, fold_keys
from jaxpt.models.params import Declared, constrain, initializer_of, param, platform, specs_of, split, stacked
from jaxpt.models.positions import log_buckets, relative_buckets, rotary_angles
from jaxpt.types import Array, AttentionPattern, Network, Params, Tree

__all__ = ["TransformerConfig", "embedding_table", "transformer"]

EMBED_SITE = 2**31  # where the dropout of the embeddings folds in, in place of a layer's number
UNROLL_ON_CPU = 12  # layers: deeper stacks are scanned there too, or they would compile for minutes
POLICIES = {"dots": jax.checkpoint_policies.save_only_these_names(PRODUCT), "full": None}


# -------------------------------------------------------------------------------------- embeddings


class Embeddings(nnx.Module):
    """Tokens, positions and token types, added, normalised, dropped and projected as configured."""

    def __init__(self, config: TransformerConfig, vocab_size: int | None):
        c, width, init = config, config.embedding, table_init(config)
        self.config = c
        self.tokens = param((vocab_size, width), ("vocab", "embed"), "embedding", init) if vocab_size else None
        rows = c.max_length + c.position_offset
        learned = c.positions == "learned"
        self.positions = param((rows, width), (None, "embed"), "embedding", init) if learned else None
        self.token_types = param((c.token_types, width), (None, "embed"), "embedding", init) if c.token_types else None
        self.norm = config_norm(c, width) if c.embedding_norm else None
        project = width != c.width
        axes = (None, "embed")
        self.project = Dense((width, c.width), axes, kernel_init(c, width), bias=True) if project else None

    def __call__(
        self, tokens: Array, positions: Array, token_types: Array | None, table: Array | None, keys_R: Array | None
    ) -> Array:
        c = self.config
        table = table if self.tokens is None else self.tokens[...]
        x = tokens
        if not jnp.issubdtype(tokens.dtype, jnp.floating):
            assert table is not None, "a network without a token table needs `table`"
            # Tables are split over fsdp by width, and so are rows: gather a table before it is read, as any kernel is.
            x = jnp.take(constrain(table, "vocab", None), tokens, axis=0)
        if c.embed_scale:
            x *= c.embedding**0.5
        if self.positions is not None:
            x += jnp.take(constrain(self.positions[...], None, None), positions + c.position_offset, axis=0)
        elif c.positions == "sinusoidal":
            x += sinusoids(positions, c.embedding)
        if self.token_types is not None:
            types = jnp.zeros_like(positions) if token_types is None else token_types
            x += jnp.take(constrain(self.token_types[...], None, None), types, axis=0)
        x = x if self.norm is None else self.norm(x)
        x = dropout(x, keys_R, c.dropout, 0).astype(c.dtype)
        x = x if self.project is None else self.project(x)
        return constrain(x, "batch", "length", None)


def sinusoids(positions: Array, width: int) -> Array:
    """Sines at the even and cosines at the odd places, of wavelengths from 2 pi to 20,000 pi.

    Args:
      positions: [R, L] i32.
      width: of the embedding.

    Returns:
      [R, L, width] f32.
    """
    frequency = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(*positions.shape, -1)[..., :width]


class Outer(nnx.Module):
    """Everything of a network but its layers."""

    def __init__(self, config: TransformerConfig, vocab_size: int | None):
        self.embed = Embeddings(config, vocab_size)
        shape, axes = (config.relative_buckets, config.heads), (None, "heads")
        relative = config.positions == "relative"
        self.relative = param(shape, axes, "embedding", kernel_init(config, config.width)) if relative else None
        apart = config.positions == "disentangled"
        shape, init = (2 * config.relative_buckets, config.width), table_init(config)
        self.distances = param(shape, (None, "embed"), "embedding", init) if apart else None
        self.distances_norm = config_norm(config, config.width) if apart else None
        self.final_norm = config_norm(config, config.width) if config.final_norm else None


def embedding_table(params: Params) -> Array:
    """The token table [V, E] of a network's parameters, for a head that is tied to it."""
    return params.get("encoder", params)["embed"]["tokens"]


# ----------------------------------------------------------------------------------------- network


def transformer(
    config: TransformerConfig, vocab_size: int | None, *, cross_attention: CrossAttention = False
) -> Network:
    """A stack of layers from tokens to hidden states.

    ``apply(params, tokens_RL, pattern, positions_RL, *, token_types=None, keys=None, context=None,
    context_pattern=None, table=None, memory=None, return_layers=False, return_inputs=None,
    embedding_mask=None)`` returns hidden [R, L, D] after the final norm, in ``config.dtype``; with ``return_layers``
    also what every layer gave, [N, R, L, D]; with ``return_inputs``, a slice of places, what every layer read there,
    [N, R, places, D]. ``keys`` [R], typed, turn dropout on. ``memory`` [N, R, M, D] are such inputs of earlier tokens,
    that every layer looks at: they stand first among the keys of ``pattern``. ``embedding_mask``, which broadcasts to
    [R, L, D], is multiplied with what the first layer reads.

    Args:
      config: sizes and options.
      vocab_size: rows of the token table; None = the network owns none and reads ``table`` [V, E], or vectors [R, L, E]
        of any float type in place of the tokens.
      cross_attention: each layer also looks at ``context`` [R, K, D] through ``context_pattern``; "vector": K is 1.

    Example:
      >>> from jaxpt.models.patterns import causal
      >>> network = transformer(TransformerConfig(depth=2, width=8, heads=2), vocab_size=11)
      >>> params = network.init(jax.random.key(0))
      >>> tokens = jnp.array([[3, 1, 4, 1]])
      >>> places = jnp.arange(4)[None]
      >>> network.apply(params, tokens, causal(jnp.ones_like(tokens), places), places).shape
      (1, 4, 8)
    """
    if cross_attention and config.positions in DENSE_ONLY:
        raise ValueError(f'positions="{config.positions}" is for one stack: choose other positions for a decoder')
    outer = split(Outer(config, vocab_size))
    block = split(Block(config, cross_attention=cross_attention, attention_norm=True))
    first = split(Block(config, cross_attention=cross_attention, attention_norm=config.first_norm))
    layers = block.tree if config.shared_layers else stacked(block.tree, config.depth)
    if not config.first_norm:  # the stack of these norms is one shorter
        layers |= {"attention_norm": stacked(block.tree["attention_norm"], config.depth - 1)}
    tree = {**outer.tree, "layers": layers}
    return Network(specs_of(tree), initializer_of(tree), functools.partial(_apply, config, outer, block, first))


def _apply(
    config: TransformerConfig,
    outer: Declared[Outer],
    block: Declared[Block],
    first: Declared[Block],
    params: Params,
    tokens: Array,
    pattern: AttentionPattern,
    positions: Array,
    *,
    token_types: Array | None = None,
    keys: Array | None = None,
    context: Array | None = None,
    context_pattern: AttentionPattern | None = None,
    table: Array | None = None,
    memory: Array | None = None,
    return_layers: bool = False,
    return_inputs: slice | None = None,
    embedding_mask: Array | None = None,
) -> Any:
    if config.positions == "learned" and tokens.shape[1] > config.max_length:
        raise ValueError(
            f"rows of {tokens.shape[1]} tokens do not fit max_length {config.max_length}: raise max_length, "
            f'shorten the rows or choose positions="rotary"'
        )
    if memory is not None and config.positions != "transformer_xl":
        raise ValueError(f'positions="{config.positions}" cannot tell how far a memory is: set "transformer_xl"')
    module = outer.bind({name: value for name, value in params.items() if name != "layers"})
    sights = {window: _sight(config, module, pattern, positions, window, keys) for window in (None, config.window)}
    context_sight = None if context_pattern is None else Sight(context_pattern)

    def layer(x: Array, layer_params: Params, index: Array | int, past: Array | None, window: int | None) -> Array:
        declared = first if "attention_norm" not in layer_params else block
        layer_keys = fold_keys(keys, index)
        return declared.bind(layer_params)(x, sights[window], context, context_sight, layer_keys, past)

    x = module.embed(tokens, positions, token_types, table, fold_keys(keys, EMBED_SITE))
    if embedding_mask is not None:
        x *= embedding_mask.astype(x.dtype)
    keep: Callable[[Array, Array], Array] | None = None  # of what a layer read and gave
    if return_inputs is not None:
        keep = lambda read, gave: read[:, return_inputs]  # noqa: E731
    elif return_layers:
        keep = lambda read, gave: gave  # noqa: E731
    x, kept = _run_layers(config, layer, params["layers"], x, memory, keep)
    x = x if module.final_norm is None else module.final_norm(x)
    return x if keep is None else (x, kept)


def _sight(
    config: TransformerConfig,
    module: Outer,
    pattern: AttentionPattern,
    positions: Array,
    window: int | None,
    keys: Array | None,
) -> Sight:
    angles = bias = None
    if config.positions == "rotary":
        local = None if window is None else config.local_rope_theta
        angles = rotary_angles(positions, config.head_dim, config.rope_theta if local is None else local)
    if module.relative is not None:
        reach = config.relative_distance
        bucket = relative_buckets(
            jnp.arange(-reach, reach + 1),
            is_causal=config.relative_causal,
            buckets=config.relative_buckets,
            max_distance=reach,
        )
        bias = jnp.take(module.relative[...], bucket, axis=0)
        query = key = positions
        has_dropout = drops_weights(config, keys)
        if choose(config.attention, query, key, pattern, window, has_bias=True, has_dropout=has_dropout) == "dense":
            bias = spell_out(bias, pattern)
    distances = None
    if module.distances is not None and module.distances_norm is not None:
        reach = config.relative_distance
        buckets = jnp.asarray(log_buckets(config.relative_buckets, reach))
        distance_RQL = pattern.query_positions[:, :, None] - pattern.key_positions[:, None, :]
        rows_RQL = buckets[jnp.clip(distance_RQL, -reach, reach) + reach]
        distances = (module.distances_norm(constrain(module.distances[...], None, None)), rows_RQL)
    if config.positions == "transformer_xl":
        reach = min(config.relative_distance, pattern.key_positions.shape[1])
        distances = (sines_of_distances(reach, config.width), rows_of_distances(pattern, reach))
    return Sight(pattern, window, angles, bias, distances)


def _unrolled(config: TransformerConfig) -> bool:
    """Whether layers are written out one by one, about a quarter faster on a CPU, and compiled in bearable time."""
    if config.layers == "auto":
        return platform() == "cpu" and config.depth <= UNROLL_ON_CPU
    return config.layers == "unroll"


def _run_layers(
    config: TransformerConfig,
    layer: Callable[[Array, Params, Array | int, Array | None, int | None], Array],
    params: Params,
    x: Array,
    memory: Array | None,
    keep: Callable[[Array, Array], Array] | None,
) -> tuple[Array, Array | None]:
    """Run the layers: some unrolled, then a scan over periods of local and global ones, then the remainder.

    Inside a period every layer's window is static, as fast kernels need it. ``keep`` says what of a layer's input and
    output is returned, stacked.
    """
    lead = config.depth if _unrolled(config) else int(not config.first_norm)
    period = config.global_every or 1 if config.window is not None else 1
    periods = (config.depth - lead) // period
    scanned = periods * period
    rest = config.depth - lead - scanned
    outputs: list[Array] = []

    def one(
        x: Array, tree: Params, index: Array | int, past: Array | None, window: int | None, *, in_scan: bool
    ) -> tuple[Array, Array | None]:
        def run(x: Array, tree: Params, index: Array | int, past: Array | None) -> Array:
            return layer(x, tree, index, past, window)

        if config.remat != "none":
            run = jax.checkpoint(run, prevent_cse=not in_scan, policy=POLICIES[config.remat])
        y = run(x, tree, index, past)
        return y, None if keep is None else keep(x, y)

    def unrolled(x: Array, start: int, trees: list[Params]) -> Array:
        for index, tree in enumerate(trees, start):
            past = None if memory is None else memory[index]
            x, kept = one(x, tree, index, past, config.window_of(index), in_scan=False)
            if kept is not None:
                outputs.append(kept[None])
        return x

    def body(x: Array, xs: tuple[Params, Array, Array | None]) -> tuple[Array, Array | None]:
        given = []
        for place in range(period):
            tree, past = jax.tree.map(lambda leaf: leaf[place], (xs[0], xs[2]))  # noqa: B023
            tree = params if config.shared_layers else tree
            x, kept = one(x, tree, xs[1] + place, past, config.window_of(lead + place), in_scan=True)
            given.append(kept)
        return x, None if keep is None else jnp.stack(given)

    trees = [params] * config.depth
    group = None
    if not config.shared_layers:
        trees, group = _unstack(params, config, lead, scanned)
        group = jax.tree.map(lambda leaf: leaf.reshape(periods, period, *leaf.shape[1:]), group)
    x = unrolled(x, 0, trees[:lead])
    if periods:
        past = memory
        if past is not None:
            past = past[lead : lead + scanned].reshape(periods, period, *past.shape[1:])
        x, given = jax.lax.scan(body, x, (group, lead + period * jnp.arange(periods), past))
        if given is not None:
            outputs.append(given.reshape(scanned, *given.shape[2:]))
    x = unrolled(x, lead + scanned, trees[lead : lead + rest])
    return x, jnp.concatenate(outputs) if keep is not None else None


def _unstack(params: Params, config: TransformerConfig, lead: int, scanned: int) -> tuple[list[Params], Params]:
    """Single layers at both ends and the stack between them.

    One ``lax.split`` per leaf: its gradient is one concatenation, where slices would each add a padded stack.
    """

    def split_leaves(tree: Tree, sizes: list[int]) -> list[Tree]:
        leaves, structure = jax.tree.flatten(tree)
        parts = [jax.lax.split(leaf, sizes) for leaf in leaves]
        return [structure.unflatten([part[i] for part in parts]) for i in range(len(sizes))]

    sizes = [1] * lead + [scanned] + [1] * (config.depth - lead - scanned)
    if config.first_norm:
        trees = split_leaves(params, sizes)
    else:
        trees = split_leaves({name: tree for name, tree in params.items() if name != "attention_norm"}, sizes)
        norms = split_leaves(params["attention_norm"], sizes[1:])
        trees = [trees[0], *(tree | {"attention_norm": norm} for tree, norm in zip(trees[1:], norms, strict=True))]
    group = trees.pop(lead)
    return [jax.tree.map(lambda leaf: leaf[0], tree) for tree in trees], group
