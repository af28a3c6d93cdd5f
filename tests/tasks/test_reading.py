"""Files of tasks: which columns are what, in which formats, and what is wrong where."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxpt.tasks.reading import read_pairs, read_scored, read_texts


def written(folder: Path, name: str, text: str) -> str:
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(Path(name).suffix, open)
    with opener(folder / name, "wt", encoding="utf-8") as file:
        file.write(text)
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'A man, "here".,Two,4.5\nThree,Four,0\n'.replace('A man, "here".', '"A man, ""here""."')),
        ("a.csv.xz", '"A man, ""here"".",Two,4.5\nThree,Four,0\n'),
        ("a.csv", 'sentence1,sentence2,score\n"A man, ""here"".",Two,4.5\n\nThree,Four,0\n'),
        ("a.tsv", '4.5\tA man, "here".\tTwo\n0\tThree\tFour\n'),  # quotes mean nothing
        ("a.tsv.gz", '4.5\tA man, "here".\tTwo\r\n0\tThree\tFour\r\n'),
        (
            "a.jsonl",
            '{"sentence1": "A man, \\"here\\".", "sentence2": "Two", "score": 4.5}\n\n'
            '{"sentence1": "Three", "sentence2": "Four", "score": "0"}\n',
        ),
    ],
)
def test_pairs_with_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str):
    found = read_scored([written(tmp_path, name, text)])
    said = capsys.readouterr().err
    assert ("line 1 is taken as a header: sentence1 | sentence2 | score" in said) == text.startswith("sentence1")
    assert found.first == ['A man, "here".', "Three"]
    assert found.second == ["Two", "Four"]
    assert found.scores is not None
    assert found.scores.tolist() == [4.5, 0.0]


def test_named_columns_and_several_files(tmp_path: Path):
    header = "id\tA\tB\tgold\tlabel\n1\tone\ttwo\t3.5\tx\n"
    records = json.dumps({"gold": 1, "A": "three", "B": "four"}) + "\n"
    files = [written(tmp_path, "a.tsv", header), written(tmp_path, "b.jsonl", records)]
    found = read_scored(files, ("A", "B", "gold"))
    assert (found.first, found.second) == (["one", "three"], ["two", "four"])
    assert found.scores is not None
    assert found.scores.tolist() == [3.5, 1.0]


def test_pairs(tmp_path: Path):
    aligned = [written(tmp_path, "v.en.xz", "One\nTwo\n"), written(tmp_path, "v.de", "Eins\nZwei")]
    columns = written(tmp_path, "v.tsv", "One\tEins\nTwo\tZwei\n")
    records = written(tmp_path, "v.jsonl", '{"source": "One", "target": "Eins"}\n{"source": "Two", "target": "Zwei"}\n')
    for files in (aligned, [columns], [records]):
        found = read_pairs(files)
        assert (found.first, found.second) == (["One", "Two"], ["Eins", "Zwei"])
    headed = [
        written(tmp_path, "h.csv", "id,en,de\n1,One,Eins\n"),
        written(tmp_path, "h.jsonl", '{"de": "Zwei", "en": "Two"}'),
    ]
    found = read_pairs(headed, ("en", "de"))
    assert (found.first, found.second) == (["One", "Two"], ["Eins", "Zwei"])
    with pytest.raises(ValueError, match="leave --columns out"):
        read_pairs(aligned, ("en", "de"))


def test_a_column_may_be_long(tmp_path: Path):
    long = "y" * 140_000  # Python's own limit is 131072
    assert read_scored([written(tmp_path, "a.csv", f"x,{long},1\n")]).second == [long]


def test_texts(tmp_path: Path):
    assert read_texts(written(tmp_path, "a.txt.xz", "One \nTwo")) == ["One ", "Two"]
    assert read_texts(written(tmp_path, "bom.txt", "\ufeffOne\nTwo\n")) == ["One", "Two"]
    assert read_texts(written(tmp_path, "a.jsonl", '{"t": "One"}\n{"t": "Two"}\n'), "t") == ["One", "Two"]
    pq.write_table(pa.table({"text": ["One", "Two"]}), tmp_path / "a.parquet")
    assert read_texts(str(tmp_path / "a.parquet")) == ["One", "Two"]
    assert read_texts(written(tmp_path, "a.fa.gz", ">p1 of men\nMKV\nLLL\n>p2\nAA\n")) == ["MKVLLL", "AA"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "1\tone\n", "line 1 has 2 columns, not 3; name those of its header"),
        ("a.tsv", "one\ttwo\tx\nthree\tfour\ty\n", "neither the first nor the last"),
        ("a.csv", "one,two,1\nthree,,2\n", "line 2: a text is empty"),
        ("a.csv", "one,two,nan\n", "neither the first nor the last.*'one | two | nan'"),
        ("a.tsv", "\tone\ttwo\n4\tthree\tfour\n", "neither the first nor the last"),  # a blank score, no header
        ("a.tsv", "a\tb\tscore\n", "nothing but a header"),
        ("a.csv", "one\ttwo\t1\n", "has 1 columns, not 3; is it separated by tabs\\? Call it .tsv"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", '{"sentence1": "one"}\n', "line 1: no text or number in 'sentence2'; there is sentence1"),
        ("a.jsonl", "{\n", "line 1 is not JSON"),
        ("a.jsonl", '{"sentence1": "a", "sentence2": "b", "score": "high"}\n', "the score 'high' is no number"),
        ("a.txt", "one\n", "told by its name"),
        ("a.tsv", "", "holds no pair"),
        ("gone.tsv", None, "there is no such file"),
    ],
)
def test_what_is_wrong_with_scored_pairs(tmp_path: Path, name: str, text: str | None, message: str):
    file = str(tmp_path / name) if text is None else written(tmp_path, name, text)
    with pytest.raises(ValueError, match=message):
        read_scored([file])


def test_what_is_wrong_with_other_files(tmp_path: Path):
    with pytest.raises(ValueError, match="not aligned: 2 and 1 lines"):
        read_pairs([written(tmp_path, "a.en", "1\n2\n"), written(tmp_path, "a.de", "1\n")])
    with pytest.raises(ValueError, match="line 2: a text is empty"):
        read_pairs([written(tmp_path, "a.en", "1\n2\n"), written(tmp_path, "a.de", "1\n\n")])
    with pytest.raises(ValueError, match="its first line has no column 'C': it has A, B"):
        read_scored([written(tmp_path, "a.tsv", "A\tB\n1\t2\n")], ("A", "B", "C"))
    with pytest.raises(ValueError, match=r"line 2: no field 'text' \(there is 'id', 'said'; choose with --field"):
        read_texts(written(tmp_path, "a.csv.gz", "id,said\n1,one\n"))
    with pytest.raises(ValueError, match=r"line 2: no row below the names of the columns \(1, one\)"):
        read_texts(written(tmp_path, "a.tsv", "1\tone\n\n"))
    assert read_texts(written(tmp_path, "a.csv.gz", "id,said\n1,one\n"), "said") == ["one"]
    with pytest.raises(ValueError, match="line 1: no FASTA header"):
        read_texts(written(tmp_path, "a.fa", "MKV\n>p1\nMKV\n"))
    with pytest.raises(ValueError, match="has 3 columns, not 2; name those of its header: --columns TEXT TEXT"):
        read_pairs([written(tmp_path, "a.tsv", "A\tB\tC\n")])
    with pytest.raises(ValueError, match="line 2 is blank"):
        read_texts(written(tmp_path, "a.txt", "one\n\ntwo\n"))
    with pytest.raises(ValueError, match="line 1: no field 'text'"):
        read_texts(written(tmp_path, "a.jsonl", '{"t": "x"}\n'))
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(ValueError, match="line 2 is not UTF-8"):
        read_texts(str(tmp_path / "bad.txt"))
    whole = Path(written(tmp_path, "cut.txt.xz", "one\n" * 1000)).read_bytes()
    (tmp_path / "cut.txt.xz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="damaged"):
        read_texts(str(tmp_path / "cut.txt.xz"))
