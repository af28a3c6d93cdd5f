"""PEGASUS: which sentences are chosen, and what the two sides read."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import packed_batch, tiny_vocab

from jaxpt.data.gaps import rouge_scores
from jaxpt.objectives import GapSentences
from jaxpt.objectives.gap_sentences import choose
from jaxpt.types import Batch, Example, Snapshot

VOCAB = tiny_vocab()
EOS, MASK = VOCAB.require("eos", "-"), VOCAB.require("mask", "-")


@functools.cache
def corrupt(config: GapSentences):
    objective = config.build(VOCAB)
    return jax.jit(lambda batch, key: objective.corrupt(Snapshot({}, {}, jnp.int32(0)), batch, key))


def corrupted(config: GapSentences, batch: Batch, seed: int = 0) -> Example:
    return jax.device_get(corrupt(config)(batch, jax.random.key(seed)))


def a_batch(config: GapSentences, length: int = 48) -> Batch:
    return packed_batch(config.build(VOCAB).rows, VOCAB, length, 16)


def documents(batch: Batch, row: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens, sentence ids and scores of the texts of a row, without EOS."""
    found = []
    for document in range(1, batch.segment_ids[row].max() + 1):
        inside = (batch.segment_ids[row] == document) & (batch.tokens[row] != EOS)
        scores = batch.extras.get("gap_scores", batch.sentence_ids.astype(np.float32))
        found.append((batch.tokens[row][inside], batch.sentence_ids[row][inside], scores[row][inside]))
    return found


def test_both_sides_by_hand():
    """The chosen sentences and [EOS] on one side, a mask for each on the other; selection by a plain sort."""
    config = GapSentences(ratio=0.5, intact=0.0, target=1.0)
    batch = a_batch(config)
    example = corrupted(config, batch)
    total = 0
    for row in range(16):
        heard, said = [], []
        for tokens, sentences, scores in documents(batch, row):
            count = sentences.max() + 1
            of_sentence = np.array([scores[sentences == s][0] for s in range(count)])
            wanted = min(max(int(0.5 * count), 1), count - 1)
            chosen = set(np.argsort(-of_sentence, kind="stable")[:wanted].tolist())
            texts = [tokens[sentences == s].tolist() for s in range(count)]
            heard += [t for s, text in enumerate(texts) for t in ([MASK] if s in chosen else text)] + [EOS]
            said += [t for s, text in enumerate(texts) if s in chosen for t in text] + [EOS] * bool(chosen)
            total += len(chosen)
        inputs = example.inputs
        assert inputs["tokens"][row][inputs["segment_ids"][row] > 0].tolist() == heard
        assert inputs["targets"][row][example.weights["lm"][row] > 0].tolist() == said
    assert total > 30


def test_selection_is_that_of_a_plain_rouge():
    """From words to chosen sentences: numpy's ROUGE, a sort, and the device's choice of three."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        sentences = np.sort(rng.integers(0, 8, 60))
        sentences = np.unique(sentences, return_inverse=True)[1]
        words = rng.integers(0, 25, 60)
        count = sentences.max() + 1
        scores = rouge_scores(words, sentences, count)
        best = set(np.argsort(-scores, kind="stable")[: max(1, int(0.4 * count))].tolist())
        ones = jnp.ones(60, jnp.int32)
        taken = choose(jnp.float32(scores[sentences]), jnp.full(61, 0.4), jnp.array(sentences), ones > 0, ones)
        assert set(sentences[np.asarray(taken)].tolist()) == best


def test_a_document_of_one_sentence_has_no_gap():
    ones = jnp.ones(5, jnp.int32)
    assert not choose(ones / 2, jnp.full(6, 1.0), ones * 0, ones > 0, ones).any()
    all_but_one = choose(jnp.arange(5) / 5, jnp.full(6, 1.0), jnp.arange(5), ones > 0, ones)
    assert all_but_one.tolist() == [False, True, True, True, True]


def test_an_unknown_word_belongs_to_its_sentence():
    """It is masked and asked for with the sentence, and does not cut it in two."""
    tokens = np.array([[20, VOCAB.unk, 21, 30, 31, EOS]], np.int32)
    ones, ids = np.ones_like(tokens), np.zeros(1, np.uint32)
    sentences = np.array([[0, 0, 0, 1, 1, 1]], np.int32)
    batch = Batch(tokens, ones, np.arange(6)[None], sentences, ids, ids.astype(np.int32), np.ones(1, np.float32))
    example = corrupted(GapSentences(select="lead", ratio=0.5, intact=0.0, target=1.0), batch)
    assert example.inputs["tokens"].tolist() == [[MASK, 30, 31, EOS, VOCAB.pad, VOCAB.pad]]
    assert example.inputs["targets"].tolist() == [[20, VOCAB.unk, 21, EOS, VOCAB.pad, VOCAB.pad]]


def test_long_targets_are_cut_to_their_share():
    config = GapSentences(ratio=0.9, intact=0.0, target=0.25)
    batch = a_batch(config)
    example = corrupted(config, batch)
    assert example.inputs["targets"].shape[1] == batch.tokens.shape[1] // 4
    for row in range(16):
        for document in range(1, batch.segment_ids[row].max() + 1):
            size = np.sum(batch.segment_ids[row] == document)
            asked = example.weights["lm"][row][example.inputs["decoder_segment_ids"][row] == document].sum()
            assert asked <= size // 4 and asked >= min(size // 4, 1)


def test_some_sentences_stay_and_shares_and_choices_vary():
    config = GapSentences(ratio=0.5, target=1.0, intact=0.3)
    batch = a_batch(config)
    masks, chosen = 0, 0
    for seed in range(30):
        example = corrupted(config, batch, seed)
        masks += np.sum(example.inputs["tokens"] == MASK)
        ends = (example.inputs["targets"] == EOS) & (example.weights["lm"] > 0)
        chosen += ends.sum()  # here one sentence of each document of two or three
    sizes = [d[1].max() + 1 for row in range(16) for d in documents(batch, row)]
    assert set(sizes) <= {1, 2, 3}
    assert masks / chosen == pytest.approx(0.7, abs=4 * np.sqrt(0.21 / chosen))
    steady, noisy = (
        {
            tuple(corrupted(dataclasses.replace(config, intact=0.0, noise=noise), batch, s).inputs["targets"].ravel())
            for s in range(4)
        }
        for noise in (0.0, 3.0)
    )
    assert len(steady) == 1 and len(noisy) == 4
    varied = dataclasses.replace(config, lowest_ratio=0.0, ratio=1.0, intact=0.0)
    counts = {int(corrupted(varied, batch, seed).weights["lm"].sum()) for seed in range(4)}
    assert len(counts) > 1


def test_lead_and_random_need_no_scores():
    lead = GapSentences(select="lead", intact=0.0, target=1.0)
    assert lead.build(VOCAB).rows.fields == ()
    batch = a_batch(lead)
    example = corrupted(lead, batch)
    for row in range(16):
        said = [t for tokens, s, _ in documents(batch, row) if s.max() for t in [*tokens[s == 0].tolist(), EOS]]
        assert example.inputs["targets"][row][example.weights["lm"][row] > 0].tolist() == said
    random = dataclasses.replace(lead, select="random")
    first, second = (corrupted(random, batch, seed).inputs["targets"] for seed in (0, 1))
    assert (first != second).any()


@pytest.mark.parametrize("change", [{"ratio": 1.2}, {"lowest_ratio": 0.5}, {"noise": -1.0}, {"target": 2.0}])
def test_impossible_settings(change: dict):
    with pytest.raises(ValueError, match=f"gap_sentences: {next(iter(change))}"):
        GapSentences(**change).build(VOCAB)
