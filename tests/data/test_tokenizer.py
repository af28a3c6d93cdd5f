import json
import string
import sys

import numpy as np
import pytest

import jaxpt.data.tokenizer as module
from jaxpt.data.tokenizer import byte_tokenizer, load_tokenizer, open_tokenizer, sentencepiece_tokenizer
from jaxpt.data.train_tokenizer import Sample, chunked, train_sentencepiece
from jaxpt.data.vocabulary import byte_level_table, starts_word

EXAMPLES = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind.\nThen the fox goes home again.",
    "深度学习模型需要大量的数据。模型学习语言的规律，语言的规律在数据里。",
    "def forward(self, inputs):\n    return self.layers(inputs)  # the quick path",
] * 5
HARD = "Hello  wörld, don't!\n\n  x\t中文学习。😀\0 <mask> </s> [MASK] \x7f ends "


@pytest.fixture(scope="module", params=["unigram", "bpe", "char", "byte"])
def tokenizer(request):
    if request.param == "byte":
        return byte_tokenizer()
    return sentencepiece_tokenizer(train_sentencepiece(EXAMPLES, 480, request.param))


@pytest.fixture(scope="module")
def bpe():
    return sentencepiece_tokenizer(train_sentencepiece(EXAMPLES, 480, "bpe"))


def words(tokenizer, text):
    ids, _ = tokenizer.encode(text)
    groups = []
    for i in ids:
        if tokenizer.starts_word[i] or not groups:
            groups.append([])
        groups[-1].append(i)
    return [tokenizer.decode(group).strip() for group in groups if tokenizer.decode(group).strip()]


def test_text_survives_and_is_never_special(tokenizer):
    ids, begins = tokenizer.encode(HARD)
    assert tokenizer.decode(ids) == HARD
    assert not tokenizer.is_special[ids].any()
    assert begins[0] == 0 and (np.diff(begins) >= 0).all() and begins[-1] < len(HARD)
    assert tokenizer.token_bytes[ids].sum() - len(HARD.encode()) in (0, 1)  # 1: the space that is put before it


def test_offsets_are_those_of_the_characters(tokenizer):
    ids, begins = tokenizer.encode(HARD)
    ends = [*begins[1:], len(HARD)]
    for i, begin, end in zip(ids, begins, ends, strict=True):
        text = tokenizer.decode([i])
        if end > begin and "\ufffd" not in text and tokenizer.token_bytes[i] > 1:
            assert HARD[begin:end].strip() == text.strip()


def test_special_tokens_have_their_places(tokenizer):
    assert tokenizer.special == {"pad": 0, "unk": 1, "bos": 2, "eos": 3, "cls": 4, "sep": 5, "mask": 6}
    assert tokenizer.sentinels == tuple(range(7, 107))
    assert tokenizer.is_special.sum() == 107
    assert tokenizer.vocab["size"] == tokenizer.size == len(tokenizer.starts_word) == len(tokenizer.token_bytes)
    assert not tokenizer.starts_word[tokenizer.is_special].any()
    assert tokenizer.decode([0, 2, 6, 7, *tokenizer.encode("dog")[0], 3]) == "dog"


def test_as_many_sentinels_as_are_asked_for(tmp_path, bpe):
    trained = sentencepiece_tokenizer(train_sentencepiece(EXAMPLES, 560, "bpe", 130), 130)
    (tmp_path / "their.model").write_bytes(bpe.data)
    given = open_tokenizer(str(tmp_path / "their.model"), sentinels=130)
    for tokenizer in (trained, given, byte_tokenizer(130)):
        added = tuple(range(bpe.size, bpe.size + 30)) if tokenizer is given else tuple(range(107, 137))
        assert tokenizer.sentinels == tuple(range(7, 107)) + added
        assert tokenizer.is_special.sum() == 137
        again = load_tokenizer(tokenizer.data, tokenizer.kind, tokenizer.options)  # as from the manifest
        assert (again.sentinels, again.size, again.name(added[-1])) == (
            tokenizer.sentinels,
            tokenizer.size,
            "<extra_id_129>",
        )
        assert again.encode(HARD)[0].tolist() == tokenizer.encode(HARD)[0].tolist()
    assert byte_tokenizer(130).data != byte_tokenizer().data and byte_tokenizer().options == bpe.options == {}
    assert sentencepiece_tokenizer(trained.data).sentinels == trained.sentinels  # it keeps what it has


def test_words(tokenizer):
    assert words(tokenizer, "The dog doesn't\nmind, again (twice)") == [
        "The", "dog", "doesn't", "mind", ",", "again", "(twice", ")",
    ]  # fmt: skip
    chinese = words(tokenizer, "模型学习语言")
    assert "".join(chinese) == "模型学习语言"
    if tokenizer.kind == "byte":
        assert chinese == list("模型学习语言")
    else:  # every piece is a word; a rare character in bytes is one
        assert len(chinese) > 1 and max(map(len, chinese)) <= 4


def test_starts_word_of_pieces():
    yes = [" the", "\n", "\t", ",", "«", "中国", "カ", "ก", "。", "（", "—", "\u3000", "😀"]
    no = ["the", "s", "'", "'s", "’s", "é", "д", "ा", "ั", "한", "1", ""]
    assert [starts_word(piece.encode()) for piece in yes + no] == [True] * len(yes) + [False] * len(no)
    assert [starts_word(bytes([b])) for b in (0xE4, 0xF0, 0xC3, 0xD0, 0xB8)] == [True, True, False, False, False]


def test_long_texts_are_encoded_as_a_whole(bpe, monkeypatch):
    rng = np.random.default_rng(0)
    text = "".join(EXAMPLES[i % 3] + " " * int(rng.integers(3)) + "\n" * int(rng.integers(2)) for i in range(200))
    unspaced = "".join(rng.choice(list("深度学习模型需要大量的数据规律语言"), 20_000))
    letters = "".join(rng.choice(list(string.ascii_letters), 20_000))
    for tokenizer in (bpe, byte_tokenizer()):
        for long in (text, unspaced, letters):
            ids, begins = tokenizer.encode(long)
            with monkeypatch.context() as patch:
                patch.setattr(module, "_WINDOW", 2000)
                patch.setattr(module, "_OVERLAP", 400)
                pieced_ids, pieced_begins = tokenizer.encode(long)
            np.testing.assert_array_equal(pieced_ids, ids)
            np.testing.assert_array_equal(pieced_begins, begins)


# ------------------------------------------------------------------------------------------- training


def test_training_keeps_to_the_size():
    for model, size in [("unigram", 420), ("bpe", 440), ("char", 410)]:
        trained = sentencepiece_tokenizer(train_sentencepiece(EXAMPLES, size, model)).size
        assert trained == size or (model == "unigram" and 390 < trained < size)  # so little text prunes further
    small = sentencepiece_tokenizer(train_sentencepiece(["ACGT", "AACCGGTT"], 8192, "char"))
    assert small.size == 364 + 4
    np.testing.assert_array_equal(small.encode("GATTACA")[1], range(7))


def test_training_depends_on_the_text_only():
    models = [train_sentencepiece(EXAMPLES, 450, "unigram") for _ in range(2)]
    assert models[0] == models[1]


def test_rare_characters_are_written_in_bytes():
    han = "".join(chr(0x4E00 + i) for i in range(3000))
    tokenizer = sentencepiece_tokenizer(train_sentencepiece([han, EXAMPLES[1], EXAMPLES[1]], 600, "unigram"))
    assert 400 < tokenizer.size <= 600
    assert tokenizer.decode(tokenizer.encode(han)[0]) == han
    assert not (tokenizer.encode(han)[0] == tokenizer.special["unk"]).any()


def test_impossible_training_is_explained():
    with pytest.raises(ValueError, match="300 is too small: 364 ids"):
        train_sentencepiece(EXAMPLES, 300, "unigram")
    with pytest.raises(ValueError, match="420 is too small: 394 ids go to the special tokens, 130 sentinels"):
        train_sentencepiece(EXAMPLES, 420, "unigram", 130)
    with pytest.raises(ValueError, match="no text"):
        train_sentencepiece(["\n"], 500, "bpe")


def test_the_sample_does_not_depend_on_the_order():
    chunks = [f"chunk {i} " * (i % 5 + 1) for i in range(200)]
    samples = []
    for order in (chunks, chunks[::-1], chunks[100:] + chunks):
        sample = Sample(1000)
        for chunk in order:
            sample.add(chunk)
        samples.append(sample.chunks())
    assert samples[0] == samples[1] == samples[2]
    total = sum(map(len, samples[0]))
    assert total >= 1000 > total - len(samples[0][-1])
    everything = Sample(10**6)
    for chunk in chunks:
        everything.add(chunk)
    assert sorted(everything.chunks()) == sorted(chunks)
    assert everything.chunks()[: len(samples[0])] == samples[0]


def test_chunks_lose_only_spaces():
    for text in ("word " * 1000, "无" * 2000, "a\n" * 900, "", "short"):
        pieces = list(chunked(text))
        assert "".join(pieces).replace(" ", "") == text.replace(" ", "")
        assert all(len(piece) <= 512 for piece in pieces)


# ------------------------------------------------------------------------------------- users' own files


def test_a_model_file_without_special_tokens(tmp_path, bpe):
    import io

    import sentencepiece

    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(EXAMPLES), model_writer=writer, vocab_size=150, minloglevel=2,
        user_defined_symbols=["▁<extra_id_1>", "▁<extra_id_0>"], hard_vocab_limit=False,
    )  # fmt: skip
    path = tmp_path / "their.model"
    path.write_bytes(writer.getvalue())
    tokenizer = open_tokenizer(str(path))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=writer.getvalue())
    base = pieces.get_piece_size()
    special = tokenizer.special
    assert (special["unk"], special["bos"], special["eos"]) == (0, 1, 2)
    assert [special[name] for name in ("pad", "cls", "sep", "mask")] == [base, base + 1, base + 2, base + 3]
    assert tokenizer.sentinels == (4, 3, *range(base + 4, base + 102))
    assert tokenizer.size == base + 102
    text = "The quick brown fox"
    assert tokenizer.encode(text)[0].tolist() == pieces.encode(text)
    assert words(tokenizer, text) == text.split()
    again = load_tokenizer(tokenizer.data, tokenizer.kind, tokenizer.options)
    np.testing.assert_array_equal(again.starts_word, tokenizer.starts_word)


WORDPIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "aff", "it", "'", "s", "!", "##s"]
WORDPIECES += ["中", "国", "cafe", "[", "]", "mask", "a"]


def greedy(word, vocabulary):
    """WordPiece as the BERT paper's code defines it: longest match first."""
    pieces, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:end]
            if piece in vocabulary:
                pieces.append(vocabulary.index(piece))
                start = end
                break
        else:
            return [vocabulary.index("[UNK]")]
    return pieces


def test_wordpiece(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(WORDPIECES) + "\n", encoding="utf-8")
    tokenizer = open_tokenizer(str(path))
    assert tokenizer.options == {"lowercase": "true"}
    text = "Unaffable it's 中国 CAFÉ zebra [MASK] its!"
    split = ["unaffable", "it", "'", "s", "中", "国", "cafe", "zebra", "[", "mask", "]", "its", "!"]
    ids, begins = tokenizer.encode(text)
    assert ids.tolist() == [i for word in split for i in greedy(word, WORDPIECES)]
    first = [
        text.lower().index(word) for word in ("un", "aff", "able", "it", "'", "s ", "中", "国", "caf", "zebra", "[")
    ]
    assert begins.tolist()[:11] == first
    assert words(tokenizer, "unaffable its") == ["unaffable", "its"]
    assert tokenizer.special == {"pad": 0, "unk": 1, "bos": 21, "eos": 22, "cls": 2, "sep": 3, "mask": 4}
    assert tokenizer.size == 123
    again = load_tokenizer(tokenizer.data, "wordpiece", tokenizer.options)
    np.testing.assert_array_equal(again.encode(text)[0], ids)
    cased = open_tokenizer(str(path), lowercase=False)
    assert cased.encode("IT it")[0].tolist() == [1, 9]
    path.write_text("\n".join([*WORDPIECES, "Rome"]), encoding="utf-8")
    assert open_tokenizer(str(path)).options == {"lowercase": "false"}


def hf_file(tmp_path, model, special=(), **parts):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.add_special_tokens(list(special))
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return open_tokenizer(str(tmp_path / "tokenizer.json"))


def test_byte_level_tokenizer_json(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    table = byte_level_table()
    assert sorted(table.values()) == list(range(256))
    assert set(table) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(sorted(table))} | {"th": 256, "the": 257, "Ġthe": 258, "<s>": 259}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    tokenizer = hf_file(
        tmp_path,
        tokenizers.models.BPE(vocabulary, merges),
        ["<|endoftext|>", "<mask>"],
        pre_tokenizer=tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=tokenizers.decoders.ByteLevel(),
    )
    text = "the the\n中 é's <|endoftext|> <mask>"
    ids, begins = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not tokenizer.is_special[ids].any()
    assert ids[:2].tolist() == [257, 258] and begins[:3].tolist() == [0, 3, 7]
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert words(tokenizer, "the the\nthe 中国 don't, x") == ["the", "the", "the", "中", "国", "don't", ",", "x"]
    assert tokenizer.special["eos"] == tokenizer.special["bos"] == 260  # "<s>" is a piece of text here
    assert tokenizer.special["mask"] == 261
    assert tokenizer.size == 262 + 2 + 100 + 2  # pad, unk; sentinels; cls, sep


def test_roberta_names(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = hf_file(
        tmp_path,
        tokenizers.models.BPE({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4, "<mask>": 5}, []),
        ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    )
    assert tokenizer.special == {"pad": 1, "unk": 3, "bos": 0, "eos": 2, "cls": 0, "sep": 2, "mask": 5}


def test_wordpiece_and_metaspace_tokenizer_json(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {piece: i for i, piece in enumerate(WORDPIECES)}
    tokenizer = hf_file(
        tmp_path,
        tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"),
        WORDPIECES[:5],
        normalizer=tokenizers.normalizers.BertNormalizer(),
        pre_tokenizer=tokenizers.pre_tokenizers.BertPreTokenizer(),
    )
    assert tokenizer.special["cls"] == 2
    assert len(tokenizer.encode("it's its 中国 unaffable")[0]) == 10  # the file's truncation to 4 is not for us
    assert words(tokenizer, "unaffable its") == ["un ##aff ##able", "it ##s"]
    assert tokenizer.token_bytes[[5, 6]].tolist() == [2, 3]
    tokenizer = hf_file(
        tmp_path,
        tokenizers.models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -1.0), ("<0x0A>", -1.0), ("▁", -2.0)], unk_id=0),
        pre_tokenizer=tokenizers.pre_tokenizers.Metaspace(),
        decoder=tokenizers.decoders.Metaspace(),
    )
    assert tokenizer.starts_word[:5].tolist() == [False, True, False, True, True]
    assert tokenizer.token_bytes[:5].tolist()[1:] == [2, 1, 1, 1]
    assert tokenizer.encode("a ab")[0].tolist() == [1, 1, 2]


def test_unusable_files_are_explained(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"SentencePiece \.model files"):
        open_tokenizer("vocab.bpe")
    with pytest.raises(ValueError, match=r"absent\.model"):
        open_tokenizer(str(tmp_path / "absent.model"))
    for name, message in [
        ("a.model", "no SentencePiece"),
        ("a.json", r"no Hugging Face"),
        ("a.txt", r"no line \[UNK\]"),
    ]:
        (tmp_path / name).write_text(json.dumps({"text": "nothing"}))
        with pytest.raises(ValueError, match=message):
            open_tokenizer(str(tmp_path / name))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for name in ("a.json", "a.txt"):
        with pytest.raises(ValueError, match=r'pip install "jaxpt\[hf\]"'):
            open_tokenizer(str(tmp_path / name))
