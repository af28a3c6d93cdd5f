import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpt.data.build import BuildConfig, build
from jaxpt.data.manifest import Manifest, check_digest, decode_document, encode_document, load_vocab, sha256


def test_record_layout():
    tokens = np.array([1, 515, 65535, 0, 9, 9, 9, 9, 258], np.uint16)
    starts = np.array([1, 0, 0, 1, 0, 0, 0, 0, 1], bool)
    literal = bytes.fromhex("09000000 0100 0302 ffff 0000 0900 0900 0900 0900 0201 90 80".replace(" ", ""))
    assert encode_document(tokens, starts) == literal
    decoded, sentences = decode_document(literal, "uint16")
    assert decoded.tolist() == tokens.tolist()
    assert sentences.dtype == np.int32
    assert sentences.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 2]


@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.booleans()), min_size=1, max_size=40),
    st.sampled_from(["uint16", "uint32"]),
)
def test_records_round_trip(items, dtype):
    tokens = np.array([token for token, _ in items]).astype(dtype)
    starts = np.array([start for _, start in items])
    starts[0] = True
    decoded, sentences = decode_document(encode_document(tokens, starts), dtype)
    np.testing.assert_array_equal(decoded, tokens)
    np.testing.assert_array_equal(np.diff(sentences, prepend=-1), starts)


def test_a_record_of_another_size_is_refused():
    record = encode_document(np.array([1, 2], np.uint16), np.array([True, False]))
    for wrong in (record[:-1], record + b"\0", b"\0\0\0\0", b""):
        with pytest.raises(ValueError, match="cannot hold a document"):
            decode_document(wrong, "uint16")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "in.txt").write_text("".join(f"This is line {i}. It has two sentences.\n" for i in range(40)))
    out = folder / "out"
    build(BuildConfig(str(out), (str(folder / "in.txt"),), document="line", model="byte", validation=0.2, workers=1))
    return out


def test_manifest_round_trip(tiny):
    manifest = Manifest.load(tiny)
    again = json.loads((tiny / "manifest.json").read_text())
    manifest.save()
    assert json.loads((tiny / "manifest.json").read_text()) == again
    assert again["format"] == 1
    assert Manifest.load(tiny).digest == manifest.digest
    assert {split.documents for split in manifest.splits.values()} != {0}


def test_load_vocab(tiny):
    vocab = load_vocab(tiny)
    assert vocab.size == 363 == len(vocab.is_special) == len(vocab.unigram_counts)
    assert vocab.mask == 6 and vocab.sentinels == tuple(range(7, 107))
    assert vocab.unigram_counts.sum() == Manifest.load(tiny).splits["train"].tokens
    assert vocab.unigram_counts[vocab.is_special].sum() == 0


def test_digests(tiny, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    assert sha256(file) == hashlib.sha256(b"abc").hexdigest()
    check_digest(file, sha256(file))
    with pytest.raises(ValueError, match=r"file does not match its digest"):
        check_digest(file, "0" * 64)
    with pytest.raises(ValueError, match="missing"):
        check_digest(tmp_path / "absent", "0" * 64)
    damaged = bytearray((tiny / "unigram.npy").read_bytes())
    damaged[-1] ^= 1
    whole = (tiny / "unigram.npy").read_bytes()
    (tiny / "unigram.npy").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"unigram\.npy does not match"):
        load_vocab(tiny)
    (tiny / "unigram.npy").write_bytes(whole)


def test_what_is_no_build_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no finished data build.*there is nothing"):
        Manifest.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="run the same `jaxpt data build` again"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1, "vocab"')
    with pytest.raises(ValueError, match="damaged"):
        Manifest.load(tmp_path)
