"""TSDAE: which words are read, one vector between encoder and decoder, who owns which parameters."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import packed_batch, tiny_vocab

from jaxpt.losses.cross_entropy import linear_cross_entropy
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import mlm_head
from jaxpt.models.patterns import causal, cross
from jaxpt.models.transformer import embedding_table, transformer
from jaxpt.objectives.causal_lm import next_tokens
from jaxpt.objectives.tsdae import TSDAE, draw_words_kept
from jaxpt.step import make_eval_step, make_example
from jaxpt.types import Batch, Snapshot

VOCAB = tiny_vocab()
ENCODER = TransformerConfig(depth=1, width=16, heads=2, layers="unroll")
CONFIG = TSDAE(encoder=ENCODER, gap=True)
APART = dataclasses.replace(CONFIG, tied=False)
BATCH = packed_batch(CONFIG.build(VOCAB).rows, VOCAB, length=16)


@functools.cache
def compiled(config: TSDAE):
    """(params, batch, key) -> (example, out, gradient of the summed losses)."""
    objective = config.build(VOCAB)

    @jax.jit
    def run(params: dict, batch: Batch, key: jax.Array):
        example = make_example(objective, Snapshot(params, {}, jnp.int32(0)), batch, key)

        def total(params: dict):
            keys = jax.random.split(key, len(batch.tokens))
            out = objective.loss(Snapshot(params, {}, jnp.int32(0)), example, keys)
            return jnp.sum(out.losses["lm"] * example.weights["lm"]), out

        gradient, out = jax.grad(total, has_aux=True)(params)
        return example, out, gradient

    return run


@functools.cache
def params() -> dict:
    made = jax.jit(CONFIG.build(VOCAB).init)(jax.random.key(3))
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, made)  # so that vectors matter


def run(config: TSDAE = CONFIG, given: dict | None = None, seed: int = 0):
    return jax.device_get(compiled(config)(given or params(), BATCH, jax.random.key(seed)))


def test_two_words_of_five_are_read():
    """Of 50 words 20.0 +- 0.1 over 10,000 draws, whole ones; of all left out one stays; [UNK] always does."""
    ordinary = np.flatnonzero(~VOCAB.is_special)
    starts, goes_on = ordinary[VOCAB.starts_word[ordinary]], ordinary[~VOCAB.starts_word[ordinary]]
    tokens = np.zeros(80, np.int32)
    tokens[:75:3], tokens[1:75:3], tokens[2:75:3] = starts[0], goes_on[0], starts[1]  # 50 words, half of two tokens
    tokens[75] = VOCAB.unk
    draw = jax.jit(
        jax.vmap(lambda key, ratio: draw_words_kept(key, tokens, (tokens > 0).astype(int), ratio, VOCAB), (0, None))
    )
    keys = jax.random.split(jax.random.key(0), 10_000)
    kept = np.asarray(draw(keys, 0.6))
    words = kept[:, :75][:, VOCAB.starts_word[tokens[:75]]]
    assert words.shape == (10_000, 50) and abs(words.sum(1).mean() - 20.0) < 0.1
    np.testing.assert_allclose(words.mean(0), 0.4, atol=4.5 * np.sqrt(0.24 / 10_000))
    assert words.sum(1).var() == pytest.approx(50 * 0.24, rel=0.1)
    assert (kept[:, 0:75:3] == kept[:, 1:75:3]).all() and kept[:, 75].all() and not kept[:, 76:].any()
    one = np.asarray(draw(keys, 1.0))[:, :75][:, VOCAB.starts_word[tokens[:75]]]
    assert (one.sum(1) == 1).all()
    np.testing.assert_allclose(one.mean(0), 0.02, atol=4.5 * np.sqrt(0.02 / 10_000))
    assert np.asarray(draw(keys[:10], 0.0))[:, :76].all()


def test_what_is_read_and_written():
    """[CLS] what is left [SEP] is read; the text and [SEP] are written from [CLS] on; the draw is fresh."""
    inputs, weights = run()[0].inputs, run()[0].weights["lm"]
    for row in range(8):
        text = BATCH.tokens[row][BATCH.segment_ids[row] > 0].tolist()
        read = inputs["tokens"][row][inputs["segment_ids"][row] > 0].tolist()
        assert read[0] == VOCAB.cls and read[-1] == VOCAB.sep and 2 < len(read) <= len(text) + 2
        rest = iter(text)
        assert all(token in rest for token in read[1:-1])
        heard = inputs["decoder_tokens"][row][weights[row] > 0].tolist()
        assert heard == [VOCAB.cls, *text] and inputs["targets"][row][weights[row] > 0].tolist() == [*text, VOCAB.sep]
    assert (run(seed=1)[0].inputs["tokens"] != inputs["tokens"]).any(1).sum() > 4


def test_attention_to_one_vector_needs_no_queries_and_no_keys():
    """The whole attention gives the same, also under dropout of its weights, and no gradient reaches W_q and W_k."""
    config = dataclasses.replace(ENCODER, dropout=0.1, attention_dropout=0.5, kv_heads=1)
    one, whole = (transformer(config, VOCAB.size, cross_attention=kind) for kind in ("vector", True))
    full = jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, jax.jit(whole.init)(jax.random.key(0)))
    lean = full | {"layers": dict(full["layers"])}
    lean["layers"]["cross_attention"] = {name: full["layers"]["cross_attention"][name] for name in ("value", "out")}
    ones, places = jnp.ones((8, 16), jnp.int32), jnp.broadcast_to(jnp.arange(16), (8, 16))
    vectors = jax.random.normal(jax.random.key(1), (8, 1, 16))

    def apply(network, params, keys):
        return network.apply(
            params, places + 7, causal(ones, places), places, keys=keys,
            context=vectors, context_pattern=cross(ones, places, ones[:, :1], ones[:, :1]),
        )  # fmt: skip

    @jax.jit
    def both(full, lean):
        keys = jax.random.split(jax.random.key(2), 8)
        some = lambda full: jnp.sum(apply(whole, full, None)[..., 0])  # noqa: E731
        return apply(whole, full, keys), apply(one, lean, keys), jax.grad(some)(full)["layers"]["cross_attention"]

    want, got, grads = both(full, lean)
    assert np.isfinite(want).all()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    still = {name for name, tree in grads.items() if all((leaf == 0).all() for leaf in jax.tree.leaves(tree))}
    assert still == {"query", "key"}
    assert jax.tree.structure(lean) == jax.tree.structure(one.specs, is_leaf=lambda leaf: hasattr(leaf, "role"))


def test_without_the_vector_it_is_a_language_model():
    """W_v = 0 as s = 0: the loss is that of the encoder's own layers under a causal pattern, whatever was read."""
    deaf = params() | {"cross": jax.tree.map(lambda leaf: leaf, params()["cross"])}
    deaf["cross"]["cross_attention"]["value"]["kernel"] *= 0
    _, out, _ = run(given=deaf)
    whole = jax.device_get(run()[0]).inputs
    tokens, segment_ids = whole["decoder_tokens"], whole["decoder_segment_ids"]
    positions = np.maximum(np.cumsum(segment_ids, axis=1) - 1, 0) * segment_ids
    network, head = transformer(ENCODER, VOCAB.size), mlm_head(ENCODER, VOCAB.size)

    @jax.jit
    def language_model(params):
        hidden = network.apply(params["trunk"], tokens, causal(segment_ids, positions), positions)
        readout = head.apply(params["head"], hidden, embedding_table(params["trunk"]))
        return linear_cross_entropy(readout, next_tokens(tokens, segment_ids)[0]).loss

    asked = run()[0].weights["lm"] > 0
    np.testing.assert_allclose(out.losses["lm"][asked], language_model(deaf)[asked], rtol=1e-4, atol=1e-5)
    assert np.abs(run()[1].losses["lm"] - out.losses["lm"])[asked].max() > 0.1


def test_tied_parameters_are_one():
    """Their gradient is the sum of those of an encoder and a decoder with the same numbers."""
    assert set(CONFIG.build(VOCAB).specs) == {"trunk", "cross", "head"}
    assert set(APART.build(VOCAB).specs) == {"trunk", "decoder", "cross", "head"}
    _, out, tied = run()
    _, same, apart = run(APART, params() | {"decoder": params()["trunk"]})
    np.testing.assert_allclose(same.losses["lm"], out.losses["lm"], rtol=1e-5)
    added = jax.tree.map(np.add, apart["trunk"], apart["decoder"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), tied["trunk"], added)
    assert all((np.abs(leaf) > 0).any() for leaf in jax.tree.leaves(apart["trunk"]["layers"]["mlp"]))


def test_the_gap_is_what_the_vector_of_another_text_costs():
    judge = CONFIG.for_evaluation().build(VOCAB)
    step = jax.jit(make_eval_step(judge, seed=0))
    sums = step(params(), {}, jnp.int32(0), BATCH)
    deaf = params() | {"cross": jax.tree.map(jnp.zeros_like, params()["cross"])}
    assert step(deaf, {}, jnp.int32(0), BATCH).stats["gap"] == pytest.approx(0, abs=1e-3)
    assert abs(sums.stats["gap"]) > 0.1
    filled = BATCH._replace(valid=np.array([1, 1, 0, 0, 0, 0, 0, 0], np.float32))
    halved = step(params(), {}, jnp.int32(0), filled)  # row 0 follows a filler
    assert halved.stats["gap_tokens"] == (BATCH.segment_ids[1] > 0).sum() + 1
    # of a decoder that hears nothing it is 0 with dropout, too: neither side of it drops anything
    noisy = dataclasses.replace(CONFIG, encoder=dataclasses.replace(ENCODER, dropout=0.3)).build(VOCAB)
    sums = jax.jit(make_eval_step(noisy, seed=0))(deaf, {}, jnp.int32(0), BATCH)
    assert sums.stats["gap"] == pytest.approx(0, abs=1e-3)
    # of the vectors in another order, by hand: row 1 with the vector of row 0
    two = jax.tree.map(lambda leaf: leaf[:2], BATCH)
    objective = CONFIG.build(VOCAB)

    @jax.jit
    def swapped(params):
        snapshot = Snapshot(params, {}, jnp.int32(0))
        example = make_example(objective, snapshot, two, jax.random.key(0))
        keys = jax.random.split(jax.random.key(0), 2)
        read = {name: array[::-1] for name, array in example.inputs.items() if name in ("tokens", "segment_ids")}
        outs = [
            objective.loss(snapshot, example._replace(inputs=inputs), keys)
            for inputs in (example.inputs, example.inputs | read)
        ]
        gap = objective.couple(snapshot, outs[0].features, example)[1]["gap"]
        return gap, sum(outs[1].features["nll"]) - sum(outs[0].features["nll"])

    gap, want = swapped(params())
    assert gap == pytest.approx(float(want), rel=1e-3)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="delete_ratio is a share"):
        dataclasses.replace(CONFIG, delete_ratio=1.1).build(VOCAB)
    with pytest.raises(ValueError, match=r"needs a \[SEP\] token"):
        CONFIG.build(dataclasses.replace(VOCAB, sep=None))
