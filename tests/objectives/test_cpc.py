"""CPC: what a segment is, that nothing of the future is read, who is a candidate, and the bound on the information."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import tiny_vocab

from jaxpt.corruption.rows import row_keys
from jaxpt.losses.contrastive import info_nce
from jaxpt.models.config import TransformerConfig
from jaxpt.models.heads import predictions
from jaxpt.objectives.cpc import CPC, tell_apart
from jaxpt.step import batch_gradient, finish, make_example
from jaxpt.types import Batch, Snapshot, Sums

VOCAB = tiny_vocab()
NARROW = TransformerConfig(depth=1, width=16, heads=2, positions="rotary", layers="unroll")
CONFIG = CPC(encoder=NARROW, context=dataclasses.replace(NARROW, width=8), window=3, ahead=2, first_scale=1.0)
RNG = np.random.default_rng(0)


def batch_of(sizes: list[int], length: int = 12) -> Batch:
    """Rows of texts of so many tokens, no two of which are the same in a row; sentences of 2 tokens."""
    rows = len(sizes)
    tokens = np.stack([RNG.permutation(np.arange(7, 57))[:length] for _ in sizes]).astype(np.int32)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    inside = (places < np.array(sizes)[:, None]).astype(np.int32)
    ids, ones = np.arange(rows, dtype=np.uint32), np.ones(rows, np.float32)
    return Batch(tokens * inside, inside, places, places // 2 * inside, ids, np.zeros(rows, np.int32), ones)


BATCH = batch_of([12, 12, 11, 6, 12, 7])  # 4, 4, 3, 2, 4 and 2 whole windows of 3


@functools.cache
def params() -> dict:
    made = jax.jit(CONFIG.build(VOCAB).init)(jax.random.key(3))
    return jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf, made)


@functools.cache
def passes(config: CPC):
    objective = config.build(VOCAB)

    @jax.jit
    def run(params: dict, batch: Batch):
        snapshot = Snapshot(params, {}, jnp.int32(0))
        example = make_example(objective, snapshot, batch, jax.random.key(0))
        keys = row_keys(jax.random.key(0), example.row_ids)
        gradient = batch_gradient(objective, objective.specs, snapshot, example, keys, 1)
        losses, _ = objective.couple(snapshot, gradient.features, example)
        return example, gradient.features, losses["predictive"], gradient

    return run


def run(config: CPC = CONFIG, batch: Batch = BATCH, changes: dict | None = None):
    return jax.device_get(passes(config)(params() | (changes or {}), batch))


def texts_of(example, row: int) -> list[list[int]]:
    """The tokens of each segment of a row between [CLS] and [SEP]."""
    tokens, inside = example.inputs["tokens"][row], example.inputs["segment_ids"][row] > 0
    found = [text[there].tolist() for text, there in zip(tokens, inside, strict=True)]
    assert all(text[0] == VOCAB.cls and text[-1] == VOCAB.sep for text in found if text)
    return [text[1:-1] for text in found]


def test_segments_are_whole_windows_or_sentences():
    example = run()[0]
    tokens = BATCH.tokens.tolist()
    assert texts_of(example, 0) == [tokens[0][begin : begin + 3] for begin in (0, 3, 6, 9)]
    assert texts_of(example, 2) == [tokens[2][begin : begin + 3] for begin in (0, 3, 6)] + [[]]
    assert example.weights["predictive"][2].tolist() == [[1, 1], [1, 0], [0, 0], [0, 0]]
    assert example.weights["predictive"].sum() == 5 + 5 + 3 + 1 + 5 + 1
    objective = dataclasses.replace(CONFIG, segments="sentences").build(VOCAB)
    make = jax.jit(lambda batch: make_example(objective, Snapshot({}, {}, jnp.int32(0)), batch, jax.random.key(0)))
    assert texts_of(jax.device_get(make(BATCH)), 5) == [tokens[5][0:2], tokens[5][2:4], tokens[5][4:6], tokens[5][6:7]]


def test_nothing_of_the_future_is_read():
    """The gradient of what is said at t is 0 in the tokens of segments after t, exactly, and is not in those before."""
    objective = CONFIG.for_evaluation().build(VOCAB)

    @jax.jit
    def gradients(params: dict, example):
        def said(table, place):
            tables = params["trunk"] | {"embed": params["trunk"]["embed"] | {"tokens": table}}
            snapshot = Snapshot(params | {"trunk": tables}, {}, jnp.int32(0))
            features = objective.loss(snapshot, example, row_keys(jax.random.key(0), example.row_ids)).features
            return jnp.sum(features["predicted"][0, place] * jnp.arange(8))

        return jax.vmap(jax.grad(said), (None, 0))(params["trunk"]["embed"]["tokens"], jnp.arange(4))

    example = run()[0]
    found = gradients(params(), example)
    texts = texts_of(example, 0)
    for place in range(4):
        moves = [bool((found[place][np.array(text)] != 0).any()) for text in texts]
        assert moves == [before <= place for before in range(4)]
    # and each segment is read alone: other words in the third change its own vector and what is said from there on
    tokens = BATCH.tokens.copy()
    tokens[0, 6:9] = tokens[0, 8:5:-1]
    was, now = run()[1], run(batch=BATCH._replace(tokens=tokens))[1]
    assert (was["segments"][0] != now["segments"][0]).any(-1).tolist() == [False, False, True, False]
    assert (was["predicted"][0] != now["predicted"][0]).any((-2, -1)).tolist() == [False, False, True, True]


PRESENT = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
apart = jax.jit(tell_apart, static_argnums=0)


@pytest.mark.parametrize("candidates", ["all", "batch", "same_doc"])
def test_the_loss_is_a_cross_entropy_among_the_candidates(candidates):
    """And ln N exactly of predictions that know nothing, where N counts the right one and no empty place."""
    predicted, segments = RNG.normal(size=(3, 4, 2, 5)), RNG.normal(size=(3, 4, 5))
    made, number = apart(candidates, predicted, segments, PRESENT)
    nothing, _ = apart(candidates, predicted * 0, segments, PRESENT)
    number = np.broadcast_to(number, (3, 4, 2))
    seen = 0
    for row, place, k in np.ndindex(3, 4, 2):
        at = place + 1 + k
        if at > 3 or not PRESENT[row, at]:
            continue
        among = [
            (r, s)
            for r, s in np.ndindex(3, 4)
            if PRESENT[r, s] and {"all": True, "batch": s == at, "same_doc": r == row}[candidates]
        ]
        logits = np.array([segments[each] @ predicted[row, place, k] for each in among])
        right = among.index((row, at))
        want = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), right)
        assert made.loss[row, place, k] == pytest.approx(float(want), rel=1e-4, abs=1e-5)
        assert made.correct[row, place, k] == (logits.argmax() == right)
        assert number[row, place, k] == len(among)
        assert nothing.loss[row, place, k] == pytest.approx(math.log(len(among)), abs=1e-6)
        seen += 1
    assert seen == 9


def test_the_similarities_of_all_places_are_never_there_at_once():
    """With 5,500 rows, one place with 2 predictions of it asks for 231 MiB of similarities, and is cut into blocks."""

    def loss(*vectors: jax.Array) -> jax.Array:
        return tell_apart("batch", *vectors, jnp.ones((5500, 8)))[0].loss.sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5500, 8, 2, 4), (5500, 8, 4))]
    memory = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 450 * 2**20


def test_what_is_lost_is_told():
    """Of five documents two have one whole window only; of their 23 sentences two have one token, and fit into it."""
    batch = batch_of([12, 12, 11, 5, 4, 0])
    for config, want in (
        (CONFIG, {"too_short": 2 / 5}),
        (dataclasses.replace(CONFIG, window=1, segments="sentences"), {"too_short": 0, "cut_segments": 21 / 23}),
    ):
        example, _, _, gradient = run(config, batch)
        counts = {"predictive": example.counts["predictive"].sum()}
        metrics = finish(config.build(VOCAB), Sums(gradient.losses, counts, gradient.stats))
        for name, value in want.items():
            assert metrics[name] == pytest.approx(value, abs=1e-6)
        assert ("cut_segments" in metrics) == (config.segments == "sentences")


def test_who_knows_nothing_pays_the_log_of_the_candidates():
    """With W = 0 exactly ln N, of 19 segments, and the bound on the information is 0."""
    nothing = jax.tree.map(jnp.zeros_like, params()["predictions"])
    example, _, losses, gradient = run(changes={"predictions": nothing})
    scored = example.weights["predictive"] > 0
    np.testing.assert_allclose(losses[scored], math.log(19), rtol=1e-6)
    counts = {"predictive": example.counts["predictive"].sum()}
    metrics = finish(CONFIG.build(VOCAB), Sums(gradient.losses, counts, gradient.stats))
    assert metrics["loss/predictive"] == pytest.approx(math.log(19), rel=1e-6)
    for k in (1, 2):
        assert metrics[f"log_candidates/{k}"] == pytest.approx(math.log(19), rel=1e-6)
        assert metrics[f"information/{k}"] == pytest.approx(0, abs=1e-5)
    # of what is learned, each k tells its own part
    _, _, losses, gradient = run()
    metrics = finish(CONFIG.build(VOCAB), Sums(gradient.losses, counts, gradient.stats))
    for k in (1, 2):
        mean = losses[..., k - 1][scored[..., k - 1]].mean()
        assert metrics[f"information/{k}"] == pytest.approx(math.log(19) - mean, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("symbols, number, floor", [(4, 8, 0.914062), (16, 64, 1.511327), (1000, 64, 0.043113)])
def test_a_tabular_critic_reaches_the_floor(symbols, number, floor):
    """Of a channel that tells a symbol as it is: E ln(1 + Bin(N - 1, 1 / K)), since copies are candidates, too."""
    shape, optimizer = (1024 // number, number), optax.adam(0.3)

    def loss(table: jax.Array, key: jax.Array) -> jax.Array:
        drawn = jax.random.randint(key, shape, 0, symbols)
        one = lambda x: info_nce(  # noqa: E731
            table[x], jax.nn.one_hot(x, symbols), jnp.arange(number), scale=1.0, similarity="dot"
        )
        return jax.vmap(one)(drawn).loss.mean()

    def update(state: tuple, key: jax.Array) -> tuple:
        table, momenta = state
        updates, momenta = optimizer.update(jax.grad(loss)(table, key), momenta)
        return (optax.apply_updates(table, updates), momenta), None

    @jax.jit
    def train(key: jax.Array) -> jax.Array:
        table = jnp.zeros((symbols, symbols))
        state, _ = jax.lax.scan(update, (table, optimizer.init(table)), jax.random.split(key, 80))
        return jax.lax.map(lambda key: loss(state[0], key), jax.random.split(jax.random.key(9), 20)).mean()

    copies = np.arange(number)
    weights = [math.comb(number - 1, c) * (1 / symbols) ** c * (1 - 1 / symbols) ** (number - 1 - c) for c in copies]
    assert weights @ np.log1p(copies) == pytest.approx(floor, abs=1e-6)
    assert train(jax.random.key(1)) == pytest.approx(floor, abs=0.02)


def test_the_order_of_the_batch_changes_nothing():
    order = np.array([4, 0, 5, 2, 1, 3])
    _, _, losses, gradient = run()
    _, _, moved, other = run(batch=jax.tree.map(lambda leaf: leaf[order], BATCH))
    np.testing.assert_allclose(moved, losses[order], rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), other.grads, gradient.grads)


def test_filler_rows_are_no_candidates():
    valid = np.array([1, 1, 1, 1, 1, 0], np.float32)
    _, _, losses, gradient = run(batch=BATCH._replace(valid=valid))
    empty = BATCH.segment_ids * (valid > 0)[:, None]
    _, _, want, other = run(batch=BATCH._replace(segment_ids=empty.astype(np.int32)))
    np.testing.assert_allclose(losses[:5], want[:5], rtol=1e-4, atol=1e-5)
    assert gradient.stats["vectors"] == other.stats["vectors"] == 17


def test_a_text_is_the_mean_of_its_windows():
    """By their tokens, also where the last window is not whole; a text shorter than a window has a vector."""
    objective = CONFIG.for_evaluation().build(VOCAB)
    embed = jax.jit(lambda batch: objective.embed(Snapshot(params(), {}, jnp.int32(0)), batch, 0))
    vectors, segments = embed(BATCH), run()[1]["segments"]
    np.testing.assert_allclose(vectors[0], segments[0].mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(vectors[3], segments[3, :2].mean(0), rtol=1e-4, atol=1e-5)
    rest = embed(BATCH._replace(segment_ids=BATCH.segment_ids * (BATCH.positions < 1)))
    seventh = BATCH._replace(
        tokens=np.roll(BATCH.tokens, -6, 1), segment_ids=np.roll(BATCH.segment_ids, -6, 1) * (BATCH.positions < 1)
    )
    np.testing.assert_allclose(vectors[5], (6 * segments[5, :2].mean(0) + embed(seventh)[5]) / 7, rtol=1e-4, atol=1e-5)
    assert (np.abs(rest) > 0).any(1).all()


def test_the_first_predictions_are_of_the_size_of_what_they_are_made_of():
    """W_k ~ N(0, 1 / d), times the first scale."""
    network, smaller = predictions(64, 3), predictions(64, 3, 0.01)
    kernel = network.init(jax.random.key(0))["kernel"]
    assert kernel.shape == (64, 192)
    np.testing.assert_allclose(smaller.init(jax.random.key(0))["kernel"], kernel / 100, rtol=1e-5)
    assert np.std(kernel) == pytest.approx(1 / 8, rel=0.02)  # of 12,288 numbers: sampling error 0.6 %
    x = jax.random.normal(jax.random.key(1), (5, 64))
    np.testing.assert_allclose(network.apply({"kernel": kernel}, x)[:, 1], x @ kernel[:, 64:128], rtol=1e-5, atol=1e-5)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="room for 1 segments of 32"):
        run(dataclasses.replace(CONFIG, window=32), batch_of([32], 40))
    with pytest.raises(ValueError, match="room for 4 segments of 3, and 4 must follow one"):
        run(dataclasses.replace(CONFIG, ahead=4))
    with pytest.raises(ValueError, match="raise batch_size"):
        run(dataclasses.replace(CONFIG, candidates="batch"), jax.tree.map(lambda leaf: leaf[:1], BATCH))
    with pytest.raises(ValueError, match="1 or more"):
        dataclasses.replace(CONFIG, ahead=0).build(VOCAB)
    with pytest.raises(ValueError, match="first_scale must be above 0"):
        dataclasses.replace(CONFIG, first_scale=0.0).build(VOCAB)
    with pytest.raises(ValueError, match="embed_width"):
        dataclasses.replace(CONFIG, context=dataclasses.replace(NARROW, embed_width=4)).build(VOCAB)
    with pytest.raises(ValueError, match=r"needs a \[SEP\] token"):
        CONFIG.build(dataclasses.replace(VOCAB, sep=None))
