"""Which row comes when: closed-form rules from a slot number to a source, an epoch, a block and a row.

Nothing here has a position to save. Random numbers come from Philox counters, whose raw stream is the same for
every version of numpy, and from Grain's index shuffle.
"""

from __future__ import annotations

import functools
import heapq
import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from grain.experimental import index_shuffle

from jaxpt.data.packing import Plan, count_rows, make_plan
from jaxpt.types import Packing

BLOCK = 1 << 16  # documents that are packed together
INTERLEAVED = 4  # blocks whose rows are shuffled together
STREAMED = 1024  # plans that are kept for rows packed as a stream, about a megabyte each
_BLOCKS, _DOCUMENTS, _ROWS = range(3)  # what a random number decides


class Address(NamedTuple):
    """A row of a source: in which pass over the data, of which block, and which row of the block's plan."""

    epoch: int
    block: int
    row: int


class Stream:
    """The endless sequence of rows of one source.

    Each epoch permutes the blocks, takes a few of them at a time, and permutes the rows of those (rows packed as a
    stream keep their order); the documents of a block are shuffled before they are packed. Rows per block are counted
    when they are first needed, eight bytes per block, and only a few plans are kept.

    Args:
      documents: how many documents there are.
      lengths: (start, stop) -> tokens of those documents, [stop - start].
      packing: how documents become rows.
      length: tokens per row.
      key: two numbers below 2**64 that name the random stream; None keeps everything in its own order.
    """

    def __init__(
        self,
        documents: int,
        lengths: Callable[[int, int], np.ndarray],
        packing: Packing,
        length: int,
        key: tuple[int, int] | None,
    ):
        self._packing: Packing = packing
        self._documents, self._length, self._key = documents, length, key
        self._lengths, self.block_size = lengths, BLOCK
        self._blocks = -(-documents // self.block_size)
        self._rows = np.full(self._blocks, -1, np.int64)
        self._lock = threading.RLock()
        self._total: int | None = None
        self._epoch = functools.lru_cache(maxsize=2)(lambda number: _Epoch(self._permuted(_BLOCKS, number, 0), [0]))
        plans = 2 * INTERLEAVED if packing != "stream" else STREAMED  # lanes stand in many blocks at once
        self._plan = functools.lru_cache(maxsize=plans)(self._make_plan)
        self._row_seed = functools.lru_cache(maxsize=4)(self._make_row_seed)

    def locate(self, index: int) -> Address:
        """Where row `index` of the sequence is; `index` counts on through the epochs."""
        with self._lock:
            epoch = 0
            if self._total is None and not self._extend(0, index):
                self._total = self._epoch(0).ends[-1]
                assert self._total > 0, "a source has rows"
            if self._total is not None:
                epoch, index = divmod(index, self._total)
                self._extend(epoch, index)
            ends = self._epoch(epoch).ends
            group = bisect_right(ends, index) - 1
            row, rows = index - ends[group], ends[group + 1] - ends[group]
            if self._key is not None and self._packing != "stream":
                row = index_shuffle(row, rows - 1, self._row_seed(epoch, group), 4)
            for block in self._group(epoch, group):
                if row < self._count(block):
                    return Address(epoch, block, row)
                row -= self._count(block)
            raise AssertionError("a group holds the rows of its blocks")

    def follow(self, lane: int, lanes: int, step: int) -> Address:
        """Where the row is that a lane reads at a step: rows in their order, each lane its own stretch of the epoch.

        Raises:
          ValueError: there are fewer rows than lanes.
        """
        if self._total is None:
            self._total = self.rows()
        total = self._total
        if total < lanes:
            raise ValueError(
                f"these data make {total} rows and every step reads {lanes} streams of them: lower the batch size, "
                f"shorten the rows or build more data"
            )
        begin, end = lane * total // lanes, (lane + 1) * total // lanes
        epoch, place = divmod(step, end - begin)
        return self.locate(epoch * total + begin + place)

    def plan(self, epoch: int, block: int) -> Plan:
        """The plan of a block in an epoch."""
        with self._lock:
            return self._plan(epoch, block)

    def rows(self, limit: int | None = None) -> int:
        """Rows of one epoch; counting stops once there are `limit`."""
        with self._lock:
            self._extend(0, math.inf if limit is None else limit - 1)
            return self._epoch(0).ends[-1]

    def _extend(self, epoch: int, index: float) -> bool:
        """Count the rows of groups of blocks until row `index` of the epoch is among them; whether it is."""
        ends = self._epoch(epoch).ends
        while ends[-1] <= index and (len(ends) - 1) * INTERLEAVED < self._blocks:
            ends.append(ends[-1] + sum(self._count(block) for block in self._group(epoch, len(ends) - 1)))
        return ends[-1] > index

    def _group(self, epoch: int, group: int) -> list[int]:
        return self._epoch(epoch).blocks[group * INTERLEAVED : (group + 1) * INTERLEAVED].tolist()

    def _block_lengths(self, block: int) -> np.ndarray:
        start = block * self.block_size
        return self._lengths(start, min(start + self.block_size, self._documents))

    def _count(self, block: int) -> int:
        if self._rows[block] < 0:
            self._rows[block] = count_rows(self._packing, self._block_lengths(block), self._length)
        return int(self._rows[block])

    def _make_plan(self, epoch: int, block: int) -> Plan:
        lengths = self._block_lengths(block)
        return make_plan(self._packing, lengths, self._length, self._permuted(_DOCUMENTS, epoch, block, len(lengths)))

    def _random(self, what: int, epoch: int, where: int, count: int) -> np.ndarray:
        """[count] u64, the same for the same arguments for ever."""
        key = np.array(self._key, np.uint64)
        return np.random.Philox(key=key, counter=np.array([0, what, epoch, where], np.uint64)).random_raw(count)

    def _make_row_seed(self, epoch: int, group: int) -> int:
        return int(self._random(_ROWS, epoch, group, 1)[0]) >> 32  # Grain's seeds have 32 bits

    def _permuted(self, what: int, epoch: int, where: int, count: int | None = None) -> np.ndarray:
        count = self._blocks if count is None else count
        if self._key is None:
            return np.arange(count)
        return np.argsort(self._random(what, epoch, where, count), kind="stable")


class _Epoch(NamedTuple):
    blocks: np.ndarray  # [blocks] their order
    ends: list[int]  # 0, and the rows up to the end of each group of blocks, as far as counted


class Mixture:
    """Which source fills a slot, by weight: even, exact for ever, and in closed form.

    The sources are the leaves of a Huffman tree of their weights. A node with weights a and b gives
    round(n a / (a + b)) of its first n slots to the left: slot n goes left iff that number grows from n to n + 1, and
    that number is its place among the left slots. Integers only: after any number of slots, each of two or three
    sources is within one row of its exact share, and each of any number of sources within two.

    Args:
      weights: a positive number per source.

    >>> mixture = Mixture([2, 1])
    >>> [mixture.pick(slot) for slot in range(6)]
    [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3)]
    """

    def __init__(self, weights: Sequence[float]):
        fractions = [Fraction(weight) for weight in weights]
        whole = math.lcm(*(fraction.denominator for fraction in fractions))
        nodes: list[tuple[int, int, _Node]] = [(int(f * whole), i, i) for i, f in enumerate(fractions)]
        heapq.heapify(nodes)
        for tie in range(len(weights), 2 * len(weights) - 1):
            (light, _, right), (heavy, _, left) = heapq.heappop(nodes), heapq.heappop(nodes)
            heapq.heappush(nodes, (light + heavy, tie, (left, right, heavy, light + heavy)))
        self._tree = nodes[0][2]

    def pick(self, slot: int) -> tuple[int, int]:
        """The source of a slot, and how many slots that source had before."""
        node = self._tree
        while not isinstance(node, int):
            left, right, weight, total = node
            before = (2 * slot * weight + total) // (2 * total)
            goes_left = (2 * (slot + 1) * weight + total) // (2 * total) > before
            node, slot = (left, before) if goes_left else (right, slot - before)
        return node, slot


_Node = int | tuple["_Node", "_Node", int, int]  # a source, or (left, right, weight of the left, weight of both)
