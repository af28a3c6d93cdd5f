"""What several suites share: a tiny vocabulary, rows of packed documents, and any configuration at a tiny size."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxpt.models.config import DENSE_ONLY, TransformerConfig
from jaxpt.objectives import CPC, DeCLUTR
from jaxpt.types import Batch, RowSpec, Vocab

SPECIALS = 7  # pad unk bos eos cls sep mask


def tiny_vocab(size: int = 61, sentinels: int = 4) -> Vocab:
    """Specials first, sentinels last, and every third word piece continues a word."""
    is_special = np.zeros(size, bool)
    is_special[:SPECIALS] = True
    is_special[size - sentinels :] = True
    starts_word = (np.arange(size) % 3 != 0) | is_special
    counts = np.where(is_special, 0, 1000 // (1 + np.arange(size)))
    last = tuple(range(size - 1, size - 1 - sentinels, -1))
    return Vocab(
        size=size, pad=0, unk=1, bos=2, eos=3, cls=4, sep=5, mask=6, sentinels=last,
        is_special=is_special, starts_word=starts_word, unigram_counts=counts.astype(np.int64),
        token_bytes=np.where(is_special, 0, 1 + np.arange(size) % 5).astype(np.int32),
    )  # fmt: skip


def packed_batch(rows: RowSpec, vocab: Vocab, length: int = 24, size: int = 8, seed: int = 0) -> Batch:
    """Rows of two or three packed documents and some padding, with the objective's own prefix and suffix."""
    rng = np.random.default_rng(seed)
    width = rows.tokens(length)
    arrays = {name: np.zeros((size, width), np.int32) for name in ("tokens", "segments", "positions", "sentences")}
    arrays["tokens"][:] = vocab.pad
    ordinary = np.flatnonzero(~vocab.is_special)
    for row in range(size):
        begin = 0
        for document in range(1 if rows.packing == "one_document" else 3):
            room = width - begin - len(rows.prefix) - len(rows.suffix)
            words = min(room, int(rng.integers(5, 10)) + 2 * max(rows.texts - 2, 0))
            if words < 2:
                break
            said = rng.choice(ordinary, words)
            if rows.packing == "one_document" and not rows.texts and width > 2 * length and row < size - 1:
                # rows of which spans are read are full, but for the last, and say each word several times
                said = said[np.arange(room) * words // room]
            text = [*rows.prefix, *said, *rows.suffix]
            end = begin + len(text)
            arrays["tokens"][row, begin:end] = text
            arrays["segments"][row, begin:end] = document + 1
            arrays["positions"][row, begin:end] = np.arange(len(text))
            # as sentences, or as the texts of an example, the last of which may be absent
            arrays["sentences"][row, begin:end] = np.minimum(
                np.arange(len(text)) // 4, rows.texts - 1 if rows.texts else width
            )
            begin = end
    ids = np.arange(size, dtype=np.uint32)
    fields = {
        "phrase_starts": arrays["positions"] % 3 == 0,
        "gap_scores": ((arrays["sentences"] * 37 + arrays["segments"]) % 11 / 11).astype(np.float32),
        "document_ids": np.arange(size, dtype=np.int32)[:, None] * 8 + arrays["segments"],
    }
    return Batch(
        arrays["tokens"], arrays["segments"], arrays["positions"], arrays["sentences"], ids,
        np.zeros(size, np.int32), np.ones(size, np.float32), {name: fields[name] for name in rows.fields},
    )  # fmt: skip


def tiny(value: Any) -> Any:
    """The same configuration with every network at two narrow layers; all other settings as they are."""
    if isinstance(value, TransformerConfig):
        heads = 2 if value.groups < value.heads or value.heads > 1 else 1
        return dataclasses.replace(
            value,
            depth=2,
            width=16,
            heads=heads,
            kv_heads=1 if value.groups < value.heads else None,
            head_width=None,
            mlp_width=32,
            embed_width=8 if value.embedding != value.width else None,
            max_length=max(64, min(value.max_length, 64)),
            window=None if value.window is None else 4,
            dtype="float32",
            # 0.02 is for a width of hundreds: from so little, a narrow network learns distances alone slowly
            init_scale=0.1 if value.positions == "transformer_xl" else value.init_scale,
            layers="scan",  # as accelerators run them
        )
    if isinstance(value, CPC | DeCLUTR):  # segments and spans of few tokens
        value = dataclasses.replace(value, **{"window": 2} if isinstance(value, CPC) else {"shortest": 4})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{field.name: tiny(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        )
    if isinstance(value, tuple):
        return tuple(tiny(entry) for entry in value)
    return value


def with_attention(value: Any, form: str) -> Any:
    """The same configuration with every network attending in this form, and no dropout of attention weights."""
    if isinstance(value, TransformerConfig):
        form = "dense" if value.positions in DENSE_ONLY else form
        return dataclasses.replace(value, attention=form, attention_dropout=0.0)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: with_attention(getattr(value, name), form) for name in fields})
    if isinstance(value, tuple):
        return tuple(with_attention(entry, form) for entry in value)
    return value
