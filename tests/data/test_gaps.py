"""Scores of sentences against their document: a straightforward ROUGE, and from text to batches."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxpt.data.build import BuildConfig, build
from jaxpt.data.gaps import encoded_gap_scores, rouge_scores
from jaxpt.data.manifest import decode_document, encode_document
from jaxpt.data.phrases import SPELLINGS, TABLES
from jaxpt.data.pipeline import Phase, Pipeline, Source
from jaxpt.data.tokenizer import load_tokenizer
from jaxpt.types import RowSpec


def rouge_1_f(sentence: list, rest: list) -> float:
    """ROUGE-1 F as it is defined: the harmonic mean of precision and recall of clipped unigram counts."""
    overlap = sum((Counter(sentence) & Counter(rest)).values())
    if not overlap:
        return 0.0
    precision, recall = overlap / len(sentence), overlap / len(rest)
    return 2 * precision * recall / (precision + recall)


def test_scores_are_rouge():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sentences = [rng.integers(0, 12, rng.integers(0, 9)).tolist() for _ in range(rng.integers(1, 8))]
        words = np.array([word for sentence in sentences for word in sentence], np.uint64)
        numbers = np.repeat(np.arange(len(sentences)), [len(s) for s in sentences])
        rests = [[w for j, s in enumerate(sentences) if j != i for w in s] for i in range(len(sentences))]
        want = [rouge_1_f(sentence, rest) for sentence, rest in zip(sentences, rests, strict=True)]
        np.testing.assert_allclose(rouge_scores(words, numbers, len(sentences)), want, atol=1e-12)


TEXTS = [
    "The cat sat on the mat. A dog barked. The cat and the dog sat on the mat! Nothing else.",
    "One sentence only.",
    *(f"Number {i} is here. Here is number {i}, and {i + 1} too. No more." for i in range(12)),
]


@pytest.mark.parametrize("phrases", [False, True])
def test_from_text_to_batches(tmp_path: Path, phrases: bool):
    """Every token of a sentence has its score, as a share of the highest of its document."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    options = {"model": "byte", "validation": 0.0, "workers": 1, "gap_scores": True}
    manifest = build(BuildConfig(str(tmp_path / "out"), (str(path),), phrases=phrases, phrase_count=2, **options))
    assert manifest.extras == {"gap_scores": "uint8"} | ({"phrase_starts": "bool"} if phrases else {})
    record = manifest.tokenizer
    tokenizer = load_tokenizer((manifest.path / record["file"]).read_bytes(), record["kind"], record)
    fields = ("gap_scores",) + (("phrase_starts",) if phrases else ())
    rows = RowSpec("best_fit", prefix=(4,), suffix=(3,), fields=fields)
    pipeline = Pipeline([Phase(0, (Source(str(manifest.path)),), 128, 4)], rows, seed=0)
    seen = set()
    for step in range(12):
        batch = pipeline.batch(step)
        scores = batch.extras["gap_scores"]
        assert scores.dtype == np.float32 and scores.shape == batch.tokens.shape and scores.min() >= 0
        if phrases:
            assert batch.extras["phrase_starts"].dtype == bool
        for row in range(4):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                inside = (batch.segment_ids[row] == segment) & ~np.isin(batch.tokens[row], [3, 4])
                text = tokenizer.decode(batch.tokens[row][inside])
                numbers = batch.sentence_ids[row][inside]
                sentences = [
                    "".join(
                        c.lower() if c.isalnum() else " "
                        for c in tokenizer.decode(batch.tokens[row][inside][numbers == s])
                    ).split()
                    for s in range(numbers.max() + 1)
                ]
                want = [
                    rouge_1_f(words, [w for other, found in enumerate(sentences) if other != s for w in found])
                    for s, words in enumerate(sentences)
                ]
                for s, score in enumerate(want):
                    found = np.unique(scores[row][inside][numbers == s])
                    assert len(found) == 1
                    assert found[0] == pytest.approx(score / (max(want) or 1), abs=0.5 / 255 + 1e-6)
                seen.add(text)
    assert seen == set(TEXTS)


def test_sentences_of_a_long_document_keep_their_order(tmp_path: Path):
    """Of 2000 sentences no score is above 2 / 255, and still they differ."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 12, 2000)
    tokens = (rng.zipf(1.5, sizes.sum()) % 500 + 1).astype(np.uint16)  # a word each
    sentences = np.repeat(np.arange(2000), sizes)
    np.save(tmp_path / SPELLINGS, np.arange(501))
    np.save(tmp_path / TABLES, np.ones((2, 501), bool))
    record = encode_document(tokens, np.diff(sentences, prepend=-1) > 0)
    kept = np.frombuffer(encoded_gap_scores([record], "uint16", tmp_path)[0], np.uint8)
    scores = rouge_scores(tokens, sentences, 2000)
    assert scores.max() < 2 / 255 and kept.max() == 255 and len(np.unique(kept)) > 5
    np.testing.assert_allclose(kept / 255, (scores / scores.max())[sentences], atol=0.5 / 255 + 1e-9)


def test_records_keep_bits_and_bytes_apart():
    tokens, starts = np.array([5, 6, 7], np.uint16), np.array([True, False, True])
    scores, marks = np.array([9, 9, 200], np.uint8), np.array([True, False, False])
    record = encode_document(tokens, starts, scores, marks)
    _, sentences, *extras = decode_document(record, "uint16", ("uint8", "bool"))
    assert sentences.tolist() == [0, 0, 1]
    assert [x.tolist() for x in extras] == [scores.tolist(), marks.tolist()]
    with pytest.raises(ValueError, match="cannot hold"):
        decode_document(record, "uint16", ("bool", "bool"))
