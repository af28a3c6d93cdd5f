"""DeCLUTR: where spans stand and how long they are, what is read masked, and who is a negative of whom."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats as distributions
from support import tiny_vocab

from jaxpt.corruption.rows import row_keys
from jaxpt.models.config import TransformerConfig
from jaxpt.objectives.declutr import DeCLUTR, draw_spans, tell_apart
from jaxpt.step import batch_gradient, finish, make_example
from jaxpt.types import Batch, Snapshot, Sums

VOCAB = tiny_vocab()
ENCODER = TransformerConfig(depth=1, width=16, heads=2, positions="rotary", layers="unroll")
CONFIG = DeCLUTR(encoder=ENCODER, shortest=4)
ROWS, LENGTH = 6, 48  # 2 anchors of at most 12 tokens


@functools.cache
def drawn(anchors: int, positives: int, shortest: int, longest: int, rows: int, short_by: int = 0):
    """Starts and sizes of the anchors [rows, A] and of the positives [rows, A, P]."""
    size = jnp.int32(2 * anchors * longest - short_by)

    @jax.jit
    def draw(keys: jax.Array):
        return jax.vmap(lambda key: draw_spans(key, size, anchors, positives, shortest, longest))(keys)

    starts, sizes = jax.device_get(draw(jax.random.split(jax.random.key(0), rows)))
    return tuple(
        part for both in (starts, sizes) for part in (both[:, :anchors], both[:, anchors:].reshape(rows, anchors, -1))
    )


@pytest.mark.parametrize("anchors, positives, shortest, longest", [(2, 2, 4, 12), (3, 1, 1, 5), (1, 3, 2, 2)])
def test_spans_stand_where_they_may(anchors, positives, shortest, longest):
    """And up to the very edges, of the document, too."""
    starts, around, sizes, lengths = drawn(anchors, positives, shortest, longest, 2000)
    assert sizes.min() == lengths.min() == shortest and max(sizes.max(), lengths.max()) <= longest
    cells = starts // longest
    assert (starts + sizes <= (cells + 1) * longest).all()  # inside its cell
    assert (np.diff(cells, axis=1) > 1).all()  # and no two cells touch
    low = np.maximum(starts[..., None] - lengths, 0)
    high = np.minimum((starts + sizes)[..., None], 2 * anchors * longest - lengths)
    assert (around >= low).all() and (around <= high).all()
    assert (around == low).any() and (around == high).any()
    assert around.min() == 0 and (around + lengths).max() == 2 * anchors * longest
    assert (starts % longest == 0).any() and (starts + sizes == (cells + 1) * longest).any()


def test_lengths_and_places_follow_their_laws():
    """At the published sizes: means 352 - 1/2 and 192 - 1/2, Beta(4, 2) and Beta(2, 4) as a whole, cells alike."""
    starts, around, sizes, lengths = drawn(2, 2, 32, 512, 6000)
    for found, law, mean in ((sizes, (4, 2), 352), (lengths, (2, 4), 192)):
        values = found.reshape(-1)
        error = 480 * distributions.beta.std(*law) / np.sqrt(values.size)  # 0.5 to 0.8 tokens
        assert values.mean() == pytest.approx(mean - 0.5, abs=4 * error)
        edges = np.arange(32, 513)
        below = np.searchsorted(np.sort(values), edges, side="right") / values.size
        wanted = distributions.beta.cdf((edges + 1 - 32) / 480, *law)
        assert np.abs(below - wanted).max() < 1.95 / np.sqrt(values.size)  # Kolmogorov, p = 0.001
    pairs, counts = np.unique(starts // 512, axis=0, return_counts=True)
    assert pairs.tolist() == [[0, 2], [0, 3], [1, 3]]
    np.testing.assert_allclose(counts, 2000, atol=4 * np.sqrt(6000 * 2 / 9))
    slack = 512 - sizes
    assert np.mean((starts % 512)[slack > 0] / slack[slack > 0]) == pytest.approx(0.5, abs=4 * 0.3 / np.sqrt(12_000))
    low = np.maximum(starts[..., None] - lengths, 0)
    high = np.minimum((starts + sizes)[..., None], 2048 - lengths)
    shares = (around - low) / (high - low)
    assert shares.mean() == pytest.approx(0.5, abs=4 * 0.29 / np.sqrt(24_000))


def test_a_short_document_gives_no_spans():
    for part in drawn(2, 2, 4, 12, 50, short_by=1):
        assert (part == 0).all()


# --------------------------------------------------------------------------------------------- the objective


def batch_of(sizes: list[int]) -> Batch:
    """Documents of so many tokens, which all differ within a row."""
    rng = np.random.default_rng(0)
    tokens = np.stack([rng.permutation(np.arange(7, 57))[:LENGTH] for _ in sizes]).astype(np.int32)
    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    inside = (places < np.array(sizes)[:, None]).astype(np.int32)
    ids, ones = np.arange(len(sizes), dtype=np.uint32), np.ones(len(sizes), np.float32)
    return Batch(tokens * inside, inside, places, places * 0, ids, np.zeros(len(sizes), np.int32), ones)


BATCH = batch_of([48, 48, 47, 48, 48, 0])  # the third is too short, the last is none


@functools.cache
def params() -> dict:
    made = jax.jit(CONFIG.build(VOCAB).init)(jax.random.key(3))
    return jax.tree.map(lambda leaf: leaf * 6 if leaf.ndim > 1 else leaf, made)


@functools.cache
def passes(config: DeCLUTR):
    objective = config.build(VOCAB)

    @jax.jit
    def run(params: dict, batch: Batch, key: jax.Array):
        snapshot = Snapshot(params, {}, jnp.int32(0))
        example = make_example(objective, snapshot, batch, key)
        keys = row_keys(key, example.row_ids)
        gradient = batch_gradient(objective, objective.specs, snapshot, example, keys, 1)
        return example, objective.couple(snapshot, gradient.features, example)[0]["contrastive"], gradient

    return run


def run(config: DeCLUTR = CONFIG, batch: Batch = BATCH, seed: int = 0):
    read = {name: params()[name] for name in config.build(VOCAB).specs}
    return jax.device_get(passes(config)(read, batch, jax.random.key(seed)))


def test_anchors_are_read_masked_and_positives_as_they_are():
    """Each text is a piece of its document, between [CLS] and [SEP]; what is hidden in an anchor is asked for."""
    example, _, _ = run()
    inputs, weights = example.inputs, example.weights["mlm"]
    assert inputs["tokens"].shape == (ROWS, 6, 14) and weights.shape[:2] == (ROWS, 2)
    for row, text in np.ndindex(ROWS, 6):
        size = inputs["segment_ids"][row, text].sum()
        if row in (2, 5):
            assert size == 0
            continue
        tokens = inputs["tokens"][row, text, :size].copy()
        if text < 2:
            asked = weights[row, text] > 0
            places, targets = inputs["target_positions"][row, text][asked], inputs["targets"][row, text][asked]
            tokens[places] = targets
        assert (tokens[0], tokens[-1]) == (VOCAB.cls, VOCAB.sep) and 4 <= size - 2 <= 12
        document = BATCH.tokens[row].tolist()
        begin = document.index(tokens[1])
        assert document[begin : begin + size - 2] == tokens[1:-1].tolist()
    assert (inputs["tokens"][:, :2] == VOCAB.mask).sum() > 4
    assert not (inputs["tokens"][:, 2:] == VOCAB.mask).any()


def test_the_loss_is_nt_xent_over_all_anchors_and_mean_positives():
    """Of 4 documents, 16 vectors: the other anchor of the same document is a negative, as are its positives."""
    example, losses, gradient = run()
    whole = [0, 1, 3, 4]
    assert example.weights["contrastive"].tolist() == [[1, 1], [1, 1], [0, 0], [1, 1], [1, 1], [0, 0]]
    vectors = np.concatenate([gradient.features[name][whole].reshape(8, -1) for name in ("anchors", "positives")])
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    logits = 20 * vectors @ vectors.T - 1e9 * np.eye(16)
    partner = np.roll(np.arange(16), 8)
    want = np.asarray(optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), partner))
    np.testing.assert_allclose(losses[whole].reshape(-1), want.reshape(2, 8).mean(0), rtol=1e-3, atol=1e-4)
    counts = {term: count.sum() for term, count in example.counts.items()}
    metrics = finish(CONFIG.build(VOCAB), Sums(gradient.losses, counts, gradient.stats))
    assert metrics["too_short"] == pytest.approx(1 / 5) and counts["contrastive"] == 8
    assert metrics["loss/contrastive"] == pytest.approx(want.mean(), rel=1e-3)
    assert metrics["text_accuracy"] == pytest.approx((logits.argmax(1) == partner).mean(), abs=1e-6)
    assert metrics["alignment"] == pytest.approx(2 - 2 * np.sum(vectors[:8] * vectors[8:], 1).mean(), rel=1e-3)


@pytest.mark.parametrize("numbers", [(5, 8, 5, 5, 9), (5, 8, 6, 7, 9), (4, 4)])
def test_copies_of_a_document_are_no_negatives(numbers):
    """Neither their anchors nor their positives; the other anchor of the same row stays one."""
    numbers = np.array(numbers)
    rows, pairs = len(numbers), 2 * len(numbers)
    vectors = np.random.default_rng(0).normal(size=(2, pairs, 5)).astype(np.float32)
    made = jax.jit(tell_apart)(*vectors, np.ones(pairs), numbers, 3.0)
    both = vectors.reshape(2 * pairs, 5)
    both /= np.linalg.norm(both, axis=-1, keepdims=True)
    row, partner = np.tile(np.repeat(np.arange(rows), 2), 2), np.roll(np.arange(2 * pairs), pairs)
    out = (numbers[row][:, None] == numbers[row]) & (row[:, None] != row) | np.eye(2 * pairs, dtype=bool)
    logits = 3 * both @ both.T - 1e9 * out
    want = np.asarray(optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), partner))
    np.testing.assert_allclose(made.loss, want.reshape(2, pairs).mean(0), rtol=1e-4, atol=1e-5)


def test_rows_of_the_same_tokens_are_copies():
    """Also where other documents follow in the row; the loss of a batch is the one with these copies known."""
    tokens, inside = BATCH.tokens.copy(), BATCH.segment_ids.copy()
    tokens[1] = tokens[0]
    tokens[3, 40:], inside[3, 40:] = 11, 2
    tokens[4], inside[4] = tokens[3], inside[3]
    tokens[4, 40:] = 12
    example, losses, gradient = run(batch=BATCH._replace(tokens=tokens, segment_ids=inside))
    numbers = example.inputs["text_numbers"]
    assert (numbers[:, None] == numbers).sum() == 6 + 2 + 2
    flat = (gradient.features[name].reshape(12, -1) for name in ("anchors", "positives"))
    want = tell_apart(*flat, example.weights["contrastive"].reshape(-1), jnp.array([7, 7, 1, 2, 2, 3]), 20.0)
    np.testing.assert_allclose(losses.reshape(-1)[:4], want.loss[:4], rtol=1e-4, atol=1e-5)


def test_vectors_are_those_of_the_texts_and_positives_are_averaged():
    """The vector of an anchor is that of its masked tokens, from the pass that predicts them."""
    example, _, gradient = run()
    objective = CONFIG.for_evaluation().build(VOCAB)
    tokens, inside = (example.inputs[name][0] for name in ("tokens", "segment_ids"))
    shape = (6, 12)
    inner = Batch(
        tokens[:, 1:13] * (inside[:, 2:] > 0), inside[:, 2:], np.zeros(shape, int), np.zeros(shape, int),
        np.arange(6, dtype=np.uint32), np.zeros(6, np.int32), np.ones(6, np.float32),
    )  # fmt: skip
    embed = jax.jit(lambda batch: objective.embed(Snapshot(params(), {}, jnp.int32(0)), batch, 0))
    vectors = embed(inner)
    np.testing.assert_allclose(gradient.features["anchors"][0], vectors[:2], rtol=1e-4, atol=1e-5)
    want = vectors[2:].reshape(2, 2, -1).mean(1)
    np.testing.assert_allclose(gradient.features["positives"][0], want, rtol=1e-4, atol=1e-5)


def test_the_order_of_the_batch_changes_nothing():
    order = np.array([4, 0, 5, 2, 1, 3])
    _, losses, gradient = run()
    _, moved, other = run(batch=jax.tree.map(lambda leaf: leaf[order], BATCH))
    np.testing.assert_allclose(moved, losses[order], rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), other.grads, gradient.grads)


def test_without_masking():
    """The same spans, as they are, and no head; in evaluation the masking of ``masked_lm``."""
    config = dataclasses.replace(CONFIG, masked=None)
    objective = config.build(VOCAB)
    assert set(objective.specs) == {"trunk"} and set(objective.scale) == {"contrastive"}
    make = jax.jit(lambda batch: make_example(objective, Snapshot({}, {}, jnp.int32(0)), batch, jax.random.key(0)))
    example, masked = jax.device_get(make(BATCH)), run()[0]
    np.testing.assert_array_equal(example.inputs["segment_ids"], masked.inputs["segment_ids"])
    np.testing.assert_array_equal(example.inputs["tokens"][:, 2:], masked.inputs["tokens"][:, 2:])
    assert not (example.inputs["tokens"] == VOCAB.mask).any()
    judge = dataclasses.replace(CONFIG, masked=dataclasses.replace(CONFIG.masked, rate=0.4)).for_evaluation()
    assert judge.masked.rate == 0.15 and config.for_evaluation().masked is None


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"at least 13 and at most 12 tokens: raise --seq-len"):
        run(dataclasses.replace(CONFIG, shortest=13))
    with pytest.raises(ValueError, match="raise batch_size"):
        run(dataclasses.replace(CONFIG, anchors=1), jax.tree.map(lambda leaf: leaf[:1], BATCH))
    with pytest.raises(ValueError, match="positives is 1 or more"):
        dataclasses.replace(CONFIG, positives=0).build(VOCAB)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        dataclasses.replace(CONFIG, temperature=0.0).build(VOCAB)
    with pytest.raises(ValueError, match="masked does without"):
        dataclasses.replace(CONFIG, masked=dataclasses.replace(CONFIG.masked, z_loss=1e-4)).build(VOCAB)
    with pytest.raises(ValueError, match=r"needs a \[MASK\] token"):
        CONFIG.build(dataclasses.replace(VOCAB, mask=None))
