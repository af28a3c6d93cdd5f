"""Tokenizers behind one interface: token ids with character offsets, and what objectives ask of a vocabulary.

SentencePiece models, plain bytes, Hugging Face `tokenizer.json` and WordPiece `vocab.txt`. Special tokens that a
vocabulary lacks (padding, begin, end, CLS, SEP, MASK and 100 sentinels, or more) are added behind it, so that every
objective finds them; text is never encoded to a special token, whatever it says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath

from jaxpt.data.manifest import Manifest
from jaxpt.data.vocabulary import NAMES, SENTINELS, byte_level_table, find_special, starts_word

_WINDOW = 1 << 18  # characters that are encoded at once; longer texts are encoded in overlapping windows
_OVERLAP = 1 << 12

Encoding = tuple[np.ndarray, np.ndarray]  # ids [n] i32, and the character offsets at which they begin [n] i64


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and its vocabulary.

    Args:
      kind: "sentencepiece", "hf", "wordpiece" or "byte".
      file_name: how its file is called in a data build.
      data: the content of that file.
      options: what else it takes to load it again.
      special: ids of pad, unk, bos, eos, cls, sep and mask.
      sentinels: ids of the sentinels, in the order of use.
      is_special: [V] bool; tokens that stand for no text, and the unknown token.
      starts_word: [V] bool; the first token of a document starts a word too, whatever it is.
      token_bytes: [V] int32; UTF-8 bytes of the text that a token stands for, 0 for special tokens.
      encode_window: text -> Encoding, for texts of moderate length.
      decode_ids: ids without special tokens -> text.
      pieces: how the vocabulary writes its tokens, by id; special tokens that were added behind it are not there.
      texts: what they stand for, or nothing where a piece alone says more ("##ing").
    """

    kind: str
    file_name: str
    data: bytes
    special: Mapping[str, int]
    sentinels: tuple[int, ...]
    is_special: np.ndarray
    starts_word: np.ndarray
    token_bytes: np.ndarray
    encode_window: Callable[[str], Encoding]
    decode_ids: Callable[[list[int]], str]
    pieces: Sequence[str]
    texts: Sequence[bytes] | None
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of ids, special tokens that were added included."""
        return len(self.is_special)

    @property
    def vocab(self) -> dict[str, Any]:
        """The entry "vocab" of the manifest."""
        return {"size": self.size, **self.special, "sentinels": list(self.sentinels)}

    def encode(self, text: str) -> Encoding:
        """Encode a text of any length as a whole: ids [n] int32 and the offsets (characters) where they begin."""
        if len(text) <= _WINDOW:
            return self.encode_window(text)
        return _join_windows(self.encode_window, text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids; special tokens are left out."""
        return self.decode_ids([int(i) for i in ids if not self.is_special[i]])

    def name(self, token: int) -> str:
        """One token for a person to read: spaces are "▁", line ends "↵", bytes "<0xE3>", special tokens as "[MASK]".

        >>> tokenizer = byte_tokenizer()
        >>> [tokenizer.name(token) for token in [6, 7, 139, 117, 208, 302]]
        ['[MASK]', '<extra_id_0>', '▁', '↵', 'e', '<0xC3>']
        """
        if not 0 <= token < self.size:
            return f"<{token}>"  # no token: a filler
        if self.is_special[token]:
            return self._special_name(token)
        if self.texts is None:
            return self.pieces[token]
        try:
            text = self.texts[token].decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in self.texts[token])
        text = text.translate({ord(" "): "▁", ord("\n"): "↵", ord("\t"): "⇥"})
        return "".join(c if c.isprintable() else f"<U+{ord(c):04X}>" for c in text)

    def _special_name(self, token: int) -> str:
        """The name that the vocabulary gives a special token, in capitals and brackets if it is one of the usual."""
        piece = self.pieces[token] if token < len(self.pieces) else ""
        if token in self.sentinels:
            return piece or f"<extra_id_{self.sentinels.index(token)}>"
        roles = [role for role, at in self.special.items() if at == token]
        usual = [role for role in roles if not piece or piece in (f"<{role}>", f"[{role.upper()}]")]
        return f"[{usual[0].upper()}]" if usual else piece


def _join_windows(encode: Callable[[str], Encoding], text: str) -> Encoding:
    """Encode window by window and join them where both agree on a token's beginning, far from their edges.

    Tokenizers decide by a neighbourhood of a few words, so that this is the encoding of the whole text, in
    bounded memory.
    """
    all_ids, all_begins = [], []
    start = 0  # of the window
    joint = 0  # everything before is done
    while True:
        stop = min(start + _WINDOW, len(text))
        ids, begins = encode(text[start:stop])
        begins = begins + start
        keep = begins >= joint if joint else np.ones(len(begins), bool)
        if stop == len(text):
            all_ids.append(ids[keep])
            all_begins.append(begins[keep])
            return np.concatenate(all_ids), np.concatenate(all_begins)
        following = stop - _OVERLAP
        ahead = encode(text[following : following + 2 * _OVERLAP])[1] + following
        middle = stop - _OVERLAP // 2
        common = np.intersect1d(begins, ahead)
        common = common[(common > stop - _OVERLAP * 3 // 4) & (common < stop - _OVERLAP // 4)]
        cut = int(common[np.argmin(abs(common - middle))]) if len(common) else middle
        keep &= begins < cut
        all_ids.append(ids[keep])
        all_begins.append(begins[keep])
        start, joint = following, cut


def _build(
    pieces: Sequence[str],
    texts: Sequence[bytes],
    known: Mapping[str, int],
    control: Sequence[int],
    starts: Sequence[bool] | None = None,
    named: Sequence[int] | None = None,
    sentinels: int = SENTINELS,
    options: Mapping[str, str] | None = None,
    **rest: Any,
) -> Tokenizer:
    """A Tokenizer from its vocabulary.

    Args:
      pieces: names by id.
      texts: what they stand for.
      known: special ids that the tokenizer declares.
      control: further ids that stand for no text.
      starts: whether they start words, where the texts do not say it.
      named: ids among which special tokens are found by name; None for all.
      sentinels: how many there must be at least.
      options: what it takes to load it again, beside their number.
      rest: fields of the Tokenizer.
    """
    options = dict(options or {}) | ({"sentinels": str(sentinels)} if sentinels != SENTINELS else {})
    special, found, size = find_special(pieces, known, named, sentinels)
    is_special = np.zeros(size, bool)
    is_special[[*special.values(), *found, *control]] = True
    first = np.zeros(size, bool)
    first[: len(texts)] = [starts_word(text) for text in texts] if starts is None else starts
    token_bytes = np.zeros(size, np.int32)
    token_bytes[: len(texts)] = [len(text) for text in texts]
    first[is_special] = False
    token_bytes[is_special] = 0
    return Tokenizer(
        special=special,
        sentinels=tuple(found),
        is_special=is_special,
        starts_word=first,
        token_bytes=token_bytes,
        pieces=pieces,
        texts=texts if starts is None else None,
        options=options,
        **rest,
    )


# ------------------------------------------------------------------------------------------ the kinds


def byte_tokenizer(sentinels: int = SENTINELS) -> Tokenizer:
    """Every UTF-8 byte is a token: special tokens first (pad 0, unk 1, ..., mask 6, sentinels), then the 256 bytes.

    >>> tokenizer = byte_tokenizer()
    >>> ids, begins = tokenizer.encode("né")
    >>> (ids - 107).tolist(), begins.tolist(), tokenizer.decode(ids), tokenizer.size
    ([110, 195, 169], [0, 1, 1], 'né', 363)
    """
    first = len(NAMES) + sentinels

    def encode(text: str) -> Encoding:
        data = np.frombuffer(text.encode(), np.uint8)
        character = np.cumsum((data & 0xC0) != 0x80) - 1  # of every byte
        return data.astype(np.int32) + first, character

    pieces = [names[0] for names in NAMES.values()] + [f"<extra_id_{i}>" for i in range(sentinels)]
    return _build(
        pieces + [f"0x{b:02x}" for b in range(256)],
        [b""] * first + [bytes([b]) for b in range(256)],
        {name: i for i, name in enumerate(NAMES)},
        (),
        kind="byte",
        file_name="byte.json",
        data=(
            json.dumps({"kind": "byte"} | ({"sentinels": sentinels} if sentinels != SENTINELS else {})) + "\n"
        ).encode(),
        sentinels=sentinels,
        encode_window=encode,
        decode_ids=lambda ids: bytes(i - first for i in ids).decode("utf-8", "replace"),
    )


def sentencepiece_tokenizer(data: bytes, sentinels: int = SENTINELS) -> Tokenizer:
    """A tokenizer from a serialised SentencePiece model; sentinels that it lacks are added behind it."""
    from sentencepiece import SentencePieceProcessor

    try:
        model: Any = SentencePieceProcessor(model_proto=data)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"this is no SentencePiece model: {error}") from None
    count = model.get_piece_size()
    pieces = [model.id_to_piece(i) for i in range(count)]
    control = [i for i in range(count) if model.is_control(i) or model.is_unused(i)]
    declared = {name: getattr(model, f"{name}_id")() for name in ("pad", "unk", "bos", "eos")}

    def encode(text: str) -> Encoding:
        encoding = model.encode(text, return_type="offset_mapping")
        offsets = np.asarray(encoding["offsets"], np.int64).reshape(-1, 2)
        return np.asarray(encoding["ids"], np.int32), np.maximum.accumulate(offsets[:, 0])

    return _build(
        pieces,
        [
            bytes([int(piece[1:-1], 16)]) if model.is_byte(i) else piece.replace("▁", " ").encode()
            for i, piece in enumerate(pieces)
        ],
        {name: i for name, i in declared.items() if i >= 0},
        control,
        kind="sentencepiece",
        file_name="sentencepiece.model",
        data=data,
        sentinels=sentinels,
        encode_window=encode,
        decode_ids=model.decode,
    )


def _require_tokenizers(what: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            f'{what} needs the `tokenizers` package, which is not installed: pip install "jaxpt[hf]"'
        ) from None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the build is parallel over files already
    return tokenizers


def _hf(tokenizer: Any, pieces: list[str], texts: list[bytes], known: Mapping[str, int], **rest: Any) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "[MASK]" in a text is text

    def encode(text: str) -> Encoding:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        return np.asarray(encoding.ids, np.int32), np.maximum.accumulate(offsets[:, 0])

    return _build(pieces, texts, known, encode_window=encode, decode_ids=tokenizer.decode, **rest)


def wordpiece_tokenizer(data: bytes, lowercase: bool | None = None, sentinels: int = SENTINELS) -> Tokenizer:
    """A tokenizer from a WordPiece `vocab.txt`, as BERT splits and normalises text.

    Args:
      data: the file: one token per line, the line number is the id.
      lowercase: lower-case and strip accents first; None does so if no word of the vocabulary has a capital.
      sentinels: how many there must be at least.

    Raises:
      ValueError: the file has no [UNK], or `tokenizers` is not installed.
    """
    tokenizers = _require_tokenizers("a WordPiece vocab.txt")
    pieces = [line.removesuffix("\r") for line in data.decode().removesuffix("\n").split("\n")]
    if "[UNK]" not in pieces:
        raise ValueError("this is no WordPiece vocabulary: it has no line [UNK]")
    if lowercase is None:
        lowercase = not any(p != p.lower() for p in pieces if p[:1] not in ("[", "<"))
    model: Any = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(
            {p: i for i, p in enumerate(pieces)}, unk_token="[UNK]", max_input_chars_per_word=100
        )
    )
    model.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    model.decoder = tokenizers.decoders.WordPiece(cleanup=False)
    return _hf(
        model,
        pieces,
        [piece.removeprefix("##").encode() for piece in pieces],
        {},
        control=(),
        starts=[not piece.startswith("##") for piece in pieces],
        kind="wordpiece",
        file_name="vocab.txt",
        data=data,
        options={"lowercase": str(lowercase).lower()},
        sentinels=sentinels,
    )


def hf_tokenizer(data: bytes, sentinels: int = SENTINELS) -> Tokenizer:
    """A tokenizer from a Hugging Face `tokenizer.json`; sentinels that it lacks are added behind it.

    Raises:
      ValueError: it cannot be read, or `tokenizers` is not installed.
    """
    tokenizers = _require_tokenizers("a Hugging Face tokenizer.json")
    try:
        model: Any = tokenizers.Tokenizer.from_str(data.decode())
        record = json.loads(data)
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"this is no Hugging Face tokenizer.json: {error}") from None
    by_id = {i: token for token, i in model.get_vocab(with_added_tokens=True).items()}
    pieces = [by_id.get(i, f"unused-{i}") for i in range(max(by_id) + 1)]
    added = model.get_added_tokens_decoder()
    control = [i for i, token in added.items() if token.special]
    texts, starts = _hf_texts(record, pieces)
    for i, token in added.items():
        texts[i] = token.content.encode()
    unknown = record["model"].get("unk_token")
    unknown = record["model"].get("unk_id") if unknown is None else model.token_to_id(unknown)
    return _hf(
        model,
        pieces,
        texts,
        {} if unknown is None else {"unk": unknown},
        control=control,
        starts=starts,
        named=list(added),
        kind="hf",
        file_name="tokenizer.json",
        data=data,
        sentinels=sentinels,
    )


def _hf_texts(record: dict[str, Any], pieces: list[str]) -> tuple[list[bytes], list[bool] | None]:
    """The texts of the tokens, and whether they start words where the texts do not say so."""
    model = record["model"]
    prefix = model.get("continuing_subword_prefix")
    parts = json.dumps([record.get("pre_tokenizer"), record.get("decoder")])
    if model["type"] == "WordPiece" or prefix:
        prefix = prefix or "##"
        return [p.removeprefix(prefix).encode() for p in pieces], [not p.startswith(prefix) for p in pieces]
    if '"ByteLevel"' in parts:
        table = byte_level_table()
        return [bytes(table[c] for c in p) if all(c in table for c in p) else p.encode() for p in pieces], None
    if '"Metaspace"' in parts or "▁" in json.dumps(record.get("normalizer"), ensure_ascii=False):
        return [
            bytes([int(p[3:5], 16)]) if len(p) == 6 and p.startswith("<0x") else p.replace("▁", " ").encode()
            for p in pieces
        ], None
    suffix = model.get("end_of_word_suffix") or ""
    # whole words, or a mark at the end of words: a token alone does not say whether it starts one
    return [p.removesuffix(suffix).encode() for p in pieces], [True] * len(pieces)


# -------------------------------------------------------------------------------------------- loading


def load_tokenizer(data: bytes, kind: str, options: Mapping[str, str] | None = None) -> Tokenizer:
    """The tokenizer of a data build: the content of its file, and "kind" and "options" as the manifest has them."""
    options = options or {}
    sentinels = int(options.get("sentinels", SENTINELS))
    if kind == "byte":
        return byte_tokenizer(sentinels)
    if kind == "sentencepiece":
        return sentencepiece_tokenizer(data, sentinels)
    if kind == "hf":
        return hf_tokenizer(data, sentinels)
    assert kind == "wordpiece", kind
    lowercase = options.get("lowercase")
    return wordpiece_tokenizer(data, None if lowercase is None else lowercase == "true", sentinels)


def built_tokenizer(manifest: Manifest) -> Tokenizer:
    """The tokenizer of a data build."""
    record = dict(manifest.tokenizer)
    return load_tokenizer((manifest.path / record["file"]).read_bytes(), record["kind"], record)


def open_tokenizer(path: str, lowercase: bool | None = None, sentinels: int = SENTINELS) -> Tokenizer:
    """A tokenizer from the user's file, by its name: *.model, *.json or *.txt.

    Raises:
      ValueError: the file does not exist or is no tokenizer.
    """
    file = epath.Path(path)
    kinds = {".model": "sentencepiece", ".json": "hf", ".txt": "wordpiece"}
    kind = kinds.get(file.suffix.lower())
    if kind is None:
        raise ValueError(
            f"--tokenizer {path}: jaxpt reads SentencePiece .model files, Hugging Face tokenizer.json "
            f"and WordPiece vocab.txt"
        )
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"--tokenizer {path}: {error}") from None
    try:
        options = {} if lowercase is None else {"lowercase": str(lowercase).lower()}
        return load_tokenizer(data, kind, options | {"sentinels": str(sentinels)})
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"--tokenizer {path}: {error}") from None
