import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import jaxpt.data.text as text_module
from jaxpt.data.files import Piece, format_of, list_inputs, split_piece
from jaxpt.data.sentences import Document
from jaxpt.data.text import Problem, read_piece

COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def read(path, **options):
    (piece,) = list_inputs((str(path),))
    return list(read_piece(piece, **options))


def texts(items):
    assert all(isinstance(item, Document) for item in items), items
    return [item.text for item in items]


def problems(items):
    return [(item.where, item.reason) for item in items if isinstance(item, Problem)]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_one_file_is_one_document(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix]("\ufeffOne.\r\n\r\nTwo \0 中文.\n".encode()))
    assert texts(read(path)) == ["One.\n\nTwo \0 中文.\n"]
    assert texts(read(path, unit="paragraph")) == ["One.", "Two \0 中文."]
    assert texts(read(path, unit="line")) == ["One.", "Two \0 中文."]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    records = [{"text": "a\u2028b\nc"}, {"text": ["One.", "Two."]}, {"text": ""}, {"body": "x"}, {"text": 3}, ["text"]]
    lines = [json.dumps(record, ensure_ascii=False).encode() for record in records]
    lines += [b"", b'{"text": "x', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b'{"text": "last"}']
    path.write_bytes(COMPRESS[suffix](b"\n".join(lines)))
    items = read(path)
    assert texts([item for item in items if isinstance(item, Document)]) == ["a\u2028b\nc", "One. Two.", "last"]
    assert items[1] == Document("One. Two.", (4,))
    assert problems(items) == [
        ("line 3", "empty document"),
        ("line 4", "no field 'text'"),
        ("line 5", "field 'text' is not text"),
        ("line 6", "no field 'text'"),
        ("line 8", "not JSON"),
        ("line 9", "not UTF-8"),
        ("line 10", "not Unicode text"),
    ]
    at_byte = sum(len(line) + 1 for line in lines[:8]) + lines[8].index(b"\xff")
    assert f"at byte {at_byte}" in next(item.detail for item in items if item[0] == "line 9")


def test_fields_may_be_nested(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"meta": {"body": "deep"}}\n{"meta.body": "flat"}\n{"meta": "x"}\n')
    items = read(path, field="meta.body")
    assert texts(items[:2]) == ["deep", "flat"]
    assert problems(items) == [("line 3", "no field 'meta.body'")]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
def test_truncated_archives_are_named(tmp_path, suffix):
    lines = [json.dumps({"text": f"{i} {i**9} {i**7} {i**11}"}) for i in range(4_000)]
    whole = COMPRESS[suffix]("\n".join(lines).encode())
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(whole[: len(whole) // 2])
    items = read(path)
    assert problems(items)[-1][1] == "truncated or damaged archive"
    assert problems(items)[-1][0] == f"after line {len(items) - 1}" if len(items) > 1 else "after the start"
    assert texts(items[:-1]) == [json.loads(line)["text"] for line in lines[: len(items) - 1]]
    path.write_bytes(b"no archive at all")
    assert [item.reason for item in read(path)] == ["truncated or damaged archive"]  # type: ignore[union-attr]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(whole[: len(whole) // 2])
    assert [item.reason for item in read(path)] == ["truncated or damaged archive"]  # type: ignore[union-attr]


def test_zstandard_frames_follow_each_other(tmp_path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"".join(COMPRESS[".zst"](word) for word in (b"one ", b"two ", b"three")))
    assert texts(read(path)) == ["one two three"]


def test_bad_text_files_are_named(tmp_path):
    path = tmp_path / "a.txt"
    for data, reason, detail in [
        (b"good\nbad \xff", "not UTF-8", "0xff at byte 9"),
        ("x".encode("utf-16"), "not UTF-8", "looks like UTF-16"),
        (b" \n\t", "empty document", ""),
        (b"", "empty document", ""),
    ]:
        path.write_bytes(data)
        (problem,) = read(path)
        assert isinstance(problem, Problem) and problem.reason == reason and detail in problem.detail
    path.write_bytes(b"")
    assert problems(read(path, unit="line")) == [("file", "empty file")]
    path.write_bytes(b"good\nbad \xff\ngood")
    assert problems(read(path, unit="line")) == [("line 2", "not UTF-8")]


def test_a_long_file_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "LONGEST", 100)
    path = tmp_path / "a.txt"
    for content in ("".join(f"line {i} 中文\n" for i in range(100)), "中" * 1000, "a" * 100, "a" * 101):
        path.write_text(content, encoding="utf-8")
        documents = texts(read(path))
        assert "".join(documents) == content
        assert all(len(document.encode()) <= 100 for document in documents)
        assert len(documents) == 1 or all(d.endswith("\n") for d in documents) == ("\n" in content)


def test_fasta(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_bytes(b"; note\n>one first\nMAS VS\nIS*\n\n>two\n>three\n; note\nAC\r\nGT\n>four\nA\xffC\n")
    items = read(path)
    assert texts([items[0], items[2]]) == ["MASVSIS*", "ACGT"]
    assert problems(items) == [("line 6 >two", "empty document"), ("line 11 >four", "not UTF-8")]
    path.write_bytes(b"ACGT\n>one\nAC\n")
    assert problems(read(path)) == [("line 1", "no FASTA header before the sequence")]


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [f"text {i}" for i in range(100)] + [None, ""]
    pq.write_table(pa.table({"text": rows, "n": range(102)}), path, row_group_size=10)
    items = read(path)
    assert texts(items[:100]) == rows[:100]
    assert problems(items) == [("row 101", "field 'text' is not text"), ("row 102", "empty document")]
    (piece,) = list_inputs((str(path),))
    parts = split_piece(piece, "file", piece.size // 4)
    assert len(parts) >= 4
    assert [item for part in parts for item in read_piece(part)] == items
    assert problems(read(path, field="body")) == [("file", "no field 'body'")]
    pq.write_table(pa.table({"s": [["One.", "Two."]], "b": [b"bytes"], "d": [{"x": "deep"}]}), path)
    assert read(path, field="s") == [Document("One. Two.", (4,))]
    assert texts(read(path, field="b") + read(path, field="d.x")) == ["bytes", "deep"]
    path.write_bytes(path.read_bytes()[:-20])
    assert problems(read(path)) == [("after file", "truncated or damaged Parquet file")]


@pytest.mark.parametrize(
    ("name", "content", "unit"),
    [
        ("a.jsonl", "".join(json.dumps({"text": "é" * (i % 17 + 1) + str(i)}) + "\n" for i in range(50)), "file"),
        ("a.txt", "".join(f"{i} " * (i % 5 + 1) + "\n" for i in range(60)), "line"),
        ("a.txt", "".join(f"{i}\n" * (i % 4) + "\n" * (i % 3) for i in range(60)), "paragraph"),
        ("a.fa", "".join(f">{i}\n" + "ACGT\n" * (i % 4 + 1) for i in range(40)), "file"),
    ],
)
def test_every_cut_gives_the_same_documents(tmp_path, name, content, unit):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    (piece,) = list_inputs((str(path),))
    whole = texts(list(read_piece(piece, unit=unit)))
    assert len(whole) > 20
    for size in (7, 16, 33, 100):
        parts = split_piece(piece, unit, size)
        assert len(parts) > 2 and parts[-1].end == piece.size
        assert texts([item for part in parts for item in read_piece(part, unit=unit)]) == whole


def test_what_cannot_be_cut_is_not(tmp_path):
    for name, unit in [("a.txt", "file"), ("a.jsonl.gz", "line"), ("a.txt.zst", "paragraph")]:
        piece = Piece(name, name, format_of(name), 1 << 30)
        assert split_piece(piece, unit, 1 << 20) == [piece]


def test_list_inputs(tmp_path):
    for name in ("b.py", "a/c.py", "a/data.json", ".git/config", "a/.hidden.py", "a/b/d.TXT.GZ"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(*inputs, **options):
        return [piece.name.removeprefix(f"{tmp_path}/") for piece in list_inputs(inputs, **options)]

    root = str(tmp_path)
    assert names(root) == ["a/b/d.TXT.GZ", "a/c.py", "a/data.json", "b.py"]
    assert names(root, include=("*.py",)) == ["a/c.py", "b.py"]
    assert names(f"{root}/b.py", root, include=("*.py",)) == ["b.py", "a/c.py"]
    assert names(f"{root}/a/*.py") == ["a/c.py"]
    assert [piece.format for piece in list_inputs((root,))] == ["text", "text", "jsonl", "text"]
    assert {piece.format for piece in list_inputs((root,), "text")} == {"text"}
    for absent in ("absent.txt", "*.absent"):
        with pytest.raises(ValueError, match="there is no such file"):
            list_inputs((f"{root}/{absent}",))
    with pytest.raises(ValueError, match=r"no file that matches \*\.c"):
        list_inputs((root,), include=("*.c",))
