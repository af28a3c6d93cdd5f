import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from jaxpt.data import build as module
from jaxpt.data import finish, jobs, parts
from jaxpt.data.build import BuildConfig, build
from jaxpt.data.manifest import Manifest, check_digest, decode_document, load_vocab
from jaxpt.data.tokenizer import load_tokenizer

DOCUMENTS = [
    f"Document number {i} begins here. " + "It goes on. " * (i % 7) + f"It ends with {i * i}." for i in range(60)
]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", (500, 1000))


def config(source, out="out", **options):
    options = {"model": "byte", "validation": 0.2, "workers": 1, **options}
    return BuildConfig(str(source.parent.parent / out), (str(source),), **options)


def content(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(Path(out).rglob("*")) if p.is_file()}


def read(manifest, split):
    """[(text, sentence ids)] of a split, in order."""
    record = manifest.tokenizer
    tokenizer = load_tokenizer((manifest.path / record["file"]).read_bytes(), record["kind"], record)
    found = []
    for shard in manifest.splits[split].shards:
        reader = ArrayRecordReader(str(manifest.path / shard.file))
        documents = [decode_document(r, manifest.token_dtype) for r in reader.read_all()] if shard.documents else []
        assert len(documents) == shard.documents == reader.num_records()
        lengths = np.load(manifest.path / shard.lengths)
        assert lengths.dtype == np.uint32 and lengths.tolist() == [len(tokens) for tokens, _ in documents]
        assert shard.tokens == lengths.sum()
        check_digest(manifest.path / shard.file, shard.sha256)
        check_digest(manifest.path / shard.lengths, shard.lengths_sha256)
        found += [(tokenizer.decode(tokens), sentences) for tokens, sentences in documents]
    return found


def split_of(text, validation):
    hashed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return "validation" if hashed / 2**64 < validation else "train"


def test_every_document_is_there_once_and_in_order(source):
    manifest = build(config(source))
    for split in ("train", "validation"):
        expected = [text for text in DOCUMENTS if split_of(text, 0.2) == split]
        found = read(manifest, split)
        assert [text for text, _ in found] == expected
        entry = manifest.splits[split]
        assert (entry.documents, entry.bytes) == (len(expected), sum(len(text.encode()) for text in expected))
        assert entry.tokens == entry.bytes  # it is a byte model
        assert entry.sentences == sum(sentences[-1] + 1 for _, sentences in found)
        for text, sentences in found:
            assert sentences[-1] + 1 == text.count(". ") + 1
            assert (np.flatnonzero(np.diff(sentences)) + 1).tolist() == [
                i + 1 for i in range(len(text)) if text[i : i + 2] == ". "
            ]
    train = "".join(text for text, _ in read(manifest, "train")).encode()
    counts = load_vocab(manifest.path).unigram_counts
    np.testing.assert_array_equal(counts[107:], np.bincount(np.frombuffer(train, np.uint8), minlength=256))


@pytest.mark.parametrize("model", ["unigram", "byte"])
def test_the_same_bytes_whatever_the_workers(source, small_parts, monkeypatch, model):
    monkeypatch.setattr(jobs, "SMALL", 0)
    options = {"model": model, "vocab_size": 420, "shard_documents": 20}
    build(config(source, "one", **options))
    build(config(source, "two", workers=2, **options))
    one, two = content(source.parent.parent / "one"), content(source.parent.parent / "two")
    assert one == two
    assert {"manifest.json", "unigram.npy", "vocab.npz", "inputs.jsonl", "train-00002.array_record"} <= one.keys()


def test_shards_keep_to_their_limits(source, small_parts):
    whole = build(config(source, "whole"))
    by_documents = build(config(source, "documents", shard_documents=7))
    for split in ("train", "validation"):
        assert {shard.documents for shard in by_documents.splits[split].shards[:-1]} == {7}
        assert [text for text, _ in read(by_documents, split)] == [text for text, _ in read(whole, split)]


def test_shards_by_size(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    rng = np.random.default_rng(0)
    all_sizes = []
    for part in range(4):
        lengths = rng.integers(1, 50, 30).astype(np.uint32)
        np.savez(work / f"part-{part:05d}.npz", train=lengths, validation=np.zeros(0, np.uint32))
        all_sizes += [4 + 2 * n + (n + 7) // 8 for n in lengths.tolist()]
    planned = parts.plan_shards(4, work, "uint16", {}, 300, 1000)
    sizes = iter(all_sizes)
    filled = [[next(sizes) for _, a, b in job.ranges for _ in range(a, b)] for job in planned]
    assert [size for shard in filled for size in shard] == all_sizes
    assert all(sum(shard) <= 300 for shard in filled)
    assert all(sum(a) + b[0] > 300 for a, b in itertools.pairwise(filled))
    assert [job.number for job in planned] == list(range(len(planned)))
    assert [len(job.ranges) for job in parts.plan_shards(4, work, "uint16", {}, 1, 1000)] == [
        1
    ] * 120  # each has its own


KILLED = """
import os, sys
from jaxpt.data import parts
from jaxpt.data.build import BuildConfig, build
parts.PART_BYTES = (500, 1000)
real, done = parts.encode_part, []
def encode_part(part):
    if len(done) == 3:
        os._exit(9)
    done.append(part)
    return real(part)
parts.encode_part = encode_part
build(BuildConfig(sys.argv[1], (sys.argv[2],), vocab_size=420, validation=0.2, workers=1))
"""


def test_a_killed_build_goes_on(source, small_parts, monkeypatch, capsys):
    out = source.parent.parent / "killed"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), str(source)], capture_output=True, check=False)
    assert killed.returncode == 9, killed.stderr
    with pytest.raises(ValueError, match="unfinished build; run the same"):
        Manifest.load(out)
    encoded = []
    real = parts._encode
    monkeypatch.setattr(parts, "_encode", lambda *given: encoded.append(given) or real(*given))
    monkeypatch.setattr(module, "train_sentencepiece", None)  # the tokenizer is kept too
    build(config(source, "killed", model="unigram", vocab_size=420))
    assert "going on with the unfinished build" in capsys.readouterr().err
    assert 0 < len(encoded) < len(DOCUMENTS)
    monkeypatch.undo()
    monkeypatch.setattr(parts, "PART_BYTES", (500, 1000))
    build(config(source, "whole", model="unigram", vocab_size=420))
    assert content(out) == content(source.parent.parent / "whole")


def test_an_unfinished_build_of_something_else_is_dropped(source, small_parts, monkeypatch, capsys):
    def fail(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "write_shard", fail)
    with pytest.raises(KeyboardInterrupt):
        build(config(source))
    monkeypatch.undo()
    source.write_text(json.dumps({"text": "x"}) + "\n" + source.read_text())
    manifest = build(config(source))
    assert "starting again" in capsys.readouterr().err
    assert sum(split.documents for split in manifest.splits.values()) == 61


def test_a_finished_build(source, capsys):
    first = build(config(source))
    before = content(first.path)
    assert build(config(source, workers=2, strict=True)) == first
    assert "built already" in capsys.readouterr().err
    assert content(first.path) == before
    with pytest.raises(ValueError, match=r"another finished data build \(validation: 0\.2 there, 0\.3 wanted\)"):
        build(config(source, validation=0.3))
    source.write_text(source.read_text() + json.dumps({"text": "one more"}))
    with pytest.raises(ValueError, match=r"another finished data build \(files: "):
        build(config(source))
    assert content(first.path) == before


def test_a_foreign_folder_is_left_alone(source):
    with pytest.raises(ValueError, match="not empty and holds no data build"):
        build(config(source, "in"))
    assert content(source.parent).keys() == {"a.jsonl"}


def test_problems_are_counted_or_refused(source, capsys):
    bad = source.parent / "b.jsonl"
    bad.write_bytes(b'{"text": "good"}\n{"text": \n{"body": 1}\n{"text": "\xff"}\n' + b'{"text": ""}\n' * 15)
    (source.parent / "empty.jsonl").write_text("")
    folder = BuildConfig(str(source.parent.parent / "out"), (str(source.parent),), model="byte", workers=1)
    manifest = build(folder)
    skipped = {reason: entry["count"] for reason, entry in manifest.skipped.items()}
    assert skipped == {"not JSON": 1, "no field 'text'": 1, "not UTF-8": 1, "empty document": 15, "empty file": 1}
    assert len(manifest.skipped["empty document"]["examples"]) == 10
    assert manifest.skipped["not UTF-8"]["examples"] == [f"{bad}: line 4: not UTF-8 (0xff at byte 49)"]
    assert sum(split.documents for split in manifest.splits.values()) == 61
    told = capsys.readouterr().err
    assert f"{bad}: line 2: not JSON" in told and "19 skipped" in told
    with pytest.raises(ValueError, match=rf"{bad}: line 2: not JSON"):
        build(dataclasses.replace(folder, out=str(source.parent.parent / "strict"), strict=True))
    assert not (source.parent.parent / "strict" / "manifest.json").exists()


def test_adding_documents_moves_none(source):
    before = build(config(source))
    more = source.parent / "more.jsonl"
    more.write_text("".join(json.dumps({"text": f"Another {i}"}) + "\n" for i in range(50)))
    options = {"model": "byte", "validation": 0.2, "workers": 1}
    after = build(BuildConfig(str(source.parent.parent / "more"), (str(source.parent),), **options))
    for split in ("train", "validation"):
        kept = {text for text, _ in read(before, split)}
        assert kept < {text for text, _ in read(after, split)}


def test_a_split_may_not_be_empty(source, tmp_path):
    single = tmp_path / "single.txt"
    single.write_text("One.\n\nTwo.\n")
    with pytest.raises(ValueError, match=r"there is one document.*--document paragraph"):
        build(config(single, "../a"))
    only_train = build(config(source, "b", validation=0.0))
    assert only_train.splits["validation"].documents == 0 and only_train.splits["validation"].shards == ()
    with pytest.raises(ValueError, match=r"none of the 60 documents.*--validation above (0\.\d+)") as error:
        build(config(source, "c", validation=1e-6))
    fraction = float(str(error.value).split("above ")[1].split()[0])
    assert build(config(source, "c", validation=fraction + 1e-4)).splits["validation"].documents == 1
    source.write_text('{"text": ""}')
    with pytest.raises(ValueError, match="not one document"):
        build(config(source, "d"))


def test_duplicates_are_counted(source, monkeypatch):
    source.write_text(source.read_text() + "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[:5] * 2))
    assert build(config(source)).provenance["duplicates"] == 10
    monkeypatch.setattr(finish, "_HASHES", 10)  # sorted range by range
    assert build(config(source, "again")).provenance["duplicates"] == 10


def test_sentences_may_be_given(source):
    source.write_text("".join(json.dumps({"sents": [f"no {i} stop", "here", "那里", "吗"]}) + "\n" for i in range(30)))
    manifest = build(config(source, field="sents"))
    text, sentences = read(manifest, "train")[0]
    assert text.startswith("no ") and text.endswith(" stop here那里吗")
    starts = [0, text.index(" here"), text.index("那"), len(text.encode()) - 3]
    assert (np.flatnonzero(np.diff(sentences, prepend=-1))).tolist() == starts


def test_inputs_are_recorded(source):
    manifest = build(config(source))
    entry = json.loads((manifest.path / "inputs.jsonl").read_text())
    assert entry == {
        "name": str(source),
        "bytes": source.stat().st_size,
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
    }
    assert manifest.provenance["inputs"]["files"] == 1
    assert manifest.provenance["settings"]["model"] == "byte"
    assert manifest.provenance["versions"]["python"]
    assert "out" not in manifest.provenance["settings"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpus": "code"}, "one of --input"),
        ({"validation": 1.0}, "--validation is a fraction"),
        ({"workers": 0}, "--workers must be at least 1"),
        ({"shard_megabytes": 0}, "--shard-megabytes must be"),
        ({"model": "bpe", "vocab_size": 100}, "--vocab-size 100 is too small"),
        ({"model": "bpe", "vocab_size": 400, "sentinels": 130}, "--vocab-size 400 is too small: 394 ids"),
        ({"sentinels": 99}, "--sentinels must be at least 100"),
        ({"tokenizer": "a.bin"}, "--tokenizer a.bin"),
    ],
)
def test_impossible_settings(source, options, message):
    with pytest.raises(ValueError, match=message):
        build(config(source, **options))
    assert not (source.parent.parent / "out").exists()  # refused before anything is read


def test_a_tokenizer_that_does_not_know_the_text_is_told(source, capsys):
    pytest.importorskip("tokenizers")
    vocab = source.parent / "vocab.txt"
    for words, warned in (
        (["It", "goes", "on", "."], True),
        (["document", *"abcdefghijklmnopqrstuvwxyz0123456789."], False),
    ):
        pieces = [*words, *(f"##{word}" for word in words)]
        vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]) + "\n")
        build(config(source, out=f"out-{warned}", tokenizer=str(vocab)))
        assert ("% of the training tokens are unknown to this tokenizer" in capsys.readouterr().err) == warned


def test_a_dead_worker_is_explained():
    with pytest.raises(RuntimeError, match=r"a worker process of the data build died.*finished parts are kept"):
        jobs.run("dying", os._exit, [1, 2], 2, jobs.SMALL)


def test_long_and_unspaced_documents(tmp_path):
    path = tmp_path / "in" / "long.txt"
    path.parent.mkdir()
    path.write_text("中文" * 300_000 + "\n" + "a" * 300_000 + "\n" + "short\n", encoding="utf-8")
    manifest = build(config(path, document="line", vocab_size=500, model="bpe", validation=0.0))
    assert [text for text, _ in read(manifest, "train")] == path.read_text().split("\n")[:-1]


def test_nothing_to_train_a_tokenizer_on_is_said_with_the_file(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"tokenizer on in .*empty.txt: the files are empty"):
        build(BuildConfig(out=str(tmp_path / "out"), input=(str(tmp_path / "empty.txt"),), workers=1))
