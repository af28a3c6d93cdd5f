import pytest

from jaxpt.data import build as module
from jaxpt.data import corpus
from jaxpt.data.build import BuildConfig, build
from jaxpt.data.corpus import corpus_pieces, prose_paragraphs, read_prose
from jaxpt.data.files import Piece
from jaxpt.data.manifest import Manifest

GOOD = "This is a paragraph of plain words that ends with a full stop."


def test_prose_paragraphs():
    text = f"""{GOOD}

    It has ``code`` and :class:`a role <of.Type>` and **bold**
    text over several lines, and a `link <https://x>`_ too.

    >>> this(is) # an example of code that is not prose at all.

    .. note:: this is a directive and it is left out of everything here.

    A title that is underlined by a ruler of equal signs here.
    ==========================================================

    expr ::= this is the grammar of a language that is left out.

    Too short a paragraph.

    Numbers: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16.

    This one has enough words but it does not end as a sentence"""
    assert prose_paragraphs(text) == [
        GOOD,
        "It has code and a role and bold text over several lines, and a link too.",
    ]


def test_a_source_file_is_one_document(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        f'"""{GOOD}"""\nraise SystemExit("never imported")\nclass A:\n    """{GOOD} It has a second sentence."""\n'
        f'    async def f(self):\n        "{GOOD}"\n        "{GOOD} (no docstring)"\n'
    )
    (document,) = read_prose(Piece(str(path), "a.py", "text", 1))
    assert document.text == f"{GOOD}\n{GOOD} It has a second sentence.\n{GOOD}"
    ends = document.ends
    assert ends is not None
    assert [document.text[a:b] for a, b in zip((0, *ends), (*ends, None), strict=True)] == [
        GOOD,
        f"\n{GOOD}",
        " It has a second sentence.",
        f"\n{GOOD}",
    ]
    for nothing in ("def broken(:\n", "x = 1\n", '"""Too short."""\n', "\0"):
        path.write_text(nothing)
        assert list(read_prose(Piece(str(path), "a.py", "text", 1))) == []


def test_topics_are_documents(tmp_path):
    path = tmp_path / "topics.py"
    path.write_text(f"# generated\ntopics = {{'b': 'Second. {GOOD}', 'a': {GOOD!r}, 'c': 'no'}}\n")
    documents = list(read_prose(Piece(str(path), "stdlib/pydoc_data/topics.py", "text", 1)))
    assert [document.text for document in documents] == [GOOD, f"Second. {GOOD}"]


def test_what_the_corpora_are_made_of():
    code = corpus_pieces("code")
    assert 350 < len(code) < 600
    assert 6e6 < sum(piece.size for piece in code) < 10e6
    names = {piece.name for piece in code}
    assert {"stdlib/argparse.py", "stdlib/json/decoder.py"} <= names
    assert not [name for name in names if "/test/" in name or "site-packages" in name or "tkinter" in name]
    assert [piece.name for piece in code] == sorted(piece.name for piece in code)
    prose = corpus_pieces("prose")
    assert prose[0].name == "stdlib/pydoc_data/topics.py"
    assert {piece.name.split("/")[0] for piece in prose} == {"stdlib", "jax", "jaxlib", "numpy", "scipy"}


def test_the_documentation_of_the_language_is_prose():
    documents = list(read_prose(corpus_pieces("prose")[0]))
    assert 50 < len(documents) < 120
    assert 200_000 < sum(len(document.text) for document in documents) < 1_000_000
    assert 2_000 < sum(len(document.ends or ()) + 1 for document in documents) < 6_000


def test_a_python_without_sources_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=rf"{tmp_path} does not\s+hold them.*--input"):
        corpus_pieces("prose")


@pytest.mark.parametrize("name", ["prose", "code"])
def test_build(monkeypatch, tmp_path, name):
    pieces = [piece for piece in corpus_pieces(name) if piece.name.startswith("stdlib/") and piece.size < 20_000][:40]
    monkeypatch.setattr(module, "corpus_pieces", lambda corpus: pieces)
    config = BuildConfig(str(tmp_path / "out"), corpus=name, vocab_size=700, validation=0.2, workers=1)
    manifest = build(config)
    assert manifest.vocab["size"] == 700
    assert manifest.splits["train"].tokens > 5_000
    assert manifest.provenance["inputs"]["files"] == 40
    assert '"stdlib/' in (tmp_path / "out" / "inputs.jsonl").read_text().splitlines()[0]
    assert "null" not in (tmp_path / "out" / "inputs.jsonl").read_text()
    assert build(config) == Manifest.load(tmp_path / "out")


@pytest.mark.slow
def test_the_whole_prose(tmp_path):
    manifest = build(BuildConfig(str(tmp_path / "out"), corpus="prose"))
    splits = manifest.splits
    documents, sentences, tokens = (
        sum(getattr(split, name) for split in splits.values()) for name in ("documents", "sentences", "tokens")
    )
    assert 900 < documents < 2_000
    assert 30_000 < sentences < 80_000
    assert 0.7e6 < tokens < 2e6
    assert 0.02 < splits["validation"].tokens / tokens < 0.1
    assert manifest.vocab["size"] == 8192
