"""Pairs of texts: from fields and aligned files to rows in which source and target are told apart."""

from __future__ import annotations

import csv
import json
import lzma
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxpt.data.build import BuildConfig, build
from jaxpt.data.files import list_aligned
from jaxpt.data.manifest import Manifest
from jaxpt.data.pipeline import Phase, Pipeline, Source, held_out
from jaxpt.data.tokenizer import built_tokenizer, load_tokenizer
from jaxpt.types import RowSpec

PAIRS = [(f"Source number {i}. It has two sentences.", f"Ziel {i}" + " und mehr" * (i % 4)) for i in range(40)]
ROWS = RowSpec("best_fit", texts=2)


def built(tmp_path: Path, **options) -> Manifest:
    return build(BuildConfig(str(tmp_path / "out"), **{"model": "byte", "validation": 0.2, "workers": 1, **options}))


def json_lines(tmp_path: Path, records: list) -> tuple[str]:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return (str(path),)


def texts_of(manifest: Manifest, split: str = "train") -> list[tuple[str, ...]]:
    """The texts of all examples that the rows of a pipeline hold."""
    record = manifest.tokenizer
    tokenizer = load_tokenizer((manifest.path / record["file"]).read_bytes(), record["kind"], record)
    pipeline = Pipeline([Phase(0, (Source(str(manifest.path)),), 120, 4)], ROWS, seed=0, split=split)
    batches = [pipeline.batch(step) for step in range(40)]
    found = set()
    for batch in batches:
        for tokens, segments, sentences in zip(batch.tokens, batch.segment_ids, batch.sentence_ids, strict=True):
            for segment in range(1, segments.max() + 1):
                inside = segments == segment
                assert sentences[inside].max() == 1
                found.add(tuple(tokenizer.decode(tokens[inside & (sentences == side)]) for side in (0, 1)))
    return sorted(found)


@pytest.mark.parametrize("kind", ["json lines", "parquet", "csv", "tsv", "aligned", "aligned and compressed"])
def test_every_pair_arrives_as_source_and_target(tmp_path: Path, kind: str):
    if kind == "json lines":
        records = [{"meta": {"en": source}, "de": target} for source, target in PAIRS]
        manifest = built(tmp_path, input=json_lines(tmp_path, records), fields=("meta.en", "de"))
    elif kind == "parquet":
        sources, targets = zip(*PAIRS, strict=True)
        pq.write_table(pa.table({"en": sources, "de": [t.encode() for t in targets]}), tmp_path / "pairs.parquet")
        manifest = built(tmp_path, input=(str(tmp_path / "pairs.parquet"),), fields=("en", "de"))
    elif kind in ("csv", "tsv"):
        with (tmp_path / f"pairs.{kind}").open("w", newline="", encoding="utf-8-sig") as file:
            rows = [("id", "de", "en"), *((str(n), target, source) for n, (source, target) in enumerate(PAIRS))]
            if kind == "csv":
                csv.writer(file).writerows(rows)
            else:
                file.writelines("\t".join(row) + "\r\n" for row in rows)
        manifest = built(tmp_path, input=(str(tmp_path / f"pairs.{kind}"),), fields=("en", "de"))
    else:
        suffix, write = (".xz", lzma.open) if "compressed" in kind else ("", open)
        for side, name in enumerate(("text.en", "text.de")):
            with write(tmp_path / f"{name}{suffix}", "wt") as file:
                file.write("".join(pair[side] + "\n" for pair in PAIRS))
        files = tuple(str(tmp_path / f"{name}{suffix}") for name in ("text.en", "text.de"))
        manifest = built(tmp_path, aligned=files)
        lines = (tmp_path / "out" / "inputs.jsonl").read_text().splitlines()
        assert [json.loads(line)["name"] for line in lines] == list(files)
        assert all(json.loads(line)["sha256"] for line in lines)
    longest = max(len(source.encode()) + len(target.encode()) for source, target in PAIRS)
    assert manifest.texts == {"count": 2, "longest": longest, "cut": 0}
    assert Manifest.load(manifest.path).texts == manifest.texts
    assert sorted(texts_of(manifest) + texts_of(manifest, "validation")) == sorted(PAIRS)


def test_what_is_wrong_with_an_example_is_counted(tmp_path: Path):
    records = [{"source": s, "target": t} for s, t in PAIRS]
    records += [{"source": "no target"}, {"source": "", "target": "x"}, {"source": "number", "target": 3}]
    manifest = built(tmp_path, input=json_lines(tmp_path, records), fields=("source", "target"))
    reasons = {reason: entry["count"] for reason, entry in manifest.skipped.items()}
    assert reasons == {"no field 'target'": 1, "empty document": 1, "field 'target' is not text": 1}
    with pytest.raises(ValueError, match="no field 'target'"):
        built(tmp_path / "strict", input=json_lines(tmp_path, records), fields=("source", "target"), strict=True)


def test_what_is_wrong_with_a_table_is_counted_and_the_rest_is_read(tmp_path: Path):
    rows = 'en,de\none,eins\n"two\nlines, ""quoted""",zwei\n\nthree\nfour,\nfive,f\xfcnf\nsix,sechs\n'
    (tmp_path / "a.csv").write_bytes(rows.encode("latin-1"))
    manifest = built(tmp_path, input=(str(tmp_path / "a.csv"),), fields=("en", "de"), validation=0.0)
    assert texts_of(manifest) == [("one", "eins"), ("six", "sechs"), ('two\nlines, "quoted"', "zwei")]
    reasons = {reason: entry["count"] for reason, entry in manifest.skipped.items()}
    assert reasons == {"another number of columns": 1, "empty document": 1, "not Unicode text": 1}
    (tmp_path / "open.csv").write_text('en,de\none,eins\n"two,zwei\nthree,drei\n')
    manifest = built(tmp_path / "open", input=(str(tmp_path / "open.csv"),), fields=("en", "de"), validation=0.0)
    assert manifest.skipped["not CSV, nothing more is read"]["count"] == 1
    assert "after line 2" in str(manifest.skipped)
    (tmp_path / "b.tsv").write_text('de\ten\n"eins\tone "\n')  # quotes mean nothing there
    manifest = built(tmp_path / "b", input=(str(tmp_path / "b.tsv"),), fields=("en", "de"), validation=0.0)
    assert texts_of(manifest) == [('one "', '"eins')]
    with pytest.raises(ValueError, match=r"no field 'source' \(there is 'en', 'de'"):
        built(tmp_path / "c", input=(str(tmp_path / "a.csv"),), fields=("source", "de"), strict=True)


def test_blank_lines_stay_aligned(tmp_path: Path):
    (tmp_path / "a").write_text("one\n\nthree\nfour\n")
    (tmp_path / "b").write_text("eins\nzwei\ndrei\n\n")
    manifest = built(tmp_path, aligned=(str(tmp_path / "a"), str(tmp_path / "b")), validation=0.0)
    assert texts_of(manifest) == [("one", "eins"), ("three", "drei")]
    assert manifest.skipped["empty document"]["count"] == 2


@pytest.mark.parametrize("lines", [(3, 4), (4, 3)])
def test_files_of_unequal_length_are_refused(tmp_path: Path, lines: tuple[int, int]):
    for name, count in zip("ab", lines, strict=True):
        (tmp_path / name).write_text("text\n" * count)
    shorter = "a" if lines[0] == 3 else "b"
    with pytest.raises(ValueError, match=rf"not aligned: line 4 is behind the end of .*/{shorter};"):
        built(tmp_path, aligned=(str(tmp_path / "a"), str(tmp_path / "b")))


def test_patterns_pair_files_in_their_order(tmp_path: Path):
    for name in ("1.en", "2.en", "1.de", "2.de"):
        (tmp_path / name).write_text(f"{name}\n")
    sets, files = list_aligned((str(tmp_path / "*.en"), str(tmp_path / "*.de")))
    assert [(Path(p.path).name, [Path(b).name for b in p.beside]) for p in sets] == [
        ("1.en", ["1.de"]),
        ("2.en", ["2.de"]),
    ]
    assert [Path(p.path).name for p in files] == ["1.en", "2.en", "1.de", "2.de"]
    (tmp_path / "2.de").unlink()
    with pytest.raises(ValueError, match="not as many"):
        list_aligned((str(tmp_path / "*.en"), str(tmp_path / "*.de")))
    with pytest.raises(ValueError, match=r"^--aligned .*3\.en: there is no such file"):
        list_aligned((str(tmp_path / "3.en"), str(tmp_path / "1.de")))


def test_long_texts_are_skipped_or_cut_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture):
    records = [{"s": "a" * n, "t": "b" * 5} for n in (3, 8, 12)] + [{"s": "a", "t": "b" * 9}]
    options = {"input": json_lines(tmp_path, records), "fields": ("s", "t"), "validation": 0.0}
    skipped = built(tmp_path / "skip", **options, text_tokens=(8, 6))
    assert texts_of(skipped) == [("aaa", "bbbbb"), ("a" * 8, "bbbbb")]
    long = skipped.skipped["longer than --text-tokens"]
    assert long["count"] == 2
    assert [line.split(": ")[1] for line in long["examples"]] == ["line 3", "line 4"]
    cut = built(tmp_path / "cut", **options, text_tokens=(8,), long_texts="cut")
    assert texts_of(cut) == [("a", "b" * 8), ("aaa", "bbbbb"), ("a" * 8, "bbbbb")]  # the 12 are cut to 8, too
    assert cut.texts["cut"] == 2 and not cut.skipped
    assert "cut 2 examples" in capsys.readouterr().err


def test_rows_too_short_for_an_example_are_refused(tmp_path: Path):
    manifest = built(tmp_path, input=json_lines(tmp_path, [{"s": s, "t": t} for s, t in PAIRS]), fields=("s", "t"))
    phase = Phase(0, (Source(str(manifest.path)),), manifest.texts["longest"] - 1, 2)
    with pytest.raises(ValueError, match=r"the longest example of .* --text-tokens"):
        Pipeline([phase], ROWS, seed=0)


def test_documents_are_no_pairs(tmp_path: Path):
    manifest = built(tmp_path, input=json_lines(tmp_path, [{"text": source} for source, _ in PAIRS]))
    with pytest.raises(ValueError, match=r"the data in .* are documents: build pairs"):
        Pipeline([Phase(0, (Source(str(manifest.path)),), 64, 2)], ROWS, seed=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fields": ("source",)}, "--fields needs one for each text"),
        ({"aligned": ("a", "b")}, "give one of --input"),
        ({"text_tokens": (5,)}, "are for pairs"),
        ({"fields": ("s", "t"), "text_tokens": (5, 6, 7)}, "one number or 2"),
        ({"fields": ("s", "t"), "gap_scores": True}, "are for documents"),
    ],
)
def test_impossible_settings(tmp_path: Path, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        built(tmp_path, input=json_lines(tmp_path, [{"text": "x"}]), **options)


def test_plain_text_has_no_fields(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="--fields reads JSON lines, CSV, TSV and Parquet, and"):
        built(tmp_path, input=(str(tmp_path / "a.txt"),), fields=("s", "t"))


def test_a_build_of_documents_has_the_digest_that_it_had(tmp_path: Path):
    """Runs that began before there were pairs go on: neither the digest of their data nor its file changed."""
    manifest = built(tmp_path, input=json_lines(tmp_path, [{"text": source} for source, _ in PAIRS]))
    record = json.loads((manifest.path / "manifest.json").read_text())
    del record["texts"]
    (manifest.path / "manifest.json").write_text(json.dumps(record))
    assert Manifest.load(manifest.path).digest == manifest.digest
    pairs = built(tmp_path / "p", input=json_lines(tmp_path, [{"s": s, "t": t} for s, t in PAIRS]), fields=("s", "t"))
    assert np.all([pairs.digest != manifest.digest, pairs.texts["count"] == 2])


# ------------------------------------------------------------------------- several positives, hard negatives

RECORDS = [
    {
        "query": f"query {i}",
        "positives": [f"p{i}.{k}" for k in range(i % 3 + 1)],
        "negatives": ["a", "bb", "ccc"][: i % 4],
    }
    for i in range(60)
]


def examples_of(manifest: Manifest, split: str, texts: int) -> list[tuple[str, ...]]:
    """The texts of the examples that rows hold, one example per row; absent ones are empty."""
    tokenizer = built_tokenizer(manifest)
    rows = RowSpec("one_document", texts=texts)
    found = []
    for batch in held_out([Source(str(manifest.path))], rows, 60, 8, split=split):
        for tokens, segments, sentences in zip(batch.tokens, batch.segment_ids, batch.sentence_ids, strict=True):
            if segments.any():
                sides = [tokens[(segments == 1) & (sentences == side)] for side in range(texts)]
                found.append(tuple(tokenizer.decode(side) for side in sides))
    return found


@pytest.mark.parametrize("kind", ["json lines", "parquet"])
def test_every_positive_is_an_example_with_its_negatives(tmp_path: Path, kind: str):
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "r.parquet")
        given = (str(tmp_path / "r.parquet"),)
    else:
        given = json_lines(tmp_path, RECORDS)
    options = {"fields": ("query", "positives", "negatives"), "lists": "each", "negatives": 2}
    manifest = built(tmp_path, input=given, **options, validation=0.4)
    assert manifest.texts["count"] == 4
    train, held = (examples_of(manifest, split, 4) for split in ("train", "validation"))
    expected = []
    for record in RECORDS:
        pool = record["negatives"]
        for k, positive in enumerate(record["positives"]):
            taken = [pool[(2 * k + j) % len(pool)] for j in range(min(2, len(pool)))]
            expected.append((record["query"], positive, *taken, *[""] * (2 - len(taken))))
    assert sorted(train + held) == sorted(expected)
    assert not {example[0] for example in train} & {example[0] for example in held}
    assert len(train) > 20 and len(held) > 20


def test_negatives_without_lists_of_positives(tmp_path: Path):
    records = [{"q": f"q{i}", "p": ["It is.", "Yes."], "n": None if i % 2 else "no"} for i in range(30)]
    options = {"fields": ("q", "p", "n"), "negatives": 1, "text_tokens": (5, 9, 2)}
    manifest = built(tmp_path, input=json_lines(tmp_path, records), **options, long_texts="cut")
    found = sorted(examples_of(manifest, "train", 3) + examples_of(manifest, "validation", 3))
    assert found == sorted((f"q{i}", "It is. Ye", "" if i % 2 else "no") for i in range(30))  # sentences of one text
    assert manifest.texts["cut"] == 30
    with pytest.raises(ValueError, match=r"examples of 4 texts and those of .* have 3"):
        Pipeline([Phase(0, (Source(str(manifest.path)),), 60, 2)], RowSpec("one_document", texts=4), seed=0)


def test_what_is_wrong_with_lists_is_counted(tmp_path: Path):
    wrong = [{"query": "q", "positives": [], "negatives": []}, {"query": "q", "positives": ["p", 3], "negatives": []}]
    wrong += [{"query": "q", "positives": ["p", ""], "negatives": []}, {"query": "q", "positives": ["p"]}]
    options = {"fields": ("query", "positives", "negatives"), "lists": "each", "negatives": 1}
    manifest = built(tmp_path, input=json_lines(tmp_path, RECORDS + wrong), **options)
    assert {reason: entry["examples"] for reason, entry in manifest.skipped.items()} == {
        "field 'positives' is not text": [
            f"{tmp_path / 'pairs.jsonl'}: line 61: field 'positives' is not text (it is an empty list)",
            f"{tmp_path / 'pairs.jsonl'}: line 62: field 'positives' is not text (it is a int)",
        ],
        "empty document": [f"{tmp_path / 'pairs.jsonl'}: line 63: empty document"],
        "no field 'negatives'": [
            f"{tmp_path / 'pairs.jsonl'}: line 64: no field 'negatives' (there is 'query', 'positives'; choose with "
            f"--field (or --fields))"
        ],
    }
    for bad in ({"negatives": 1}, {"lists": "each"}, {"fields": ("query", "positives"), "negatives": 1}):
        with pytest.raises(ValueError, match="--negatives"):
            built(tmp_path / "bad", input=json_lines(tmp_path, RECORDS), **bad)
