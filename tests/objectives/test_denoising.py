"""BART's rows: what the encoder and the decoder read, and that settings are the published pieces."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import packed_batch, tiny_vocab

from jaxpt.corruption.denoise import draw_infilling, infill, lay_documents, poisson_law
from jaxpt.objectives import Denoising
from jaxpt.objectives.denoising import draw_order
from jaxpt.types import Batch, Example, Snapshot

VOCAB = tiny_vocab()
EOS, BOS, MASK, PAD = VOCAB.require("eos", "-"), VOCAB.require("bos", "-"), VOCAB.require("mask", "-"), VOCAB.pad


@functools.cache
def corrupted(config: Denoising, length: int = 24, size: int = 64) -> tuple[Batch, Example]:
    objective = config.build(VOCAB)
    batch = packed_batch(objective.rows, VOCAB, length, size)
    run = jax.jit(lambda batch: objective.corrupt(Snapshot({}, {}, jnp.int32(0)), batch, jax.random.key(3)))
    return batch, jax.device_get(run(batch))


def texts(tokens: np.ndarray, segments: np.ndarray) -> list[list[int]]:
    """The documents of one row."""
    return [tokens[segments == document].tolist() for document in range(1, segments.max() + 1)]


def test_the_decoder_says_the_text_again():
    batch, example = corrupted(Denoising())
    inputs = example.inputs
    np.testing.assert_array_equal(inputs["targets"], batch.tokens)
    np.testing.assert_array_equal(inputs["decoder_segment_ids"], batch.segment_ids)
    np.testing.assert_array_equal(example.weights["lm"], batch.segment_ids > 0)
    starts = (batch.positions == 0) & (batch.segment_ids > 0)
    assert np.all(inputs["decoder_tokens"][starts] == EOS)  # BART's decoder begins with the end, and says BOS
    assert np.all(batch.tokens[starts] == BOS)
    inner = batch.positions > 0
    assert np.all(inputs["decoder_tokens"][inner] == np.roll(batch.tokens, 1, axis=1)[inner])


def test_damaged_documents_keep_their_ends_and_their_place():
    batch, example = corrupted(Denoising())
    changed = 0
    rows = zip(example.inputs["tokens"], example.inputs["segment_ids"], batch.tokens, batch.segment_ids, strict=True)
    for damaged, ids, tokens, segments in rows:
        pairs = list(zip(texts(damaged, ids), texts(tokens, segments), strict=True))
        assert pairs
        for after, _ in pairs:
            assert after[0] == BOS and after[-1] == EOS and EOS not in after[:-1]
            changed += MASK in after
        assert np.all(damaged[ids == 0] == PAD)
    assert changed > 100
    places = example.inputs["positions"]
    first = np.roll(example.inputs["segment_ids"], 1, axis=1) != example.inputs["segment_ids"]
    assert np.all(places[first] == 0) and np.all(np.diff(places, axis=1)[~first[:, 1:] & (places[:, 1:] > 0)] == 1)


def test_nothing_is_damaged_where_nothing_is_asked_for():
    batch, example = corrupted(Denoising(permute=0.0, rate=0.0))
    for name in ("tokens", "segment_ids", "positions"):
        np.testing.assert_array_equal(example.inputs[name], getattr(batch, name))


@pytest.mark.parametrize(
    "change, length",
    [
        ({"permute": 1.0}, lambda before, after: sorted(before) == sorted(after)),  # a permutation alone
        ({"rotate": 1.0}, lambda before, after: sorted(before) == sorted(after)),
        ({"rate": 0.4, "unit": "token", "poisson": 0.0}, lambda b, a: len(a) == len(b) and a.count(MASK) > 0),
        (
            {"rate": 0.4, "unit": "token", "poisson": 0.0, "replace_length": 0},  # deletion
            lambda b, a: len(a) < len(b) and MASK not in a and all(token in b for token in a),
        ),
        ({"insert": 0.2}, lambda b, a: len(a) > len(b) and [t for t in a if t != MASK] == b),
    ],
)
def test_settings_are_the_published_pieces(change: dict, length):
    settings = {"permute": 0.0, "rate": 0.0, "random": 0.0} | change
    batch, example = corrupted(Denoising(**settings), size=16)
    rows = zip(example.inputs["tokens"], example.inputs["segment_ids"], batch.tokens, batch.segment_ids, strict=True)
    for damaged, ids, tokens, segments in rows:
        for after, before in zip(texts(damaged, ids), texts(tokens, segments), strict=True):
            assert length(before, after)


def test_room_for_insertions_is_kept_where_rows_grow():
    assert Denoising().slack(512) == 0  # spans shrink to one mask and pay for it
    growing = Denoising(replace_length=-1, permute=0.0)
    assert 4 <= growing.slack(512) <= 8
    batch, example = corrupted(growing, length=64)
    assert batch.tokens.shape[1] + growing.slack(64) == example.inputs["tokens"].shape[1] == 64
    assert example.inputs["targets"].shape[1] == 64
    more = dataclasses.replace(growing, insert=0.1)
    for length in range(16, 200):  # the length of the encoder's row is found again from the raw one
        raw = more.build(VOCAB).rows.tokens(length) if length % 50 == 0 else length - more.slack(length)
        assert min(n for n in range(raw, 2 * raw + 64) if n - more.slack(n) >= raw) <= length


def test_next_to_no_insertion_is_lost_where_spans_are_short():
    """Full rows of tokens, at a mean length of 1: as much is inserted as is hidden, give or take."""
    config = Denoising(poisson=1.0, unit="token")
    assert [config.slack(n) for n in (128, 512)] == [26, 53]
    raw, law = 128 - config.slack(128), poisson_law(1.0)
    segments, inside = jnp.ones(raw, jnp.int32), jnp.ones(raw, bool).at[0].set(False).at[-1].set(False)

    @jax.jit
    @jax.vmap
    def asked_and_left(key):
        spans = draw_infilling(key, inside, segments, 0.3, law, 0.0, np.arange(10, 20))
        _, kept = infill(segments, inside, inside, segments, spans, 1, 9)
        return spans.inserts[1], lay_documents(inside, segments, kept, spans.inserts, 128)[1][1]

    asked, left = asked_and_left(jax.random.split(jax.random.key(0), 1000))
    assert int(asked.max()) > 20
    assert np.mean(np.asarray(asked != left)) < 0.01  # four deviations, of a law that leans to more


def test_the_length_of_a_row_is_found_again_for_all_settings():
    for change in ({"insert": 0.45}, {"insert": 0.5}, {"insert": 0.5, "replace_length": -1, "poisson": 1.0}):
        config = Denoising(**change)
        objective = config.build(VOCAB)
        raw = objective.rows.tokens(512)
        assert raw >= 20
        batch = packed_batch(objective.rows, VOCAB, 512, 2)
        run = functools.partial(objective.corrupt, Snapshot({}, {}, jnp.int32(0)))
        made = jax.eval_shape(run, batch, jax.random.key(0))
        assert made.inputs["tokens"].shape[1] - config.slack(made.inputs["tokens"].shape[1]) >= raw
        assert made.inputs["tokens"].shape[1] <= 512


def test_whole_words_are_hidden():
    """Every run of tokens that is left begins and ends with a word."""
    batch, example = corrupted(Denoising(permute=0.0, random=0.0, rate=0.4))
    rows = zip(example.inputs["tokens"], example.inputs["segment_ids"], batch.tokens, batch.segment_ids, strict=True)
    seen = 0
    for damaged, ids, tokens, segments in rows:
        for after, before in zip(texts(damaged, ids), texts(tokens, segments), strict=True):
            for place in np.flatnonzero(np.array(after[:-1]) == MASK):
                following = after[place + 1]
                if following in before and following not in (EOS, MASK) and before.count(following) == 1:
                    at = before.index(following)
                    assert VOCAB.starts_word[following] or before[at - 1] == BOS or at % 4 == 0  # a word, a sentence
                    seen += 1
    assert seen > 50


def test_only_sentences_change_places():
    segments = jnp.array([1] * 8 + [0])
    sentences, candidates = jnp.array([0, 0, 0, 1, 1, 2, 2, 2, 0]), jnp.array([0, 1, 1, 1, 1, 1, 1, 0, 0]) > 0
    keys = jax.random.split(jax.random.key(0), 64)
    orders = np.asarray(jax.vmap(lambda key: draw_order(key, candidates, segments, sentences, 1.0))(keys))
    assert np.all(orders[:, 0] == 0) and np.all(orders[:, 7] == 7)  # BOS and EOS stay
    assert {tuple(order[1:7]) for order in orders} == {
        (1, 2, 3, 4, 5, 6), (1, 2, 5, 6, 3, 4), (3, 4, 1, 2, 5, 6), (3, 4, 5, 6, 1, 2), (5, 6, 1, 2, 3, 4),
        (5, 6, 3, 4, 1, 2),
    }  # fmt: skip


@pytest.mark.parametrize("change", [{"rate": 1.5}, {"poisson": 0.5}, {"insert": 0.9}, {"permute": -0.1}])
def test_impossible_settings(change: dict):
    with pytest.raises(ValueError, match=f"denoising: {next(iter(change))}"):
        Denoising(**change).build(VOCAB)
