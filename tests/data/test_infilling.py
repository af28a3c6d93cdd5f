"""Fill-in-the-middle at the level of characters: the cuts, the order, and what the inverse gives back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxpt.data.build import BuildConfig, build
from jaxpt.data.infilling import Cut, cut_document, draw_cut
from jaxpt.data.manifest import load_vocab
from jaxpt.data.pipeline import Source, held_out
from jaxpt.data.sentences import Document
from jaxpt.data.tokenizer import byte_tokenizer
from jaxpt.types import RowSpec

TOKENIZER = byte_tokenizer()
PRE, SUF, MID = TOKENIZER.sentinels[:3]


def shown(tokens: np.ndarray) -> str:
    names = {PRE: "<", SUF: "|", MID: ">"}
    return "".join(names.get(t) or TOKENIZER.decode([t]) for t in tokens.tolist())


@pytest.mark.parametrize(
    ("cut", "psm", "spm"),
    [
        ((2, 5), "<12|678>345", "<|678>12345"),
        ((4, 8), "<1234|>5678", "<|>12345678"),
        ((0, 3), "<|45678>123", "<|45678>123"),
        ((5, 5), "<12345|678>", "<|678>12345"),
    ],
)
def test_golden_orders(cut, psm, spm):
    document = Document("12345678", ())
    assert shown(cut_document(TOKENIZER, document, Cut(*cut, False))[0]) == psm
    assert shown(cut_document(TOKENIZER, document, Cut(*cut, True))[0]) == spm


def test_sentences_start_where_they_do_in_the_text_and_at_sentinels():
    tokens, starts = cut_document(TOKENIZER, Document("ab.cd.ef", (3, 6)), Cut(3, 5, False))
    assert shown(tokens) == "<ab.|.ef>cd"
    assert starts.astype(int).tolist() == [1, 0, 0, 0, 1, 0, 1, 0, 1, 1, 0]


def test_the_law_of_the_cuts():
    texts = [f"{i:04d}" for i in range(6000)]  # 4 characters, so 5 places
    cuts = [draw_cut(text, 0.5, 0.25, 0) for text in texts]
    there = [cut for cut in cuts if cut is not None]
    assert len(there) / 6000 == pytest.approx(0.5, abs=4 * 0.5 / 6000**0.5)
    n = len(there)
    assert np.mean([cut.suffix_first for cut in there]) == pytest.approx(0.25, abs=4 * 0.433 / n**0.5)
    assert np.mean([cut.begin == cut.end for cut in there]) == pytest.approx(1 / 5, abs=4 * 0.4 / n**0.5)
    counts = np.bincount([cut.begin for cut in there] + [cut.end for cut in there], minlength=5) / (2 * n)
    np.testing.assert_allclose(counts, 1 / 5, atol=4 * 0.4 / (2 * n) ** 0.5)
    assert cuts == [draw_cut(text, 0.5, 0.25, 0) for text in texts] != [draw_cut(text, 0.5, 0.25, 1) for text in texts]
    assert draw_cut("text", 0.0, 0.5, 0) is None and draw_cut("text", 1.0, 0.0, 0) is not None


def test_the_build_writes_what_gives_the_text_back(tmp_path):
    texts = [f"def f{i}(x):\n    return x + {i * i}  # größe\n" for i in range(120)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"model": "byte", "validation": 0.0, "workers": 1, "fim_rate": 0.7}
    manifest = build(BuildConfig(str(tmp_path / "out"), (str(path),), **options))
    assert load_vocab(manifest.path).sentinels[:3] == (PRE, SUF, MID)
    batch = next(held_out([Source(str(manifest.path))], RowSpec("one_document"), 64, 120, split="train"))
    kinds = []
    for text, tokens, segments in zip(texts, batch.tokens, batch.segment_ids, strict=True):
        tokens = tokens[segments > 0].tolist()
        if PRE in tokens:
            suf, mid = tokens.index(SUF), tokens.index(MID)
            assert [tokens.count(t) for t in (PRE, SUF, MID)] == [1, 1, 1] and tokens[0] == PRE and suf < mid
            prefix, suffix, rest = tokens[1:suf], tokens[suf + 1 : mid], tokens[mid + 1 :]
            tokens = prefix + rest + suffix  # SPM has an empty prefix before SUF and the whole of it after MID
            kinds.append(suf == 1)
        assert TOKENIZER.decode(tokens) == text
    assert 60 < len(kinds) < 108 and 20 < sum(kinds) < len(kinds) - 20
    with pytest.raises(ValueError, match="--fim-rate is a share"):
        build(BuildConfig(str(tmp_path / "other"), (str(path),), fim_rate=1.5))
