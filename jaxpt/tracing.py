"""A trace of a few steps, for xprof or TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax

from jaxpt.types import Tree

WARM = 3  # steps of a process before its trace begins: compilation, and filling of caches and queues


class StepTrace:
    """Trace ``count`` steps of this process, after its first ``WARM`` ones, with ``jax.profiler``.

    Leaving it ends a trace that is still running, however the run ends.

    Args:
      folder: where the trace goes; xprof and TensorBoard open it.
      start: steps done before this process.
      count: steps to trace; 0 does nothing.
      say: takes a line for the person who watches.
    """

    def __init__(self, folder: Path, start: int, count: int, say: Callable[[str], None]):
        self._folder, self._first, self._count, self._say = folder, start + WARM + 1, count, say
        self._running, self._reached = False, start

    def __enter__(self) -> StepTrace:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._stop(self._reached)
        elif self._count and self._reached < self._first:
            self._say(f"nothing was traced: --profile begins after {WARM} steps, and the run has ended by then")

    def before(self, step: int, state: Tree) -> None:
        """Begin or end the trace, if it is time, before a step; ``state`` is what the steps so far have made."""
        begins, ends = step == self._first, step == self._first + self._count
        if self._count and (begins or ends):
            jax.block_until_ready(state)  # whole steps only
            if begins:
                jax.profiler.start_trace(self._folder)
                self._running = True
            elif self._running:
                self._stop(step - 1)
        self._reached = step

    def _stop(self, last: int) -> None:
        jax.profiler.stop_trace()
        self._running = False
        self._say(
            f"traced steps {self._first} to {last}: pip install xprof && xprof --logdir={self._folder} --port=6006"
        )
