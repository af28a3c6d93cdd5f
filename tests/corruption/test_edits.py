"""Edits of a text: what is decided is what is done, the laws of the decisions, and what must never happen."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny_vocab

from jaxpt.corruption.edits import Damage, apply_edits, draw_words, word_steps
from jaxpt.corruption.rows import describe, smoothed_shares

VOCAB = dataclasses.replace(tiny_vocab(), token_bytes=np.ones(61, np.int32))
LENGTH, DRAWS = 44, 2000
ORDINARY = np.flatnonzero(~VOCAB.is_special)
ALL = Damage("all", deletion=0.2, replacement=0.3, insertion=0.25)


def texts() -> np.ndarray:
    """A text of 40 tokens, the last of them [UNK]; one that fills the row; one token; none."""
    rng = np.random.default_rng(0)
    rows = np.zeros((4, LENGTH), np.int32)
    rows[0, :39], rows[0, 39] = rng.choice(ORDINARY, 39), VOCAB.unk
    rows[1], rows[2, 0] = rng.choice(ORDINARY, LENGTH), ORDINARY[3]
    return rows


TEXTS = texts()


@functools.cache
def edited(damage: Damage, text: int = 0, seed: int = 0):
    """(edits, tokens, present) of DRAWS draws for one text."""
    return jax.device_get(compiled(damage)(jax.random.split(jax.random.key(seed), DRAWS), TEXTS[text]))


@functools.cache
def compiled(damage: Damage):
    def one(key: jax.Array, tokens_L: jax.Array):
        row = describe(tokens_L, (tokens_L > 0).astype(jnp.int32), jnp.zeros_like(tokens_L), VOCAB)
        edits = damage.draw(key, row, VOCAB)
        return edits, *apply_edits(tokens_L, edits, VOCAB.pad)

    return jax.jit(jax.vmap(one, (0, None)))


def near(share: float, mean: float, number: int, sigmas: float = 4.0) -> bool:
    return abs(share - mean) < sigmas * np.sqrt(mean * (1 - mean) / number)


def is_part(part: list[int], whole: list[int]) -> bool:
    """Whether the elements of one stand in the other in this order."""
    rest = iter(whole)
    return all(token in rest for token in part)


def test_what_is_decided_is_done():
    """Against loops over the decisions; the text that fills its row is cut."""
    for text in range(4):
        edits, tokens, present = edited(ALL, text)
        for draw in range(100):
            kept = [
                int(token if new < 0 else new)
                for token, new, stays in zip(TEXTS[text], edits.replacements[draw], edits.kept[draw], strict=True)
                if stays
            ]
            want, left = [], list(kept)
            for is_slot, inserted in zip(*(array[draw] for array in edits.insertions), strict=True):
                want += [int(inserted)] if is_slot else left[:1]
                left = left if is_slot else left[1:]
            want = want[:LENGTH]
            assert tokens[draw].tolist() == want + [VOCAB.pad] * (LENGTH - len(want))
            assert present[draw].tolist() == [1] * len(want) + [0] * (LENGTH - len(want))


def test_deletion():
    """39 tokens, each left out by a coin; never [UNK]; what stays is in order; the one token of a text stays."""
    kept = edited(ALL)[0].kept
    assert kept[:, 39].all() and not kept[:, 40:].any()
    assert near(1 - kept[:, :39].mean(), 0.2, 39 * DRAWS, 3.0)
    np.testing.assert_allclose(kept[:, :39].sum(1).var(), 39 * 0.16, rtol=0.15)  # of independent coins
    assert edited(ALL, 2)[0].kept[:, 0].all()
    only = Damage("all", deletion=1.0, replacement=0.0, insertion=0.0)
    _, tokens, present = edited(only)
    assert (present.sum(1) == 2).all() and (tokens[:, 1] == VOCAB.unk).all()
    places = edited(only)[0].kept[:, :39].argmax(1)
    np.testing.assert_allclose(np.bincount(places, minlength=39) / DRAWS, 1 / 39, atol=4.5 * np.sqrt(1 / 39 / DRAWS))


def test_replacement():
    """Never by the same token nor of or by a special one; others in proportion to their frequency to 0.75."""
    new = edited(ALL)[0].replacements
    assert (new[:, 39:] == -1).all() and (new != TEXTS[0]).all()
    assert near((new[:, :39] >= 0).mean(), 0.3, 39 * DRAWS, 3.0)
    assert not VOCAB.is_special[new[new >= 0]].any()
    bits = jax.random.bits(jax.random.key(3), (400_000,), jnp.uint32)
    law = np.where(VOCAB.is_special, 0, smoothed_shares(VOCAB) ** 0.75)
    for but in (ORDINARY[0], ORDINARY[5], ORDINARY[-1], VOCAB.pad):  # the likeliest, another, the last, none
        drawn = np.asarray(draw_words(bits, word_steps(VOCAB, 0.75), jnp.full(bits.shape, but)))
        want = np.where(np.arange(61) == but, 0, law)
        want /= want.sum()
        np.testing.assert_allclose(np.bincount(drawn, minlength=61) / len(bits), want, atol=4.5 * np.sqrt(0.1 / 4e5))
        assert not (drawn == but).any() and not VOCAB.is_special[drawn].any()


def test_insertion():
    """floor(n / 4) tokens of the n that are left, anywhere; by default the text's own."""
    edits = edited(ALL)[0]
    slots, inserted = edits.insertions
    assert (slots.sum(1) == edits.kept[:, :39].sum(1) // 4).all()
    assert np.isin(inserted[slots], TEXTS[0, :39]).all()
    sizes = edits.kept.sum(1) + slots.sum(1)
    first, last = (
        slots[:, 0].mean(),
        slots[np.arange(DRAWS), sizes - 2].mean(),
    )  # [UNK], which ends the text, stays last
    assert near(first, 0.195, DRAWS) and near(last, 0.195, DRAWS)  # floor(31 / 4) / 38, on average
    assert not edited(ALL, 2)[0].insertions.slots.any() and not edited(ALL, 3)[2].any()


def test_one_operator_in_turn():
    """Each of the three, and nothing of the other two; a rate of 0 is never drawn."""
    one = Damage(deletion=0.3, replacement=0.3, insertion=0.3, insertion_source="unigram")
    edits, tokens, present = edited(one)
    sizes = present.sum(1)
    left_out, put_in, exchanged = sizes < 40, sizes > 40, (edits.replacements >= 0).any(1)
    assert (left_out.astype(int) + put_in + exchanged == 1).all()
    for kind in (left_out, put_in, exchanged):
        assert near(kind.mean(), 1 / 3, DRAWS)
    assert (edits.insertions.slots.sum(1)[put_in] == 11).all()
    assert (sizes[put_in] == LENGTH).all()  # 40 + 11 tokens, cut where the row ends
    original = TEXTS[0, :40].tolist()
    for draw in range(200):
        made = tokens[draw, : sizes[draw]].tolist()
        assert not left_out[draw] or is_part(made, original)
        uncut = [token for token, slot in zip(made, edits.insertions.slots[draw], strict=False) if not slot]
        assert not put_in[draw] or uncut == original[: len(uncut)]
    drawn = np.bincount(edits.insertions.tokens.reshape(-1), minlength=61) / edits.insertions.tokens.size
    np.testing.assert_allclose(drawn, smoothed_shares(VOCAB), atol=5 * np.sqrt(0.1 / edits.insertions.tokens.size))
    two = edited(dataclasses.replace(one, deletion=0.0, insertion_source="uniform"))
    assert (two[2].sum(1) >= 40).all() and near((two[2].sum(1) > 40).mean(), 0.5, DRAWS)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="insertion is a share"):
        Damage(insertion=1.5)
    with pytest.raises(ValueError, match="nothing is done"):
        Damage(deletion=0.0, replacement=0.0, insertion=0.0)
