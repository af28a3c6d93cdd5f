"""Masked diffusion: laws of the noise, the identity with all orders of writing, and blocks that never look ahead."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from influence import DECODER, influence
from support import packed_batch, tiny_vocab

from jaxpt.models.patterns import block_diffusion, visible
from jaxpt.objectives.masked_diffusion import MaskedDiffusion, cut, even_times, hide
from jaxpt.step import finish, make_eval_step, make_example
from jaxpt.types import Batch, Example, Out, Snapshot

VOCAB = tiny_vocab()
CONFIG = MaskedDiffusion(encoder=dataclasses.replace(DECODER, depth=1), packing="best_fit", bos=True)
NOISES = ("mdlm", "llada", "fixed_count")
BATCH = packed_batch(CONFIG.build(VOCAB).rows, VOCAB, length=32, size=64)
HIDEABLE = (BATCH.segment_ids > 0) & (BATCH.tokens != VOCAB.bos)
START = Snapshot({}, {}, jnp.int32(0))


def with_(**changes) -> MaskedDiffusion:
    return dataclasses.replace(CONFIG, **changes)


@functools.cache
def corruption(config: MaskedDiffusion):
    objective = config.build(VOCAB)
    return jax.jit(lambda batch, key: make_example(objective, START, batch, key))


def corrupted(config: MaskedDiffusion = CONFIG, seed: int = 0) -> Example:
    return jax.device_get(corruption(config)(BATCH, jax.random.key(seed)))


# -------------------------------------------------------------------------------------------- the noise


def test_constant_loss_c_has_the_expectation_c_or_less():
    """E[hidden * weight] at each t, over a grid of 2**16 bits: 1 - floor for MDLM, 1 for LLaDA and a fixed count."""
    size, floor = 2**16, 0.1
    bits = jnp.arange(size, dtype=jnp.uint32) << 16
    starts = jnp.arange(size) == 0
    weigh = jax.jit(hide, static_argnums=(0, 1))
    for noise, wanted in (("mdlm", 1 - floor), ("llada", 1.0), ("fixed_count", 1.0)):
        for time in (0.0, 0.3, 0.99):
            weights = weigh(noise, floor, bits, jnp.full(size, time), starts, jnp.ones(size, bool))
            assert float(weights.mean()) == pytest.approx(wanted, abs=2e-4), (noise, time)
            t = floor + (1 - floor) * time
            share = {"mdlm": (1 - floor) * t, "llada": t, "fixed_count": time}[noise]
            assert float((weights > 0).mean()) == pytest.approx(share, abs=1e-4), (noise, time)


def test_the_loss_is_that_of_all_orders_of_writing():
    """For any table of losses given what is seen: E_t = mean over all orders of autoregression = fixed count."""
    losses = np.random.default_rng(0).gamma(2.0, 1.0, (16, 4))  # [seen, token]

    def autoregression(order) -> float:
        seen = [sum(1 << token for token in order[:place]) for place in range(4)]
        return sum(losses[s, token] for s, token in zip(seen, order, strict=True))

    orders = list(itertools.permutations(range(4)))
    wanted = np.mean([autoregression(order) for order in orders])
    starts, every = jnp.array([True, False, False, False]), jnp.ones(4, bool)

    @functools.partial(jax.jit, static_argnums=0)
    def diffusion(noise, bits_N4, times_N):
        def one(bits, time):
            weights = hide(noise, 1e-3, bits, jnp.full(4, time), starts, every)
            seen = jnp.sum((weights == 0) << jnp.arange(4))
            return jnp.sum(weights * jnp.asarray(losses)[seen])

        return jax.vmap(one)(bits_N4, times_N)

    # a fixed count: every count with every order, so no sampling error
    bits, times = (jnp.asarray(x) for x in zip(*itertools.product(orders, (0.1, 0.3, 0.6, 0.9)), strict=True))
    assert float(diffusion("fixed_count", bits.astype(jnp.uint32), times).mean()) == pytest.approx(wanted, rel=1e-5)
    drawn = jax.random.bits(jax.random.key(0), (400_000, 4), jnp.uint32)
    times = even_times(jnp.uint32(77), jnp.arange(400_000, dtype=jnp.uint32))
    deviation = {}
    for noise in NOISES:
        sample = np.asarray(diffusion(noise, drawn, times), np.float64)
        deviation[noise] = sample.std()
        target = wanted * (1 - 1e-3 if noise == "mdlm" else 1)
        assert sample.mean() == pytest.approx(target, abs=4 * sample.std() / np.sqrt(len(sample))), noise
    assert deviation["fixed_count"] < 0.7 * min(deviation["mdlm"], deviation["llada"])


def test_times_are_spread_evenly():
    """Any N consecutive rows leave no gap of 2 / N; independent times leave one of about ln(N) / N."""

    def largest_gap(times) -> float:
        times = np.sort(np.asarray(times))
        return np.diff(np.append(times, times[0] + 1)).max()

    for size in (2, 3, 8, 13, 64, 500):
        for first in (0, 12345):
            numbers = (first + np.arange(size)).astype(np.uint32)
            times = even_times(jnp.uint32(1234567), numbers)
            assert times.min() >= 0 and times.max() < 1
            assert largest_gap(times) < 2 / size
    assert largest_gap(np.random.default_rng(0).random(500)) > 2 / 500
    shifted = even_times(jax.random.bits(jax.random.key(0), (4000, 1), jnp.uint32), jnp.arange(3, dtype=jnp.uint32))
    np.testing.assert_allclose(shifted.mean(0), 0.5, atol=4 * np.sqrt(1 / 12 / 4000))  # each of them uniform


def test_a_batch_holds_every_count():
    example = corrupted(with_(noise="fixed_count", packing="one_document"))
    sizes, hidden = HIDEABLE.sum(1), (example.weights["diffusion"] > 0).sum(1)
    assert (hidden >= 1).all() and (hidden <= sizes).all()
    times = (hidden - 0.5) / sizes  # as exact as a count tells
    assert np.diff(np.sort(times)).max() < 2 / 64 + 2 / sizes.min()
    np.testing.assert_allclose(example.weights["diffusion"].sum(1), sizes, rtol=1e-5)


# --------------------------------------------------------------------------------------- what is read, asked


@pytest.mark.parametrize("noise, block", [("mdlm", None), ("llada", 4), ("fixed_count", 4)])
def test_hidden_tokens_are_asked_and_the_others_stay(noise, block):
    config = with_(noise=noise, block=block)
    example = corrupted(config)
    inputs, weights = example.inputs, example.weights["diffusion"]
    hidden = weights > 0
    assert (inputs["tokens"] == np.where(hidden, VOCAB.mask, BATCH.tokens)).all()
    assert not (hidden & ~HIDEABLE).any(), "[BOS] and padding stay"
    assert hidden[BATCH.tokens == VOCAB.eos].any(), "the end is part of the text"
    assert (inputs["targets"] == np.where(HIDEABLE, BATCH.tokens, VOCAB.pad)).all()
    np.testing.assert_array_equal(example.counts["diffusion"], HIDEABLE.sum(1))  # all tokens, not the hidden ones
    units = np.zeros_like(BATCH.tokens) if block is None else BATCH.segment_ids * 100 + BATCH.positions // block
    for row in range(64):
        for unit in np.unique(units[row][HIDEABLE[row]]):
            of_unit = (units[row] == unit) & HIDEABLE[row]
            used = np.unique(weights[row][of_unit & hidden[row]])
            assert len(used) <= 1, "one time per unit"
            if noise == "fixed_count":
                assert weights[row][of_unit].sum() == pytest.approx(of_unit.sum(), rel=1e-5)
    fresh = corrupted(config, seed=1).weights["diffusion"]
    assert ((fresh > 0) != hidden).any()


def test_short_rows():
    """A share of .5, 64 rows of 5 steps: 4 standard errors are .11; lengths uniform on 1 .. 32."""
    kept = []
    for seed in range(5):
        example = corrupted(with_(short_rate=0.5), seed)
        segments = example.inputs["segment_ids"]
        np.testing.assert_array_equal(segments, np.where(np.cumsum(segments[:, ::-1], 1)[:, ::-1] > 0, segments, 0))
        assert (example.counts["diffusion"] == ((segments > 0) & HIDEABLE).sum(1)).all()
        kept.append((segments > 0).sum(1) / (BATCH.segment_ids > 0).sum(1))
    assert np.mean(np.concatenate(kept) < 1) == pytest.approx(0.5, abs=0.15)  # a few cuts fall into the padding
    bits = jax.random.bits(jax.random.key(0), (8000, 16), jnp.uint32)
    lengths = np.asarray(jax.vmap(lambda b: cut(b, jnp.ones(16, jnp.int32), 1.0).sum())(bits))
    np.testing.assert_allclose(np.bincount(lengths, minlength=17)[1:] / 8000, 1 / 16, atol=4 * np.sqrt(0.0586 / 8000))
    assert (corrupted().inputs["segment_ids"] == BATCH.segment_ids).all()


# ------------------------------------------------------------------------------------------- the loss


@functools.cache
def losses_of(config: MaskedDiffusion):
    objective = config.build(VOCAB)

    @jax.jit
    def run(params: dict, example: Example) -> Out:
        return objective.loss(Snapshot(params, {}, jnp.int32(0)), example, jax.random.split(jax.random.key(0), 64))

    return run


@functools.cache
def params_of(config: MaskedDiffusion) -> dict:
    params = jax.jit(config.build(VOCAB).init)(jax.random.key(3))
    return jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 1 else leaf, params)  # so that predictions differ


def test_mask_is_never_predicted():
    """Without [MASK]'s logit the others share its probability: p / (1 - p([MASK]))."""
    example, params = corrupted(), params_of(CONFIG)
    barred = losses_of(CONFIG)(params, example).losses["diffusion"]
    free = losses_of(with_(predict_mask=True))(params, example).losses["diffusion"]
    asked_for_mask = example._replace(inputs=example.inputs | {"targets": np.full_like(BATCH.tokens, VOCAB.mask)})
    of_mask = losses_of(with_(predict_mask=True))(params, asked_for_mask).losses["diffusion"]
    np.testing.assert_allclose(barred, free + np.log1p(-np.exp(-of_mask)), rtol=1e-4, atol=1e-5)
    assert (free - barred > 1e-3).any()
    assert np.isinf(losses_of(CONFIG)(params, asked_for_mask).losses["diffusion"]).all()


def test_metrics_are_those_of_the_bound():
    objective, params = CONFIG.for_evaluation().build(VOCAB), params_of(CONFIG)
    run = jax.jit(make_eval_step(objective, seed=0))
    some = BATCH._replace(valid=(np.arange(64) < 40).astype(np.float32))
    metrics, fewer = (
        {name: float(value) for name, value in finish(objective, run(params, {}, jnp.int32(0), batch)).items()}
        for batch in (BATCH, some)
    )
    for found in (metrics, fewer):  # of valid rows only
        assert found["nll"] == pytest.approx(found["loss/diffusion"], rel=1e-5)
        assert found["perplexity"] == pytest.approx(np.exp(found["nll"]), rel=1e-4)
        assert 0.3 < found["hidden"] < 0.7
        assert 0 <= found["accuracy"] <= 1
    sums = run(params, {}, jnp.int32(0), BATCH).stats
    assert float(sums["tokens"]) == HIDEABLE.sum()
    assert float(sums["bytes"]) == VOCAB.token_bytes[BATCH.tokens][HIDEABLE].sum()
    config = with_(noise="llada", short_rate=0.01).for_evaluation()
    assert (config.noise, config.short_rate) == ("fixed_count", 0.0)


# -------------------------------------------------------------------------------------------- blocks


def blocks_of(batch: Batch, row: int, block: int) -> np.ndarray:
    return batch.segment_ids[row] * 100 + batch.positions[row] // block


def test_a_noisy_block_reads_itself_and_the_clean_blocks_before_it():
    """Through three layers of a network, token by token, in a row of packed documents."""
    row, block = 0, 4
    segments, positions = BATCH.segment_ids[row : row + 1], BATCH.positions[row : row + 1]
    pattern = block_diffusion(jnp.asarray(segments), jnp.asarray(positions), block)
    tokens = np.concatenate([BATCH.tokens[row], BATCH.tokens[row]])
    reached = influence(tokens, pattern, np.concatenate([positions[0], positions[0]]))  # [changed, place]
    at = blocks_of(BATCH, row, block)
    same, text = at[:, None] == at, segments[0][:, None] == segments[0]
    earlier = text & (at[:, None] < at)  # [changed, place]
    np.testing.assert_array_equal(reached[:32, :32], same)
    np.testing.assert_array_equal(reached[32:, :32], earlier)
    np.testing.assert_array_equal(reached[32:, 32:], same | earlier)
    assert not reached[:32, 32:].any(), "nothing clean sees anything noisy"


def test_no_answer_leaks_through_the_clean_copy():
    """Changing a clean token changes the losses of later blocks of its document, and no other loss at all."""
    config = with_(block=4)
    example, params = corrupted(config), params_of(CONFIG)
    before = np.asarray(losses_of(config)(params, example).losses["diffusion"])
    clean = example.inputs["clean"].copy()
    clean[:, 5] = 10 + (clean[:, 5] + 7) % 40
    after = np.asarray(
        losses_of(config)(params, example._replace(inputs=example.inputs | {"clean": clean})).losses["diffusion"]
    )
    changed, blocks = before != after, BATCH.segment_ids * 100 + BATCH.positions // 4
    later = (BATCH.segment_ids == BATCH.segment_ids[:, 5:6]) & (blocks > blocks[:, 5:6])
    assert not (changed & ~later).any()
    assert changed.sum() > 0.8 * later.sum() > 0  # a change may vanish in the rounding


def test_one_block_is_plain_diffusion_and_blocks_of_one_token_are_autoregressive():
    params, plain = params_of(CONFIG), corrupted(CONFIG)
    wide = with_(block=32)
    as_block = plain._replace(inputs=plain.inputs | {"clean": BATCH.tokens})
    want, got = losses_of(CONFIG)(params, plain), losses_of(wide)(params, as_block)
    text = BATCH.segment_ids > 0
    np.testing.assert_allclose(got.losses["diffusion"][text], want.losses["diffusion"][text], rtol=1e-4, atol=1e-5)
    single = corrupted(with_(block=1, noise="fixed_count"))
    np.testing.assert_array_equal(single.weights["diffusion"], HIDEABLE)
    seen = np.asarray(visible(block_diffusion(jnp.ones((1, 5), int), jnp.arange(5)[None], 1)))[0, :5]
    np.testing.assert_array_equal(seen, np.concatenate([np.eye(5), np.tri(5, k=-1)], 1))


# ------------------------------------------------------------------------------------------- to a person


@pytest.mark.parametrize("block", [None, 4])
def test_views_show_what_is_read_and_asked(block):
    config = with_(block=block)
    example, views = corrupted(config), config.build(VOCAB).views
    assert views is not None
    text = views(START, example)["text"]
    assert text.tokens.shape == text.segment_ids.shape == text.positions.shape == (64, 32 if block is None else 64)
    assert text.pattern is not None and text.pattern.query_ranks.shape == text.tokens.shape
    np.testing.assert_array_equal(text.tokens[:, :32], example.inputs["tokens"])
    np.testing.assert_array_equal(text.weights, example.weights["diffusion"])


def test_what_cannot_be_is_refused():
    for changes, message in (
        ({"floor": 0.0}, r"floor is a share in \(0, 1\), not 0"),
        ({"short_rate": 1.5}, "short_rate is a share"),
        ({"block": 0}, "block is a number of tokens, not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            with_(**changes).build(VOCAB)
    with pytest.raises(ValueError, match=r"\[MASK\]"):
        CONFIG.build(dataclasses.replace(VOCAB, mask=None))
    learned = dataclasses.replace(CONFIG.encoder, positions="learned", max_length=40)
    objective = with_(encoder=learned, block=4).build(VOCAB)
    with pytest.raises(ValueError, match="rows of 64 tokens"):  # twice 32
        jax.eval_shape(lambda: make_example(objective, START, BATCH, jax.random.key(0)))
