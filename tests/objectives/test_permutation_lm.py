"""Permutation language modelling: the published mask, the law of the order, and no target that sees itself."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from influence import NETWORK, influence, network_params
from support import packed_batch, tiny, tiny_vocab

from jaxpt.corruption.compact import compact
from jaxpt.corruption.selection import FixedCount, Informative
from jaxpt.models.patterns import causal, visible
from jaxpt.objectives.permutation_lm import PermutationLM, draw_order, pattern_of, rank
from jaxpt.types import AttentionPattern, Example, Snapshot

VOCAB = tiny_vocab()
CONFIG = tiny(PermutationLM())
SEP, CLS = 4, 3  # of the reference


# --------------------------------------------------------------------------------------- the reference


def seen_by(order: np.ndarray, target: np.ndarray, separator: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Who sees whom in [content ; queries] of rows of one stretch, and how many queries are used."""
    rows, length = order.shape

    def one(order_L, target_L, separator_L):
        return rank(order_L, target_L | separator_L, length), *compact(target_L, length)

    ranks, places, used = jax.vmap(one)(*map(jnp.asarray, (order, target, separator)))
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    pattern = pattern_of(jnp.ones_like(positions), positions, ranks, places, used)
    return np.asarray(visible(pattern)), np.asarray(used.sum(1))


class Recorded:
    """Masks that XLNet's code made of recorded targets and orders."""

    def __init__(self):
        kept = np.load(Path(__file__).parent / "permutation_lm.npz")
        tokens, block = kept["tokens"], kept["block_size"].astype(int)[:, None]
        length = tokens.shape[1]
        drawn, self.target, self.blocked = (
            np.unpackbits(kept[name], axis=-1, count=length).astype(bool)
            for name in ("is_target", "target_mask", "blocked")
        )
        self.separator = (tokens == SEP) | (tokens == CLS)
        places = np.broadcast_to(np.arange(length), tokens.shape)
        order = places // block * block + np.take_along_axis(kept["order_in_block"], places % block, axis=1)
        self.seen, self.used = seen_by(order, drawn & ~self.separator, self.separator)
        self.kinds = {
            "one block": block[:, 0] == length,
            "several blocks": block[:, 0] < length,
            "a separator was drawn": (drawn & self.separator).any(1),
            "adjacent separators": (self.separator[:, 1:] & self.separator[:, :-1]).any(1),
            "a separator first": self.separator[:, 0],
            "a target first": self.target[:, 0],
            "fewest targets": self.target.sum(1) == self.target.sum(1).min(),
            "most targets": self.target.sum(1) == self.target.sum(1).max(),
        }


recorded = functools.cache(Recorded)
EDGES = [
    "one block", "several blocks", "a separator was drawn", "adjacent separators", "a separator first",
    "a target first", "fewest targets", "most targets",
]  # fmt: skip


@pytest.mark.parametrize("edge", EDGES)
def test_who_sees_whom_equals_the_published_mask(edge: str):
    cases = recorded()
    assert len(cases.blocked) >= 64
    assert set(cases.kinds) == set(EDGES)
    rows = np.flatnonzero(cases.kinds[edge])
    assert len(rows), "no case holds this edge"
    length = cases.blocked.shape[1]
    for row in rows:
        used = cases.used[row]
        assert used == cases.target[row].sum()
        content, queries = cases.seen[row, :length], cases.seen[row, length : length + used]
        np.testing.assert_array_equal(content[:, :length], ~cases.blocked[row] | np.eye(length, dtype=bool))
        np.testing.assert_array_equal(queries[:, :length], ~cases.blocked[row][cases.target[row]])
        assert not content[:, length:].any()
        assert not queries[:, length:].any()


def test_the_published_example():
    """Tokens 10 11 12 [SEP] 13 [CLS], targets at 1 and 4."""
    blocked = [[0, 1, 0, 1, 1, 1], [0, 1, 0, 1, 1, 1], [0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 0],
               [0, 0, 0, 0, 1, 0]]  # fmt: skip
    target = np.array([[0, 1, 0, 0, 1, 0]]) > 0
    separator = np.array([[0, 0, 0, 1, 0, 1]]) > 0
    seen, _ = seen_by(np.array([[3, 0, 5, 1, 4, 2]]), target, separator)
    np.testing.assert_array_equal(seen[0, :6, :6], (np.array(blocked) == 0) | np.eye(6, dtype=bool))
    np.testing.assert_array_equal(seen[0, 6:8, :6], np.array(blocked)[[1, 4]] == 0)


# ------------------------------------------------------------------------------------------- the laws


def test_the_law_of_the_order():
    """24,000 orders of a row of 7: stretches of 4 and 3, blocks of 3 and 1; 4 standard errors of 1/6 are 0.0097."""
    bits = jax.random.bits(jax.random.key(0), (24_000, 7), jnp.uint32)
    orders = np.asarray(jax.jit(jax.vmap(lambda b: draw_order(b, block=3, stretch=4)))(bits))
    assert (np.sort(orders, axis=1) == np.arange(7)).all()
    assert (orders[:, 3] == 3).all()
    for block in (slice(0, 3), slice(4, 7)):
        _, counts = np.unique(orders[:, block], axis=0, return_counts=True)
        assert len(counts) == 6
        np.testing.assert_allclose(counts / 24_000, 1 / 6, atol=0.0097)
    first = np.unique(orders, axis=0, return_counts=True)[1] / 24_000
    assert len(first) == 36, "the blocks have orders of their own"
    np.testing.assert_allclose(first, 1 / 36, atol=0.0043)


@functools.cache
def rows_of(config: PermutationLM = CONFIG, length: int = 96, size: int = 64) -> tuple:
    objective = config.build(VOCAB)
    batch = packed_batch(objective.rows, VOCAB, length, size)
    run = jax.jit(lambda batch, key: objective.corrupt(Snapshot({}, {}, jnp.int32(0)), batch, key))
    keys = jax.random.split(jax.random.key(0), 20)
    return batch, [jax.device_get(run(batch, key)) for key in keys], objective


def test_targets_are_words_of_the_text_at_the_asked_rate():
    """About 100 words in 40 tokens a row, 1,280 rows: 4 standard errors of the share are below 0.011."""
    batch, examples, _ = rows_of()
    ordinary = (batch.segment_ids > 0) & ~VOCAB.is_special[batch.tokens]
    share = []
    for example in examples:
        used = example.weights["plm"] > 0
        length = batch.tokens.shape[1]
        places = np.zeros((len(used), length), bool)
        assert example.inputs["positions"].shape[1] == length + used.shape[1]
        ranks = example.inputs["pattern"].query_ranks[:, length:] + 1
        content_ranks = example.inputs["pattern"].key_ranks[:, :length]
        for row in range(len(used)):
            places[row] = np.isin(content_ranks[row], ranks[row][used[row]])
        assert (places.sum(1) == used.sum(1)).all(), "ranks of targets are their own"
        assert not (places & ~ordinary).any()
        starts = VOCAB.starts_word[batch.tokens]
        continued = places[:, 1:] & ~places[:, :-1] & ~starts[:, 1:] & ordinary[:, :-1]
        inside = batch.positions[:, 1:] % 4 != 0  # where the rows of this test begin no sentence
        assert not (continued & inside).any(), "a target begins with its word"
        for row in range(len(used)):
            np.testing.assert_array_equal(example.inputs["targets"][row][used[row]], batch.tokens[row][places[row]])
        share.append(places.sum() / ordinary.sum())
    assert np.mean(share) == pytest.approx(1 / 6, abs=0.011)


def test_padding_weighs_nothing_and_views_show_the_row():
    batch, examples, objective = rows_of()
    for example in examples[:3]:
        segments = example.inputs["pattern"].query_segments[:, batch.tokens.shape[1] :]
        assert ((example.weights["plm"] > 0) == (segments > 0)).all()
    assert objective.views is not None
    view = objective.views(Snapshot({}, {}, jnp.int32(0)), examples[0])["encoder"]
    queries = np.take_along_axis(np.asarray(view.tokens), np.asarray(view.target_positions), axis=1)
    assert (queries == VOCAB.mask).all()


# -------------------------------------------------------------------------------------------- no leaks

TEXT = np.array([10, 11, 12, 13, 14, 5, 4, 20, 21, 22, 23, 5, 4, 0])
SEGMENTS = np.array([1] * 7 + [2] * 6 + [0])
PLACES = np.array([*range(7), *range(6), 0])


def drawn(seed: int, config: PermutationLM) -> Example:
    """An example of the row above, and what stands in its first slots that are used."""
    objective = config.build(VOCAB)
    batch = packed_batch(objective.rows, VOCAB, len(TEXT), 1)._replace(
        tokens=TEXT[None], segment_ids=SEGMENTS[None], positions=PLACES[None], sentence_ids=PLACES[None] // 4
    )
    return jax.jit(objective.corrupt)(Snapshot({}, {}, jnp.int32(0)), batch, jax.random.key(seed))


@pytest.mark.parametrize("block", [None, 3])
def test_a_query_learns_of_earlier_tokens_and_of_nothing_else(block: int | None):
    """Changing a token changes, through three layers, the queries of later targets of its document only."""
    config = dataclasses.replace(CONFIG, rate=0.6, selection=FixedCount(), block=block)
    for seed in range(3):
        inputs = jax.device_get(drawn(seed, config).inputs)
        pattern: AttentionPattern = inputs["pattern"]
        length, total = len(TEXT), len(inputs["tokens"][0])
        reached = influence(inputs["tokens"][0], jax.tree.map(jnp.asarray, pattern), inputs["positions"][0])
        same = pattern.key_segments[0][:, None] == pattern.query_segments[0]
        seen = same & (pattern.key_ranks[0][:, None] <= pattern.query_ranks[0])
        used = np.arange(total) < length
        used[length:] = pattern.query_segments[0][length:] > 0
        np.testing.assert_array_equal(reached[:length, used], seen[:length, used])
        assert not reached[length:, :length].any(), "no token sees a query"
        queries = np.flatnonzero(used[length:]) + length
        assert len(queries) >= 3
        for query in queries:
            own = inputs["positions"][0][query] + (7 if pattern.query_segments[0][query] == 2 else 0)
            assert TEXT[own] == inputs["targets"][0][query - length]
            assert not reached[own, query], "a target sees itself"


def test_a_query_of_the_rank_of_its_target_would_leak():
    """The fault that the test above must find."""
    config = dataclasses.replace(CONFIG, rate=0.6, selection=FixedCount())
    inputs = jax.device_get(drawn(0, config).inputs)
    query, ranks = len(TEXT), inputs["pattern"].query_ranks.copy()
    ranks[:, query:] += 1
    pattern = jax.tree.map(jnp.asarray, inputs["pattern"]._replace(query_ranks=ranks))
    reached = influence(inputs["tokens"][0], pattern, inputs["positions"][0])
    own = inputs["positions"][0][query] + (7 if inputs["pattern"].query_segments[0][query] == 2 else 0)
    assert reached[own, query]


def test_in_the_order_of_the_text_it_is_causal():
    """All tokens targets, in their own order: the content is a causal stack, a query sees what stands before it."""
    length = 12
    tokens, places = np.arange(20, 32)[None], jnp.arange(length)[None]
    ranks = rank(jnp.arange(length), jnp.ones(length, bool), length)[None]
    ones = jnp.ones_like(places)
    pattern = pattern_of(ones, places, ranks, places, ones > 0)
    seen = np.asarray(visible(pattern))[0]
    np.testing.assert_array_equal(seen[length:, :length], np.tri(length, k=-1, dtype=bool))
    read = jnp.concatenate([tokens, jnp.full_like(places, VOCAB.mask)], axis=1)
    params = network_params()
    apply = jax.jit(NETWORK.apply)
    both = apply(params, read, pattern, jnp.concatenate([places, places], axis=1))
    want = apply(params, jnp.asarray(tokens), causal(ones, places), places)
    np.testing.assert_allclose(both[:, :length], want, rtol=1e-5, atol=1e-5)


def test_the_second_stretch_sees_the_first_and_not_the_other_way_round():
    config = dataclasses.replace(CONFIG, rate=0.5, selection=FixedCount(), stretches=2)
    inputs = jax.device_get(drawn(1, config).inputs)
    seen = np.asarray(visible(jax.tree.map(jnp.asarray, inputs["pattern"])))[0, :14, :14]
    first, second = slice(0, 7), slice(7, 13)
    one_document = np.asarray(
        visible(jax.tree.map(jnp.asarray, inputs["pattern"]._replace(
            query_segments=np.ones_like(inputs["pattern"].query_segments),
            key_segments=np.ones_like(inputs["pattern"].key_segments),
        )))
    )[0]  # fmt: skip
    assert one_document[second, first].all()
    assert not one_document[first, second].any()
    assert not seen[second, first].any(), "and no token sees another document"


def test_what_cannot_be_is_refused():
    def build(**changes):
        return dataclasses.replace(CONFIG, **changes).build(VOCAB)

    with pytest.raises(ValueError, match=r"rate is a share in \(0, 1\], not 0"):
        build(rate=0)
    with pytest.raises(ValueError, match="choose another selection"):
        build(selection=Informative())
    with pytest.raises(ValueError, match="at least 1 stretch"):
        build(stretches=0)
    with pytest.raises(ValueError, match="block is at least 1 token"):
        build(block=0)
    with pytest.raises(ValueError, match="rows that go on where the row before ended"):
        build(memory=4)
    with pytest.raises(ValueError, match="a memory needs relative positions"):
        learned = dataclasses.replace(CONFIG.encoder, positions="learned")
        build(memory=4, rows=2, packing="stream", encoder=learned)
    with pytest.raises(ValueError, match=r"\[MASK\]"):
        CONFIG.build(dataclasses.replace(VOCAB, mask=None))
