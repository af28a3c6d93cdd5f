"""What several processes must agree on: text, problems, and when to stop."""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_log = logging.getLogger(__name__)


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order. Collective, and so a barrier."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(data.size)))
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def union(problems: list[str]) -> list[str]:
    """The problems that any process found, so that all take the same turn. Collective."""
    return sorted({problem for found in gather(json.dumps(problems)) for problem in json.loads(found)})


def on_first(act: Callable[[], Any]) -> Any:
    """What ``act`` returns on process 0 (JSON), on all; an error there is raised on all. Collective."""
    if jax.process_count() == 1:
        return act()
    said: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            said = {"result": act()}
        except Exception as error:  # the others wait for us: they must hear of it
            said = {"error": f"{type(error).__name__}: {error}"}
    said = json.loads(gather(json.dumps(said))[0])
    if "error" in said:
        raise RuntimeError(f"process 0: {said['error']}")
    return said["result"]


class Preemption:
    """Tells a training loop, at the same step on all processes, that SIGTERM asks it to save and stop.

    With one process it takes SIGTERM for the length of a ``with`` block: the signal only sets a flag, so that
    neither the first nor a second one cuts a save short. With several, JAX's preemption service (which
    ``jax.distributed.initialize`` starts) carries the signal of any process to all and agrees on a step.

    >>> with Preemption() as preemption:
    ...     before = preemption.requested(3)
    ...     signal.raise_signal(signal.SIGTERM)
    ...     before, preemption.requested(4)
    (False, True)
    """

    def __init__(self) -> None:
        self._noted = False
        self._watching = False
        self._previous: Any = None

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1:
            if threading.current_thread() is threading.main_thread():
                self._previous = signal.signal(signal.SIGTERM, self._note)
                self._watching = True
            else:
                _log.warning("SIGTERM will not save a checkpoint: only the main thread can watch for it")
        return self

    def __exit__(self, *_: object) -> None:
        if self._watching:
            # None: the handler was not installed from Python and cannot be put back from here
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._previous is None else self._previous)
            self._watching = False

    def _note(self, *_: object) -> None:
        self._noted = True

    def requested(self, step: int) -> bool:
        """Whether to save and stop after this step.

        With several processes, all must ask at every step, from the same step on.

        Args:
          step: the steps done so far.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noted
