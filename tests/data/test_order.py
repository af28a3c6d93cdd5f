"""The order of rows: every row once per epoch, from the slot number alone; mixtures in exact proportion."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpt.data import order
from jaxpt.data.order import Mixture, Stream
from jaxpt.data.packing import count_rows, make_plan

LENGTHS = np.random.default_rng(0).integers(0, 30, 103)
PACKINGS = ("concatenate", "best_fit", "one_document")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(order, "BLOCK", 10)  # 103 documents are 11 blocks, in groups of 4, 4 and 3


def make_stream(packing="concatenate", key: tuple[int, int] | None = (7, 0), lengths=LENGTHS) -> Stream:
    return Stream(len(lengths), lambda start, stop: lengths[start:stop], packing, 8, key)


def total_rows(packing, lengths=LENGTHS) -> int:
    return sum(count_rows(packing, lengths[start : start + 10], 8) for start in range(0, len(lengths), 10))


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_epoch_has_every_row_once_and_the_next_epoch_another_order(packing):
    stream, total = make_stream(packing), total_rows(packing)
    assert stream.rows() == total
    epochs = [[stream.locate(e * total + i) for i in range(total)] for e in range(3)]
    plans = {(e, block): stream.plan(e, block) for e in range(3) for block in range(11)}
    for e, addresses in enumerate(epochs):
        assert {address.epoch for address in addresses} == {e}
        assert sorted(a[1:] for a in addresses) == [(b, r) for b in range(11) for r in range(plans[e, b].rows)]
    assert len({tuple(a[1:] for a in addresses) for addresses in epochs}) == 3
    assert any(not np.array_equal(plans[0, b].documents, plans[1, b].documents) for b in range(11))


def test_a_few_blocks_are_interleaved_and_the_others_wait():
    stream = make_stream()
    blocks = [stream.locate(i).block for i in range(stream.rows())]
    first = set(blocks[:8])
    assert len(first) > 1  # rows of several blocks alternate
    last = max(i for i, block in enumerate(blocks) if block in first)
    assert len(set(blocks[: last + 1])) == order.INTERLEAVED


@given(st.lists(st.integers(0, 400), min_size=1, max_size=5), st.sampled_from(PACKINGS))
@settings(max_examples=10, deadline=None)
def test_random_access_equals_the_walk(indices, packing):
    walked = make_stream(packing)
    walk = [walked.locate(i) for i in range(401)]
    fresh = make_stream(packing)
    for i in indices:
        address = fresh.locate(i)
        assert address == walk[i]
        plan, again = fresh.plan(address.epoch, address.block), walked.plan(address.epoch, address.block)
        assert all(np.array_equal(a, b) for a, b in zip(plan, again, strict=True))


def test_rows_are_counted_only_as_far_as_needed():
    asked = []
    stream = Stream(103, lambda a, b: asked.append(a) or LENGTHS[a:b], "concatenate", 8, (7, 0))
    stream.locate(0)
    assert len(set(asked)) == order.INTERLEAVED
    stream = Stream(103, lambda a, b: asked.append(a) or LENGTHS[a:b], "concatenate", 8, (7, 0))
    assert total_rows("concatenate") > stream.rows(limit=5) >= 5


def test_without_a_key_everything_keeps_its_order():
    stream = make_stream("one_document", None)
    addresses = [stream.locate(i) for i in range(stream.rows())]
    assert addresses == sorted(addresses)
    plan, alone = stream.plan(0, 2), make_plan("one_document", LENGTHS[20:30], 8)
    assert np.array_equal(plan.documents, alone.documents)


def test_keys_make_the_order():
    walks = [[make_stream(key=key).locate(i) for i in range(50)] for key in ((7, 0), (7, 0), (8, 0), (7, 1))]
    assert walks[0] == walks[1]
    assert walks[0] != walks[2] and walks[0] != walks[3] and walks[2] != walks[3]


def test_the_order_never_changes():
    """Recorded: a run that resumes with a later jaxpt, numpy or Grain must see the same rows (raise ORDER if not)."""
    stream = make_stream("best_fit")
    assert [tuple(stream.locate(i)) for i in (0, 1, 2, 700)] == RECORDED
    assert stream.plan(0, 3).documents[:8].tolist() == RECORDED_DOCUMENTS


RECORDED = [(0, 4, 1), (0, 6, 14), (0, 6, 0), (3, 7, 14)]
RECORDED_DOCUMENTS = [8, 8, 6, 7, 5, 5, 3, 3]


def test_a_source_smaller_than_a_row_repeats():
    stream = make_stream("concatenate", lengths=np.array([3]))
    assert [tuple(stream.locate(i)) for i in (0, 1, 5)] == [(0, 0, 0), (1, 0, 0), (5, 0, 0)]


weights = st.one_of(st.integers(1, 50), st.floats(1e-3, 1e3), st.just(0.1), st.just(1 / 3))


@given(st.lists(weights, min_size=1, max_size=7))
@settings(max_examples=25, deadline=None)
def test_every_prefix_has_the_right_proportions(weights):
    mixture, served = Mixture(weights), Counter()
    parts = [int(Fraction(weight) * 2**60) for weight in weights]
    for slot in range(200):
        source, index = mixture.pick(slot)
        assert index == served[source]  # each source's rows come one by one
        served[source] += 1
        error = max(abs(served[k] - (slot + 1) * part / sum(parts)) for k, part in enumerate(parts))
        assert error < (1 if len(weights) <= 3 else 1.7)


@pytest.mark.parametrize("weights", [(1,), (1, 1), (0.7, 0.3), (1, 1, 1, 1), (4, 3, 2, 1), (0.5, 0.25, 0.15, 0.1)])
def test_common_mixtures_are_within_one_row(weights):
    mixture, served = Mixture(weights), Counter()
    for slot in range(3000):
        served[mixture.pick(slot)[0]] += 1
        assert all(abs(served[k] - (slot + 1) * w / sum(weights)) <= 1 + 1e-9 for k, w in enumerate(weights))


def test_a_mixture_is_exact_far_away():
    mixture = Mixture([0.1, 0.7, 0.2])
    far = 10**15
    picks = dict(mixture.pick(slot) for slot in range(far, far + 10))
    shares = [Fraction(weight) / (Fraction(0.1) + Fraction(0.7) + Fraction(0.2)) for weight in (0.1, 0.7, 0.2)]
    assert all(abs(picks[k] - far * shares[k]) < 12 for k in range(3))
