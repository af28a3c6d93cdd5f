"""Transformer-XL's positions and memory: both streams of XLNet equal those of Hugging Face Transformers, recorded."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpt.losses.cross_entropy import logits_of
from jaxpt.models import presets
from jaxpt.models.config import TransformerConfig
from jaxpt.models.distances import sines_of_distances
from jaxpt.models.heads import lm_head
from jaxpt.models.patterns import bidirectional
from jaxpt.models.transformer import embedding_table, transformer
from jaxpt.objectives.permutation_lm import pattern_of
from jaxpt.types import Array, AttentionPattern

VOCAB, MASK = 61, 6
CONFIG = presets.xlnet("base", depth=3, width=32, heads=4, mlp_width=48)
NAMES = {
    "rel_attn.q": "attention/query/kernel", "rel_attn.k": "attention/key/kernel",
    "rel_attn.v": "attention/value/kernel", "rel_attn.o": "attention/out/kernel",
    "rel_attn.r": "attention/relative/project/kernel",
    "rel_attn.r_w_bias": "attention/relative/content", "rel_attn.r_r_bias": "attention/relative/distance",
    "rel_attn.layer_norm.weight": "attention_norm/scale", "rel_attn.layer_norm.bias": "attention_norm/bias",
    "ff.layer_norm.weight": "mlp_norm/scale", "ff.layer_norm.bias": "mlp_norm/bias",
    "ff.layer_1.weight": "mlp/up/kernel", "ff.layer_1.bias": "mlp/up/bias",
    "ff.layer_2.weight": "mlp/down/kernel", "ff.layer_2.bias": "mlp/down/bias",
}  # fmt: skip


@functools.cache
def recorded() -> dict[str, np.ndarray]:
    return dict(np.load(Path(__file__).parent / "xlnet.npz"))


def weights() -> dict:
    """Their weights in our tree; their query vector stands in the table, as [MASK]."""
    theirs = {name.removeprefix("weights/"): x for name, x in recorded().items() if name.startswith("weights/")}
    theirs = {name: x.astype(np.float32) for name, x in theirs.items()}
    table = theirs["transformer.word_embedding.weight"]
    table[MASK] = theirs["transformer.mask_emb"].ravel()
    params: dict = {"embed": {"tokens": table}, "head": {"bias": theirs["lm_loss.bias"]}, "layers": {}}
    for theirs_name, path in NAMES.items():
        layers = [theirs[f"transformer.layer.{i}.{theirs_name}"] for i in range(3)]
        if theirs_name.startswith("ff.layer_") and layers[0].ndim == 2:
            layers = [layer.T for layer in layers]
        elif theirs_name == "rel_attn.o":
            layers = [layer.reshape(32, 32).T for layer in layers]  # [width, heads, head]
        elif layers[0].ndim == 3:
            layers = [layer.reshape(32, 32) for layer in layers]
        *folders, name = path.split("/")
        tree = params["layers"]
        for folder in folders:
            tree = tree.setdefault(folder, {})
        tree[name] = np.stack([layer if layer.ndim == 2 and "kernel" in path else layer.ravel() for layer in layers])
    return params


def with_memory(pattern: AttentionPattern, size: int) -> AttentionPattern:
    """The pattern of a row whose first document began ``size`` tokens before it."""
    rows = pattern.key_segments.shape[0]
    before = jnp.broadcast_to(jnp.arange(-size, 0), (rows, size))
    join = lambda memory, keys: jnp.concatenate([memory, keys], axis=1)  # noqa: E731
    return pattern._replace(
        key_segments=join(jnp.ones_like(before), pattern.key_segments),
        key_ranks=join(jnp.full_like(before, -1), pattern.key_ranks),
        key_positions=join(before, pattern.key_positions),
    )


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_both_streams_equal_transformers(layers: str):
    kept = recorded()
    config = dataclasses.replace(CONFIG, layers=layers)
    network, head = transformer(config, VOCAB), lm_head(config, VOCAB)
    shapes = jax.eval_shape(lambda key: network.init(key) | {"head": head.init(key)}, jax.random.key(0))
    params = jax.tree.map(lambda x, s: jnp.asarray(x).reshape(s.shape), weights(), shapes)
    tokens, targets, length = kept["tokens"], kept["targets"], kept["tokens"].shape[1]
    places = np.broadcast_to(np.arange(length), tokens.shape)
    arrays = (jnp.asarray(x) for x in (places, kept["ranks"], targets, np.ones_like(targets) > 0))
    pattern = pattern_of(jnp.ones_like(tokens), *arrays)
    positions = np.concatenate([places, targets], axis=1)
    read = np.concatenate([tokens, np.full_like(targets, MASK)], axis=1)

    @functools.partial(jax.jit, static_argnums=1)
    def run(params: dict, inputs: bool) -> tuple[Array, Array, Array]:
        body = {name: tree for name, tree in params.items() if name != "head"}
        more = {"return_inputs": slice(0, length)} if inputs else {"return_layers": True}
        arrays = jnp.asarray(read), with_memory(pattern, 5), jnp.asarray(positions)
        hidden, states = network.apply(body, *arrays, memory=jnp.asarray(kept["memory"]), **more)
        return hidden, states, logits_of(head.apply(params["head"], hidden[:, length:], embedding_table(body)))

    hidden, states, logits = run(params, False)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    close(states[:, :, :length], kept["content"][1:])
    close(states[:, :, length:], kept["queries"][1:])
    close(hidden[:, length:], kept["queries"][-1])
    ordinary = np.arange(VOCAB) != MASK  # whose row is theirs of another name
    close(logits[..., ordinary], kept["logits"][..., ordinary])
    close(run(params, True)[1], kept["content"][:-1])  # what the layers read is the memory of the next row


def test_distances_have_their_sines():
    vectors = np.asarray(sines_of_distances(3, 6))
    frequencies = 10_000.0 ** (-np.arange(0, 6, 2) / 6)
    for row, distance in zip(vectors, range(-3, 4), strict=True):
        want = np.concatenate([np.sin(distance * frequencies), np.cos(distance * frequencies)])
        np.testing.assert_allclose(row, want, atol=1e-6)


TINY = TransformerConfig(depth=2, width=16, heads=2, positions="transformer_xl", relative_distance=64)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_memory_stands_for_the_tokens_before(placement: str):
    """The second half of a row, given what the layers read of the first, is what it is in the whole row."""
    network = transformer(dataclasses.replace(TINY, norm_placement=placement), VOCAB)
    params = jax.jit(network.init)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, VOCAB)
    places = jnp.broadcast_to(jnp.arange(12), (2, 12))
    halves = places // 6  # the first does not see the second
    whole = bidirectional(jnp.ones_like(places), places)._replace(query_ranks=halves, key_ranks=halves, order=None)
    second = bidirectional(jnp.ones((2, 6), int), places[:, :6])._replace(order=None)

    @jax.jit
    def run(params: dict) -> tuple[Array, Array, Array]:
        want, first = network.apply(params, tokens, whole, places, return_inputs=slice(0, 6))
        got = network.apply(params, tokens[:, 6:], with_memory(second, 6), places[:, :6], memory=first)
        return want, got, network.apply(params, tokens[:, 6:], second, places[:, :6])

    want, got, alone = run(params)
    np.testing.assert_allclose(got, want[:, 6:], rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(alone - got)).max() > 1e-4, "the memory matters"


def test_only_relative_positions_take_a_memory():
    network = transformer(dataclasses.replace(TINY, positions="rotary"), VOCAB)
    tokens = jnp.zeros((1, 4), int)
    pattern = bidirectional(jnp.ones((1, 4), int), jnp.arange(4)[None])
    with pytest.raises(ValueError, match="cannot tell how far a memory is"):
        network.apply(network.init(jax.random.key(0)), tokens, pattern, tokens, memory=jnp.zeros((2, 1, 3, 16)))
