"""Phrases: PMI by brute force, boundaries that no phrase crosses, and the same flags from build to batch."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest

from jaxpt.data import parts, phrases
from jaxpt.data.build import BuildConfig, build
from jaxpt.data.phrases import Counts, Words, find, grams_of, phrase_starts, phrases_in, pmi, words_of
from jaxpt.data.pipeline import Phase, Pipeline, Source, held_out
from jaxpt.types import RowSpec

STARTS_WORD = np.array([True] * 8 + [False] * 2)  # tokens 8 and 9 continue a word
LETTERS = np.array([True] * 7 + [False] + [True] * 2)  # token 7 is punctuation


def words_by_hand(tokens: list[int], sentences: list[int]) -> Words:
    starts = np.zeros(len(tokens), bool)
    starts[sentences] = True
    return words_of(np.array(tokens), starts, STARTS_WORD, LETTERS)


def test_words_by_hand():
    words = words_by_hand([1, 8, 2, 7, 1, 8, 1, 9], [0, 6])
    assert words.first.tolist() == [0, 2, 3, 4, 6]
    assert words.hashes[0] == words.hashes[3] and len(set(words.hashes.tolist())) == 4
    assert words.runs.tolist() == [1, 1, 2, 3, 4]  # punctuation stands alone; a sentence begins a run
    grams = [at.tolist() for at, _ in grams_of(words)]
    assert grams == [[0, 1, 2, 3, 4], [0], [], [], []]
    # a document may begin with a piece that continues a word, and order and cut of the pieces matter
    assert words_by_hand([8, 1], [0]).first.tolist() == [0, 1]
    assert len({int(words_by_hand(t, [0]).hashes[0]) for t in ([1, 8, 9], [1, 9, 8], [1, 8], [1], [1, 8, 8])}) == 5


def brute_pmi(text: list[str], minimum: int) -> dict[tuple[str, ...], float]:
    """PMI of every frequent n-gram of two to five words, by going through all segmentations."""
    counts = Counter(tuple(text[i : i + n]) for n in range(1, 6) for i in range(len(text) - n + 1))
    log_p = {gram: math.log(count / len(text)) for gram, count in counts.items() if count >= minimum}
    found = {}
    for gram, value in log_p.items():
        n = len(gram)
        for cuts in itertools.product([False, True], repeat=n - 1):
            places = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), n]
            if len(places) > 2:
                parts_of = sum(log_p[gram[a:b]] for a, b in itertools.pairwise(places))
                found[gram] = min(found.get(gram, math.inf), value - parts_of)
    return found


def test_pmi_is_that_of_all_segmentations():
    rng = np.random.default_rng(0)
    text = [str(w) for w in rng.choice(6, 400, p=[0.3, 0.3, 0.2, 0.1, 0.05, 0.05])]
    want = brute_pmi(text, 3)
    counts = Counter(tuple(text[i : i + n]) for n in range(1, 6) for i in range(len(text) - n + 1))
    log_p = np.full((5, 400), -np.inf)
    for n in range(1, 6):
        for i in range(400 - n + 1):
            if (count := counts[tuple(text[i : i + n])]) >= 3:
                log_p[n - 1, i] = math.log(count / 400)
    got = pmi(log_p)
    assert len(set(map(len, want))) == 4
    for (n, i), value in np.ndenumerate(got):
        gram = tuple(text[i : i + n + 1])
        assert value == (pytest.approx(want[gram]) if n and len(gram) == n + 1 and gram in want else -math.inf)


def test_the_longest_phrase_is_taken_from_the_left():
    words = words_by_hand([0, 1, 2, 3, 4, 8, 5, 0], [0])
    hashes = {(int(i), n): h for n, (at, gram) in enumerate(grams_of(words), 1) for i, h in zip(at, gram, strict=True)}
    table = np.sort(np.array([hashes[0, 2], hashes[0, 3], hashes[2, 3], hashes[3, 2]], np.uint64))
    assert phrases_in(words, table) == ([0, 3], [3, 2])  # "0 1 2" hides "2 3 4"; then "3 48"
    starts = np.arange(8) == 0
    marks = phrase_starts(np.array([0, 1, 2, 3, 4, 8, 5, 0]), starts, np.array([STARTS_WORD, LETTERS]), table)
    assert marks.astype(int).tolist() == [1, 0, 0, 1, 0, 0, 1, 1]


def test_counts_and_finding():
    counts = Counts()
    for values in ([3, 5], [5, 9], [3, 5, 7], [1]):
        counts.add(np.array(values, np.uint64), np.ones(len(values), np.int64))
    hashes, summed = counts.all()
    assert hashes.tolist() == [1, 3, 5, 7, 9] and summed.tolist() == [1, 2, 3, 1, 1]
    assert find(hashes, np.array([5, 6, 99], np.uint64))[1].tolist() == [True, False, False]
    assert not find(np.zeros(0, np.uint64), np.array([5], np.uint64))[1].any()


SENTENCES = [
    "New York is big.",
    "I saw New York today.",
    "Old York, not new, is in the north.",
    "It is a new day in York.",
]


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "in.jsonl"
    texts = [" ".join(rng.choice(SENTENCES, 6, p=[0.4, 0.4, 0.1, 0.1])) for _ in range(200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def built(source, out, **options):
    options = {"model": "byte", "validation": 0.2, "workers": 1, "phrases": True, "phrase_count": 5, **options}
    return build(BuildConfig(str(source.parent / out), (str(source),), **options))


def test_from_text_to_batches(source, monkeypatch, capsys):
    manifest = built(source, "one")
    assert "for example" in capsys.readouterr().err and manifest.extras == {"phrase_starts": "bool"}
    monkeypatch.setattr(parts, "PART_BYTES", (3000, 6000))
    monkeypatch.setattr(phrases, "BLOCK", 500)
    monkeypatch.setattr(parts, "EXTRA_BYTES", 700)
    again = built(source, "two", shard_documents=30)  # other parts and blocks, the same phrases
    rows = RowSpec("one_document", prefix=(2,), suffix=(3,), fields=("phrase_starts",))
    found = [next(held_out([Source(str(m.path))], rows, 300, 16)) for m in (manifest, again)]
    assert (found[0].extras["phrase_starts"] == found[1].extras["phrase_starts"]).all()
    batch, marks = found[0], found[0].extras["phrase_starts"]
    assert marks.dtype == bool and marks.shape == batch.tokens.shape
    assert marks[batch.segment_ids == 0].all() and marks[:, 0].all()
    texts = ["".join(chr(t - 107) if t >= 107 else "#" for t in row) for row in batch.tokens]
    seen = Counter()
    for text, mark in zip(texts, marks, strict=True):
        starts = set(np.flatnonzero(mark))
        words = {i for i, c in enumerate(text) if c in " .,#"} | {1}
        assert starts <= words  # what continues a word starts nothing
        seen["inside"] += sum(text[i : i + 5] == " York" and i not in starts for i in range(len(text)))
        assert all(i in starts for i, c in enumerate(text) if c in ".,")
        # no phrase reaches over the end of a sentence
        assert all(i + 1 in starts for i, c in enumerate(text) if c == "." and text[i + 1] == " ")
    assert seen["inside"] > 10

    # every packing and cut serves the same flags with the same tokens
    for packing in ("concatenate", "best_fit", "one_document"):
        rows = RowSpec(packing, suffix=(3,), fields=("phrase_starts", "document_ids"))
        pipeline = Pipeline([Phase(0, (Source(str(manifest.path)),), 61, 8)], rows, seed=0)
        assert pipeline.fingerprint()["fields"] == ["phrase_starts", "document_ids"]
        batch = pipeline.batch(3)
        marks, owners = batch.extras["phrase_starts"], batch.extras["document_ids"]
        ordinary = batch.tokens >= 107
        letters = ordinary & np.isin(batch.tokens - 107, [ord(c) for c in "ewsabdhinortuy"])
        assert not marks[letters & (batch.positions > 0)].any()
        assert marks[~ordinary].all() and (owners[batch.segment_ids == 0] == -1).all()
        for row in range(8):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                assert len(set(owners[row][batch.segment_ids[row] == segment].tolist())) == 1
        half = pipeline.batch(3, slice(4, 8))
        assert all((half.extras[name] == batch.extras[name][4:]).all() for name in batch.extras)


def test_data_without_phrases_say_how_to_get_them(source):
    manifest = built(source, "plain", phrases=False)
    assert manifest.extras == {} and "phrase_count" not in manifest.provenance["settings"]
    with pytest.raises(ValueError, match="--phrases"):
        Pipeline([Phase(0, (Source(str(manifest.path)),), 64, 8)], RowSpec(fields=("phrase_starts",)), 0)
    with pytest.raises(ValueError, match=r"--phrase-count is from 2"):
        built(source, "other", phrase_count=1)
