"""Running the work of a build in several processes, with progress and the time that is left."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

Job = TypeVar("Job")
Result = TypeVar("Result")

SMALL = 4 << 20  # bytes of input that are read sooner than a process has started
_PLAIN_SECONDS = 10.0  # between two lines of progress without a terminal

_advance: Callable[[int], None] = lambda n: None  # noqa: E731  how this process tells what it has read


def advance(n: int) -> None:
    """Tell that `n` more bytes of the input have been read; called by the work, in whatever process it runs."""
    _advance(n)


def say(message: str) -> None:
    """Tell the user something, beside the results of a command."""
    print(message, file=sys.stderr, flush=True)


def run(
    title: str,
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int,
    total: int,
    each: Callable[[Result], Any] | None = None,
) -> list[Result]:
    """Do `work` on every job, in up to `workers` processes.

    Args:
      title: what is going on, for the progress.
      work: a function of a module.
      jobs: its arguments, one for each call.
      workers: processes; with one, or with little to do, the work is done in this process.
      total: bytes of input in all, as the work tells them by `advance`.
      each: takes a result as soon as it is there, in no particular order; then none is kept.

    Returns:
      The results in the order of the jobs, or nothing with `each`.

    Raises:
      RuntimeError: a process died.
    """
    global _advance
    if workers == 1 or len(jobs) < 2 or total < SMALL:
        results = []
        with _progress(title, total) as show:
            done = 0

            def count(n: int) -> None:
                nonlocal done
                done += n
                show(done)

            _advance, before = count, _advance
            try:
                for job in jobs:
                    result = work(job)
                    each(result) if each else results.append(result)
            finally:
                _advance = before
        return results
    return _run_pool(title, work, jobs, min(workers, len(jobs)), total, each)


def _run_pool(
    title: str,
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int,
    total: int,
    each: Callable[[Result], Any] | None,
) -> list[Result]:
    context = multiprocessing.get_context("spawn")  # forking a process that runs JAX can deadlock
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, context, _start, (counter,))
    try:
        with _progress(title, total) as show:
            order: dict[Future[Result], int] = {pool.submit(work, job): i for i, job in enumerate(jobs)}
            results: dict[int, Result] = {}
            while order:
                finished, _ = wait(order, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in finished:
                    index = order.pop(future)
                    if each:
                        each(future.result())
                    else:
                        results[index] = future.result()
                show(counter.value)
        return [results[i] for i in sorted(results)]
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process of the data build died: perhaps memory ran out (try fewer --workers). When `build` is "
            'called from a script, the call must stand under `if __name__ == "__main__":`. Run the same build again '
            "to go on: finished parts are kept."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(counter: Any) -> None:
    """Begin a worker process, which ends with the main one: at once at Ctrl-C, and also where that was killed."""
    global _advance
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def count(n: int) -> None:
        with counter.get_lock():
            counter.value += n

    _advance = count


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that shows how many bytes are done: a bar on a terminal, else a line now and then."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total)
            yield lambda done: bar.update(task, completed=min(done, total))
            bar.update(task, completed=total)
        return
    began = last = time.monotonic()

    def show(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _PLAIN_SECONDS or not done:
            return
        last = now
        rate = done / (now - began)
        left = max(total - done, 0) / rate
        say(f"{title}: {done / 1e6:.0f} of {total / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s, {left:.0f} s left")

    yield show
