"""Batches from shards: literal rows, no token lost, every slicing and resume the same, damage named."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxpt.data import manifest as manifests
from jaxpt.data import order, shards
from jaxpt.data.manifest import Manifest, Shard, Split, encode_document
from jaxpt.data.pipeline import Phase, Pipeline, Source, check_continues, held_out
from jaxpt.data.shards import Documents
from jaxpt.types import Batch, RowKind, RowSpec

BOS, EOS, PAD = 2, 3, 1
Sentences = list[list[int]]


def write_data(
    folder: Path, train: list[Sentences], validation: Sequence[Sentences] = (), tokenizer="a" * 64, sentinels: int = 0
) -> str:
    """A finished data build of documents given as lists of sentences."""
    folder.mkdir(parents=True)
    splits = {}
    for name, documents in (("train", train), ("validation", validation)):
        parts = []
        for i in range(0, len(documents), 7):
            part = documents[i : i + 7]
            stem, sizes = f"{name}-{i:05}", [sum(map(len, document)) for document in part]
            writer = array_record_module.ArrayRecordWriter(str(folder / f"{stem}.array_record"), "group_size:1")
            for document in part:
                starts = [j == 0 for sentence in document for j in range(len(sentence))]
                writer.write(encode_document(np.concatenate(document).astype(np.uint16), np.array(starts)))
            writer.close()
            np.save(folder / f"{stem}.lengths.npy", np.array(sizes, np.uint32))
            files = f"{stem}.array_record", f"{stem}.lengths.npy"
            digests = [manifests.sha256(folder / file) for file in files]
            parts.append(Shard(*files, len(part), sum(sizes), *digests))
        splits[name] = Split(len(documents), sum(part.tokens for part in parts), 0, 0, tuple(parts))
    np.save(folder / "unigram.npy", np.full(8, 5, np.int64))
    np.savez(folder / "vocab.npz", is_special=np.zeros(8, bool), starts_word=np.zeros(8, bool), token_bytes=np.ones(8))
    files = [{"file": name, "sha256": manifests.sha256(folder / name)} for name in ("unigram.npy", "vocab.npz")]
    special = {"size": 8, "pad": PAD, "unk": 0, "bos": BOS, "eos": EOS, "cls": None, "sep": None, "mask": None}
    Manifest(
        path=epath.Path(folder),
        tokenizer={"kind": "byte", "file": "tokenizer.json", "sha256": tokenizer},
        vocab={**special, "sentinels": list(range(sentinels))},
        token_dtype="uint16",
        splits=splits,
        unigram=files[0],
        vocab_arrays=files[1],
    ).save()
    return str(folder)


def numbered(sizes: list[int], first: int = 10) -> list[Sentences]:
    """Documents of two sentences (or one token) whose tokens count on from `first`, so that each token is unique."""
    documents = []
    for size in sizes:
        tokens = list(range(first, first + size))
        documents.append([part for part in (tokens[: size // 2], tokens[size // 2 :]) if part])
        first += size
    return documents


SIZES = np.random.default_rng(1).integers(1, 30, 45).tolist()
TOKENS = sum(SIZES)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_data(tmp_path_factory.mktemp("pipeline") / "data", numbered(SIZES), numbered([3, 9, 1, 5, 8]))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(order, "BLOCK", 10)


def pipeline(*sources: str | Source, rows: RowSpec | None = None, length: int = 8, batch_size: int = 4, seed: int = 0):
    phase = Phase(0, tuple(Source(s) if isinstance(s, str) else s for s in sources), length, batch_size)
    return Pipeline([phase], rows or RowSpec("concatenate"), seed)


def assert_same(a: Batch, b: Batch) -> None:
    for name, x, y in zip(a._fields[:-1], a[:-1], b[:-1], strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)
        assert x.dtype == y.dtype


def stack(batches: list[Batch]) -> Batch:
    return Batch(*(np.concatenate(arrays) for arrays in list(zip(*batches, strict=True))[:-1]))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ rows


def test_rows_by_hand(tmp_path):
    data = write_data(tmp_path / "data", [], [[[10, 11], [12]], [[20, 21, 22], [23, 24]], [[30]]])
    batches = held_out([Source(data)], RowSpec("concatenate", (BOS,), (EOS,)), 8, 2)
    batch = next(batches)
    assert batch.tokens.tolist() == [[BOS, 10, 11, 12, EOS, BOS, 20, 21], [22, 23, 24, EOS, BOS, 30, EOS, PAD]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 2, 2, 2, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 0]]
    assert batch.sentence_ids.tolist() == [[0, 0, 0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0]]
    assert batch.row_ids.tolist() == [0, 1] and batch.source_ids.tolist() == [0, 0] and batch.valid.tolist() == [1, 1]
    dtypes = [array.dtype.name for array in batch[:-1]]
    assert dtypes == ["int32"] * 4 + ["uint32", "int32", "float32"] and batch.extras == {}
    assert next(batches, None) is None


@pytest.mark.parametrize(
    ("packing", "rows"),
    [
        ("best_fit", [[10, 11, 12, EOS, 30, EOS], [20, 21, 22, 23, 24, EOS]]),
        ("one_document", [[10, 11, 12, EOS], [20, 21, 22, 23, 24, EOS], [30, EOS]]),
    ],
)
def test_other_packings_by_hand(tmp_path, packing, rows):
    data = write_data(tmp_path / "data", [], [[[10, 11], [12]], [[20, 21, 22], [23, 24]], [[30]]])
    (batch,) = held_out([Source(data)], RowSpec(packing, suffix=(EOS,)), 6, len(rows))
    assert batch.tokens.tolist() == [row + [PAD] * (6 - len(row)) for row in rows]


def test_a_suffix_may_stand_alone_and_rows_of_one_token_work(tmp_path):
    data = write_data(tmp_path / "data", [], [[[10], [11]]])
    (batch,) = held_out([Source(data)], RowSpec("one_document", suffix=(EOS,)), 2, 2)
    assert batch.tokens.tolist() == [[10, 11], [EOS, PAD]]
    assert batch.sentence_ids.tolist() == [[0, 1], [0, 0]] and batch.segment_ids.tolist() == [[1, 1], [1, 0]]
    (batch,) = held_out([Source(data)], RowSpec("concatenate", suffix=(EOS,)), 1, 3)
    assert batch.tokens.tolist() == [[10], [11], [EOS]]


def test_reserve_and_raw_length_shape_the_rows(data):
    assert pipeline(data, rows=RowSpec(reserve=3)).batch(0).tokens.shape == (4, 5)
    assert pipeline(data, rows=RowSpec(raw_length=lambda length: 2 * length)).batch(0).tokens.shape == (4, 16)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    packing=st.sampled_from(["concatenate", "best_fit", "one_document"]),
    length=st.integers(1, 20),
    batch_size=st.integers(1, 9),
    prefix=st.sampled_from([(), (BOS,), (BOS, BOS)]),
    suffix=st.sampled_from([(), (EOS,)]),
    seed=st.integers(0, 3),
)
def test_an_epoch_serves_every_token_once(data, packing, length, batch_size, prefix, suffix, seed):
    rows = RowSpec(packing, prefix, suffix)
    source = pipeline(data, rows=rows, length=length, batch_size=batch_size, seed=seed)
    total = source._readers[0][0].stream.rows()
    steps = -(-2 * total // batch_size)
    served = stack([source.batch(step) for step in range(steps)])
    for epoch in (slice(0, total), slice(total, 2 * total)):  # batches run across the end of an epoch
        tokens = served.tokens[epoch][served.segment_ids[epoch] > 0]
        special = {BOS: len(prefix) * len(SIZES), EOS: len(suffix) * len(SIZES)}
        expected = Counter({token: n for token, n in special.items() if n})
        assert Counter(tokens.tolist()) == expected + Counter(range(10, 10 + TOKENS))
    filled = served.segment_ids > 0
    assert np.all(served.tokens[~filled] == PAD)
    assert not served.positions[~filled].any() and not served.sentence_ids[~filled].any()
    same = (np.diff(served.segment_ids) == 0) & filled[:, 1:]  # pieces are contiguous
    assert np.all(np.diff(served.positions)[same] == 1) and np.all(np.diff(served.sentence_ids)[same] >= 0)
    assert np.all(served.positions[:, 1:][~same] == 0) and np.all(served.sentence_ids[:, 1:][~same] == 0)
    words = same & (served.tokens[:, 1:] >= 10) & (served.tokens[:, :-1] >= 10)
    assert np.all(np.diff(served.tokens)[words] == 1)  # a document keeps its order


# ----------------------------------------------------------------------------------------------------- a stream

STREAM = RowSpec("stream", suffix=(EOS,), fields=("document_ids",))


def test_each_row_of_a_stream_goes_on_where_it_ended(data):
    source, lanes = pipeline(data, rows=STREAM, length=8, batch_size=4), 4
    total = source._readers[0][0].stream.rows()
    shares = np.diff([lane * total // lanes for lane in range(lanes + 1)])
    assert len(set(shares)) == 2, "the lanes of these data are of two lengths"
    batches = [source.batch(step) for step in range(2 * max(shares))]
    owners: list[set[int]] = []
    for epoch in (0, 1):
        served: Counter[int] = Counter()
        owners.append(set())
        for lane, share in enumerate(shares):
            rows = [
                (batch.tokens[lane], batch.extras["document_ids"][lane], batch.segment_ids[lane] > 0)
                for batch in batches[epoch * share : (epoch + 1) * share]
            ]
            tokens, documents = (np.concatenate([row[i][row[2]] for row in rows]) for i in (0, 1))
            owners[-1] |= set(documents.tolist())
            served.update(tokens[tokens >= 10].tolist())
            inside = (documents[1:] == documents[:-1]) & (tokens[1:] >= 10) & (tokens[:-1] >= 10)
            assert (np.diff(tokens)[inside] == 1).all(), "a document goes on from row to row"
            assert inside.sum() > 100
            edges = [len(row[2].nonzero()[0]) for row in rows]
            assert inside[np.cumsum(edges)[:-1] - 1].any(), "also over the edge of a row"
        assert max(served.values()) == 1
        assert len(served) == TOKENS, "no row of an epoch is left out"
    assert not owners[0] & owners[1], "in another pass a document is another one: its memory does not go on"
    assert not np.array_equal(batches[0].tokens, batches[shares[0]].tokens), "every epoch has an order of its own"


def test_a_stream_is_a_function_of_seed_and_step(data):
    walked = pipeline(data, rows=STREAM, batch_size=4)
    batches = [walked.batch(step) for step in range(9)]
    again = pipeline(data, rows=STREAM, batch_size=4)
    for step in (8, 0, 5):
        assert_same(again.batch(step), batches[step])
        part = again.batch(step, [1, 3])
        np.testing.assert_array_equal(part.tokens, batches[step].tokens[[1, 3]])
        np.testing.assert_array_equal(part.extras["document_ids"], batches[step].extras["document_ids"][[1, 3]])


def test_a_stream_that_cannot_be_is_refused(tmp_path, data):
    other = write_data(tmp_path / "other", numbered([5] * 9))
    with pytest.raises(ValueError, match="give it one data build, or another packing"):
        pipeline(data, other, rows=STREAM)
    with pytest.raises(ValueError, match="make 6 rows and every step reads 9 streams"):
        pipeline(other, rows=STREAM, length=10, batch_size=9).batch(0)


# ------------------------------------------------------------------------------------- rows of several kinds

KINDS = RowSpec(
    suffix=(EOS,), kinds=(RowKind(2, lambda n: n), RowKind(1, lambda n: n + 5), RowKind(1, lambda n: n - 2))
)


def test_rows_of_several_kinds_have_their_own_lengths_and_orders(data):
    source = pipeline(data, rows=KINDS, batch_size=8)
    batch = source.batch(3)
    assert batch.tokens.shape == (8, 13) and batch.row_ids.tolist() == list(range(8))
    room = np.array([8] * 4 + [13] * 2 + [6] * 2)
    used = (batch.segment_ids > 0).sum(1)
    assert (used <= room).all() and (used == room).sum() >= 6  # all but the last rows of blocks are full
    first = pipeline(data, rows=RowSpec(suffix=(EOS,)), batch_size=4)  # the first kind alone: the same rows
    for step in (0, 3, 40):
        np.testing.assert_array_equal(source.batch(step).tokens[:4, :8], first.batch(step).tokens)
    alike = pipeline(data, rows=RowSpec(kinds=(RowKind(1, lambda n: n),) * 2))  # alike, each in an order of its own
    tokens = stack([alike.batch(step) for step in range(9)]).tokens.reshape(9, 2, 2, 8)
    assert not np.array_equal(tokens[:, 0], tokens[:, 1])


def test_every_kind_serves_every_token_once_an_epoch(data):
    source = pipeline(data, rows=KINDS, batch_size=4)
    served = stack([source.batch(step) for step in range(260)])
    for kind, (begin, stop) in enumerate([(0, 2), (2, 3), (3, 4)]):
        total = source._readers[0][kind].stream.rows()
        mine = np.flatnonzero((served.row_ids >= begin) & (served.row_ids < stop))
        assert len(mine) >= total
        tokens = served.tokens[mine[:total]][served.segment_ids[mine[:total]] > 0]
        assert Counter(tokens.tolist()) == Counter({EOS: len(SIZES)}) + Counter(range(10, 10 + TOKENS))


def test_rows_of_several_kinds_are_a_function_of_seed_and_step(data):
    other = Source(data, 3)
    source = pipeline(data, other, rows=KINDS, batch_size=8)
    stream = list(source.batches(0, 12))
    for step, batch in enumerate(pipeline(data, other, rows=KINDS, batch_size=8).batches(5, 12), start=5):
        assert_same(batch, stream[step])
    halves = [pipeline(data, other, rows=KINDS, batch_size=8).batch(7, rows) for rows in (slice(0, 4), slice(4, 8))]
    assert [half.tokens.shape for half in halves] == [(4, 13)] * 2
    assert_same(stack(halves), stream[7])
    served = stack(stream)
    for rows in (slice(0, 4), slice(4, 6), slice(6, 8)):  # sources mix by weight within each kind
        mine = served.source_ids.reshape(12, 8)[:, rows]
        assert np.mean(mine) == pytest.approx(0.75, abs=0.05)


def test_kinds_are_a_part_of_the_fingerprint(data):
    old, new = (pipeline(data, rows=rows, batch_size=8).fingerprint() for rows in (RowSpec(suffix=(EOS,)), KINDS))
    assert "kinds" not in old["phases"][0] and new["phases"][0]["kinds"] == [[2, 8], [1, 13], [1, 6]]
    check_continues(new, json.loads(json.dumps(new)), step=5)
    for other in (KINDS.kinds[:2], (RowKind(2, lambda n: n - 1), *KINDS.kinds[1:])):
        changed = pipeline(data, rows=RowSpec(suffix=(EOS,), kinds=other), batch_size=9 if len(other) == 2 else 8)
        with pytest.raises(ValueError, match=r"cannot be resumed with other data: .*kinds was"):
            check_continues(new, changed.fingerprint(), step=5)


def test_kinds_that_cannot_be_are_refused(data):
    message = "6 rows cannot be divided as 2 : 1 : 1: make batch_size a multiple of 4 times microbatches"
    with pytest.raises(ValueError, match=message):
        pipeline(data, rows=KINDS, batch_size=6)
    with pytest.raises(ValueError, match="keeps 0 tokens of text"):
        pipeline(data, rows=KINDS, length=2)
    with pytest.raises(ValueError, match="held-out rows are of one kind"):
        held_out([Source(data)], KINDS, 8, 4)


# --------------------------------------------------------------------------------- pure in (seed, step)


def test_each_process_reads_its_rows_of_the_same_batch(data):
    whole = pipeline(data, batch_size=6).batch(5)
    source = pipeline(data, batch_size=6)
    assert_same(stack([source.batch(5, slice(0, 2)), source.batch(5, slice(2, 6))]), whole)
    picked = source.batch(5, np.array([4, 1]))
    assert picked.row_ids.tolist() == [4, 1]
    assert_same(picked, Batch(*(array[[4, 1]] for array in whole[:-1])))  # type: ignore[arg-type]


def test_a_resumed_stream_continues_and_the_seed_matters(data):
    stream = list(pipeline(data).batches(0, 60))
    assert len(stream) == 60
    for step, batch in enumerate(pipeline(data).batches(37, 60), start=37):
        assert_same(batch, stream[step])
    assert_same(pipeline(data).batch(59), stream[59])
    assert not np.array_equal(pipeline(data, seed=1).batch(0).tokens, stream[0].tokens)


def test_a_batch_may_span_many_epochs(tmp_path):
    data = write_data(tmp_path / "data", [[[10, 11, 12]]])
    batch = pipeline(data, batch_size=5).batch(3)
    assert batch.tokens.tolist() == [[10, 11, 12] + [PAD] * 5] * 5


def test_sources_mix_by_weight(tmp_path, data):
    other = write_data(tmp_path / "other", [[[5, 6]], [[6, 5]]])
    source = pipeline(Source(data, 3), Source(other, 1), batch_size=4)
    served = stack([source.batch(step) for step in range(25)])
    assert Counter(served.source_ids.tolist()) == {0: 75, 1: 25}
    for tokens, k in zip(served.tokens, served.source_ids, strict=True):
        assert (tokens.max() < 10) == (k == 1)
    twin = pipeline(Source(data), Source(data))  # the same data twice: two streams of their own
    tokens = stack([twin.batch(step) for step in range(4)])
    assert not np.array_equal(tokens.tokens[tokens.source_ids == 0], tokens.tokens[tokens.source_ids == 1])
    assert source.vocab.unigram_counts.tolist() == [10] * 8
    assert source.vocab.pad == PAD


def test_phases_change_what_is_read(tmp_path, data):
    other = write_data(tmp_path / "other", numbered([3] * 9, first=5000))
    phases = [Phase(0, (Source(data),), 8, 4), Phase(3, (Source(data),), 16, 2), Phase(5, (Source(other),), 16, 6)]
    both = Pipeline(phases, RowSpec(), 0)
    shapes = [batch.tokens.shape for batch in both.batches(0, 7, rows=lambda batch_size: slice(batch_size // 2))]
    assert shapes == [(2, 8)] * 3 + [(1, 16)] * 2 + [(3, 16)] * 2
    assert both.batch(5).tokens.max() >= 5000
    assert [both.phase_at(step).from_step for step in (0, 2, 3, 4, 5, 999)] == [0, 0, 3, 3, 5, 5]
    assert_same(both.batch(2), Pipeline(phases[:1], RowSpec(), 0).batch(2))  # adding a phase changes nothing before it
    later = Pipeline([Phase(0, (Source(other),), 8, 2), Phase(3, (Source(data),), 16, 1)], RowSpec(), 0)
    served = stack([later.batch(step) for step in range(3, 3 + later._readers[1][0].stream.rows())])
    assert Counter(served.tokens[served.segment_ids > 0].tolist()) == Counter(range(10, 10 + TOKENS))  # from its start
    alone = Pipeline([Phase(0, (Source(data),), 16, 2)], RowSpec(), 0)
    assert not np.array_equal(both.batch(3).tokens, alone.batch(0).tokens)  # each phase has an order of its own


# ----------------------------------------------------------------------------------------- background


def test_reading_runs_ahead_in_the_background_and_closes(data, monkeypatch):
    source, threads, enough = pipeline(data), set(), threading.Event()
    read, calls = source.batch, []

    def spy(step, rows):
        threads.add(threading.current_thread().name)
        calls.append(step)
        if len(calls) == 4:
            enough.set()
        return read(step, rows)

    monkeypatch.setattr(source, "batch", spy)
    batches = source.batches(0)  # without end
    next(batches)
    assert enough.wait(30)  # nobody asked for these
    assert threading.current_thread().name not in threads
    before = [thread for thread in threading.enumerate() if thread.name in threads]
    batches.close()  # type: ignore[attr-defined]
    for thread in before:
        thread.join(30)
        assert not thread.is_alive()


def test_errors_of_the_background_reach_the_caller(data):
    source = pipeline(data)

    def fail(step, rows):
        raise ValueError(f"step {step} is gone")

    source.batch = fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="step 3 is gone"):
        next(source.batches(3, 9))


# ------------------------------------------------------------------------------------------- held out


@pytest.mark.parametrize("packing", ["concatenate", "best_fit", "one_document"])
def test_held_out_is_one_pass_whatever_the_batch(data, packing):
    rows = RowSpec(packing, suffix=(EOS,))
    whole = stack(list(held_out([Source(data)], rows, 8, 64)))
    count = int(whole.valid.sum())
    assert Counter(whole.tokens[whole.tokens >= 10].tolist()) == Counter(range(10, 10 + 26))
    for batch_size, limit in ((1, None), (3, None), (4, 3), (2, 99)):
        batches = list(held_out([Source(data)], rows, 8, batch_size, limit))
        halves = [
            list(held_out([Source(data)], rows, 8, batch_size, limit, rows_slice=part))
            for part in (slice(0, 1), slice(1, None))
        ]
        for batch, pair in zip(batches, zip(*halves, strict=True), strict=True):
            assert_same(stack(list(pair)), batch)
        seen = stack(batches)
        wanted = min(count, limit or count)
        assert len(seen.valid) == -(-wanted // batch_size) * batch_size
        assert seen.row_ids.tolist() == list(range(len(seen.valid)))
        assert seen.valid.tolist() == [1] * wanted + [0] * (len(seen.valid) - wanted)
        np.testing.assert_array_equal(seen.tokens[:wanted], whole.tokens[:wanted])
        assert np.all(seen.tokens[wanted:] == PAD) and not seen.segment_ids[wanted:].any()


def test_held_out_reads_its_sources_one_after_the_other(tmp_path, data):
    other = write_data(tmp_path / "other", [], [[[5, 6, 7]]])
    (batch,) = held_out([Source(data), Source(other, 9)], RowSpec("one_document"), 16, 8)
    assert batch.source_ids.tolist()[:6] == [0] * 5 + [1] and batch.tokens[5, :3].tolist() == [5, 6, 7]
    assert batch.valid.tolist() == [1] * 6 + [0] * 2


# ---------------------------------------------------------------------------------- fingerprint, resume


def test_a_fingerprint_says_what_must_not_change(tmp_path, data):
    base = pipeline(data).fingerprint()
    assert json.loads(json.dumps(base)) == base
    assert pipeline(data).fingerprint() == base
    other = write_data(tmp_path / "other", numbered([4, 4]))
    changed = [
        pipeline(other),
        pipeline(Source(data, 2)),
        pipeline(data, seed=1),
        pipeline(data, length=9),
        pipeline(data, batch_size=5),
        pipeline(data, rows=RowSpec("best_fit")),
        pipeline(data, rows=RowSpec(suffix=(EOS,))),
        pipeline(data, rows=RowSpec(reserve=1)),
    ]
    for one in changed:
        with pytest.raises(ValueError, match="cannot be resumed with other data"):
            check_continues(base, one.fingerprint(), step=1)
    digests = [side["phases"][0]["sources"][0]["data"][:12] for side in (base, changed[0].fingerprint())]
    message = f"phase 0: sources was 1 x data of digest {digests[0]} and is now 1 x data of digest {digests[1]}\\."
    with pytest.raises(ValueError, match=message):
        check_continues(base, changed[0].fingerprint(), step=1)


def test_only_phases_to_come_may_differ(data):
    def fingerprint(*starts_and_lengths):
        return Pipeline([Phase(s, (Source(data),), n, 4) for s, n in starts_and_lengths], RowSpec(), 0).fingerprint()

    saved = fingerprint((0, 8), (50, 9))
    check_continues(saved, fingerprint((0, 8), (50, 9), (70, 16)), step=70)
    check_continues(saved, fingerprint((0, 8), (60, 16)), step=50)  # the second had not begun
    for current, step in (
        (fingerprint((0, 8)), 51),
        (fingerprint((0, 8), (50, 16)), 51),
        (fingerprint((0, 8), (40, 9)), 51),
        (fingerprint((0, 8), (50, 9), (60, 16)), 70),
    ):
        with pytest.raises(ValueError, match=r"phase [12]: .*new phase with from_step >="):
            check_continues(saved, current, step)


# ---------------------------------------------------------------------------------------------- errors


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("file", ["train-00007.array_record", "train-00007.lengths.npy", "unigram.npy", "vocab.npz"])
def test_a_flipped_byte_is_refused_by_name(tmp_path, file):
    data = write_data(tmp_path / "data", numbered([5] * 12))
    flip(tmp_path / "data" / file, -1)
    with pytest.raises(ValueError, match=rf"{file} does not match its digest .*wanted.*again"):
        for step in range(4):  # enough for every shard
            pipeline(data).batch(step)


def test_a_missing_shard_is_named(tmp_path):
    data = write_data(tmp_path / "data", numbered([5] * 3))
    (tmp_path / "data" / "train-00000.array_record").unlink()
    with pytest.raises(ValueError, match="array_record is missing"):
        next(pipeline(data).batches(0, 1))


def test_settings_that_cannot_be_are_refused(tmp_path, data):
    source = (Source(data),)
    cases = [
        ([], "first data phase must start at step 0"),
        ([Phase(1, source, 8, 4)], "first data phase must start at step 0"),
        ([Phase(0, source, 8, 4), Phase(0, source, 8, 4)], "must rise in from_step"),
        ([Phase(0, source, 8, 4), Phase(5, source, 8, 4), Phase(3, source, 8, 4)], "must rise in from_step"),
        ([Phase(0, (), 8, 4)], "has no sources"),
        ([Phase(0, source, 0, 4)], "sequence length is 0"),
        ([Phase(0, source, 8, 0)], "batch size is 0"),
        ([Phase(0, (Source(data, 0.0),), 8, 4)], "weight of .* is 0"),
        ([Phase(0, (Source(data, float("nan")),), 8, 4)], "weight of .* is nan"),
    ]
    for phases, message in cases:
        with pytest.raises(ValueError, match=message):
            Pipeline(phases, RowSpec(), 0)
    with pytest.raises(ValueError, match="keeps 0 tokens of text"):
        pipeline(data, rows=RowSpec(reserve=8))
    with pytest.raises(ValueError, match="unknown packing 'dense'"):
        pipeline(data, rows=RowSpec("dense")).batch(0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reads the field 'labels' and the data in .*data does not have it"):
        pipeline(data, rows=RowSpec(fields=("labels",)))
    with pytest.raises(ValueError, match="data seed is -1"):
        pipeline(data, seed=-1)
    with pytest.raises(ValueError, match="there is no step -1"):
        pipeline(data).batch(-1)
    with pytest.raises(ValueError, match="holds no finished data build"):
        pipeline(str(tmp_path / "absent"))
    other = write_data(tmp_path / "other", numbered([4]), tokenizer="b" * 64)
    with pytest.raises(ValueError, match=rf"{data} and {other} were built with different tokenizers"):
        pipeline(data, other)
    more = write_data(tmp_path / "more", numbered([4]), sentinels=3)
    with pytest.raises(ValueError, match=rf"{data} has 0 sentinel tokens and {more} has 3: .*--sentinels 0"):
        pipeline(data, more)
    with pytest.raises(ValueError, match=r"no documents in its validation split: .*--validation"):
        held_out([Source(other)], RowSpec(), 8, 4)
    with pytest.raises(ValueError, match="0 held-out rows"):
        held_out([Source(data)], RowSpec(), 8, 4, limit_rows=0)


# ---------------------------------------------------------------------------------------------- shards


def test_documents_by_index_in_any_order(data):
    documents = Documents(Manifest.load(data), "train", keep_above=10)
    firsts = 10 + np.cumsum([0, *SIZES])
    for indices in ([44, 0, 7, 6, 13], [3], list(range(45))):
        for i, (tokens, sentences) in zip(indices, documents.read(indices), strict=True):
            assert tokens.tolist() == list(range(firsts[i], firsts[i + 1]))
            assert sentences.tolist() == [0] * (SIZES[i] // 2) + [int(SIZES[i] > 1)] * (SIZES[i] - SIZES[i] // 2)
    assert documents.lengths(5, 23).tolist() == SIZES[5:23] and len(documents) == 45


def test_few_shards_stay_open_and_long_documents_are_kept_within_bounds(data, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    monkeypatch.setattr(shards, "OPEN_DOCUMENTS", 0)
    monkeypatch.setattr(shards, "KEPT_BYTES", 600)
    documents = Documents(Manifest.load(data), "train", keep_above=20)
    first = documents.read(range(45))
    assert len(documents._readers) == 2
    assert documents._kept and all(SIZES[i] > 20 for i in documents._kept)
    held = sum(array.nbytes for document in documents._kept.values() for array in document)
    assert held == documents._kept_bytes <= 600
    for again, document in zip(documents.read(range(45)), first, strict=True):
        assert again[0].tolist() == document[0].tolist()


@pytest.fixture
def remote(monkeypatch, tmp_path):
    """Shards behave as if they were in a store; the cache is the test's own."""
    monkeypatch.setattr(shards, "is_local", lambda path: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards._verified.cache_clear()
    yield tmp_path / "cache" / "jaxpt" / "shards"
    shards._verified.cache_clear()


def test_remote_shards_are_copied_once_and_checked(tmp_path, remote):
    data = write_data(tmp_path / "data", numbered([5] * 12))
    batch = pipeline(data).batch(0)
    copies = sorted(remote.iterdir())
    assert {path.name for path in copies} <= {
        digest for s in Manifest.load(data).splits["train"].shards for digest in (s.sha256, s.lengths_sha256)
    }
    for path in (tmp_path / "data").glob("train-*"):
        path.unlink()
    shards._verified.cache_clear()  # as in another process: the copies serve
    assert_same(pipeline(data).batch(0), batch)
    for path in copies:
        flip(path, -1)  # damaged copies are not used, and the originals are gone
    shards._verified.cache_clear()
    with pytest.raises(ValueError, match="is missing from the data build"):
        pipeline(data).batch(0)


def test_a_damaged_remote_shard_is_refused_and_leaves_no_copy(tmp_path, remote):
    data = write_data(tmp_path / "data", numbered([5] * 3))
    flip(tmp_path / "data" / "train-00000.array_record", -1)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"train-00000.array_record does not match its digest"):
            pipeline(data).batch(0)
    digest = Manifest.load(data).splits["train"].shards[0].sha256
    assert not [path for path in remote.iterdir() if path.name.startswith(digest)]


def test_a_dropped_iterator_needs_no_closing(data):
    batches = pipeline(data).batches(0, 5)
    with contextlib.closing(batches):  # type: ignore[type-var]
        pass
    assert next(batches, None) is None
