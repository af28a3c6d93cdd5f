"""What a run measures, and where it is written: metrics.jsonl, TensorBoard, loss.png and a line on the terminal.

Everything here takes plain Python numbers: the training loop reads them from the device one step late, so that
the device never waits for a log line.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

BASELINE = "unigram_loss"  # the evaluation metric that loss.png draws as a dashed line

# ------------------------------------------------------------------------------------------------- FLOPs

# Dense bfloat16 FLOP/s of one JAX device, from the vendors' data sheets (no sparsity). The first name that the
# device kind contains, in this order, counts.
_PEAK_FLOPS = {
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p calls itself "TPU v5"
    "TPU v4": 275e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
}


def matmul_flops(fn: Callable[..., Any], *args: Any) -> float:
    """Floating-point operations of the matrix products and convolutions in ``fn(*args)``.

    The traced program is walked, so that no formula per model is needed and a scanned block counts as often as
    it runs (XLA's ``cost_analysis`` counts it once). A product of [M, K] and [K, N] is 2 M N K. Of a conditional
    the costliest branch counts; a while loop of unknown length counts once; a ``shard_map`` counts its body on
    every shard. Elementwise work is left out, as is usual for model FLOPs.

    The model FLOPs of a training step are 3 times those of its forward pass (every product has two in the
    backward pass); count the forward pass for MFU, because the gradient under rematerialisation also holds the
    recomputation (Chowdhery et al. 2022, PaLM, appendix B).

    Args:
      fn: a function of JAX arrays.
      *args: arrays, or ``jax.ShapeDtypeStruct`` in their place: nothing is computed.

    >>> a, b = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 4), jnp.float32)
    >>> matmul_flops(jnp.matmul, a, b)
    1024.0
    """
    return _jaxpr_flops(jax.make_jaxpr(fn)(*args).jaxpr)


def _jaxpr_flops(jaxpr: core.Jaxpr) -> float:
    return float(sum(_equation_flops(equation) for equation in jaxpr.eqns))


def _equation_flops(equation: core.JaxprEqn) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        left = _shape(equation.invars[0])
        return 2.0 * math.prod(_shape(equation.outvars[0])) * math.prod(left[axis] for axis in contract)
    if name == "conv_general_dilated":
        kernel = _shape(equation.invars[1])
        per_output = math.prod(kernel) // max(kernel[params["dimension_numbers"].rhs_spec[0]], 1)
        return 2.0 * math.prod(_shape(equation.outvars[0])) * per_output
    inner = [_jaxpr_flops(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
    if not inner:
        return 0.0
    if name == "cond":
        return max(inner)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "shard_map":
        return sum(inner) * math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        return sum(inner) * math.prod(params["grid_mapping"].grid)
    return sum(inner)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _jaxprs(value: Any) -> Iterator[core.Jaxpr]:
    """The programs in one parameter of an equation; of functions to come (custom derivatives) there is no program."""
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from _jaxprs(entry)


def peak_flops() -> float:
    """FLOP/s that all devices of the run can reach together, the denominator of MFU.

    For TPU v4, v5e, v5p and v6e and NVIDIA A100, H100, H200 and B200 it is the data sheet's dense bfloat16
    figure. Of a CPU, and of a device that is not in the list, it is what a 1024 x 1024 matrix product reaches
    here, the better of float32 and bfloat16, measured once per process. Virtual CPU devices share one host, so
    a CPU counts once per process.
    """
    device = jax.devices()[0]
    for name, flops in _PEAK_FLOPS.items():
        if name.lower() in device.device_kind.lower():
            return flops * jax.device_count()
    return _measured_flops() * (jax.process_count() if device.platform == "cpu" else jax.device_count())


@functools.cache
def _measured_flops(size: int = 1024) -> float:
    best = 0.0
    for dtype in (jnp.float32, jnp.bfloat16):
        matrix = jax.device_put(jnp.ones((size, size), dtype), jax.local_devices()[0])
        product = jax.jit(jnp.matmul)
        product(matrix, matrix).block_until_ready()
        for _ in range(3):
            start = time.perf_counter()
            product(matrix, matrix).block_until_ready()
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


class Meter:
    """Speed of the run between two log lines.

    Args:
      peak: FLOP/s of all devices together, see ``peak_flops``.
      seconds: wall-clock seconds that earlier processes of this run took (``MetricsWriter.seconds``).

    >>> meter = Meter(peak=1e12)
    >>> meter.step(tokens=4096, flops=1e6)
    >>> sorted(meter.read())
    ['data_wait', 'mfu', 'seconds', 'tokens_per_second']
    """

    def __init__(self, peak: float, seconds: float = 0.0):
        self._peak = peak
        self._begin = time.perf_counter() - seconds
        self._reset()

    def _reset(self) -> None:
        self._start, self._flops, self._tokens, self._waited, self._paused = time.perf_counter(), 0.0, 0.0, 0.0, 0.0

    def step(self, tokens: float, flops: float) -> None:
        """Count one finished step: its non-padding tokens and its useful FLOPs, both of the global batch."""
        self._flops += flops
        self._tokens += tokens

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around fetching the next batch: time here is the share ``data_wait``."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training (evaluation, waiting for a save): time here counts in ``seconds`` only."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """The measurements since the last call, which starts the next interval.

        Returns:
          tokens_per_second (non-padding), mfu and data_wait (fractions of 1), seconds (of the whole run).
        """
        now = time.perf_counter()
        training = max(now - self._start - self._paused, 1e-9)
        values = {
            "tokens_per_second": self._tokens / training,
            "mfu": self._flops / training / self._peak,
            "data_wait": min(self._waited / training, 1.0),
            "seconds": now - self._begin,
        }
        self._reset()
        return values


# ----------------------------------------------------------------------------------------------- writing


class MetricsWriter:
    """The measurements of one run directory.

    Writes ``metrics.jsonl`` (one JSON object per line, flushed per line; floats in full, non-finite as null),
    TensorBoard events in ``tensorboard/``, ``loss.png`` (redrawn at every evaluation and at the end) and, for
    the person watching, a live line on a terminal or plain lines without one.

    Write the lines of step s BEFORE a checkpoint of step s: a resume keeps the lines up to its step and cuts
    the rest, so a line that was still to be written when the run was killed would be missing for good.

    Args:
      directory: the run directory, on a local or mounted file system.
      steps: length of the run, for the progress and the time left.
      resume_step: the restored step: later lines of metrics.jsonl are cut, and a torn last line is dropped. None
        starts empty.
      write: False on every process but the first: then nothing is written or printed.
      console: where lines are printed; standard output by default.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        steps: int,
        *,
        resume_step: int | None = None,
        write: bool = True,
        console: Console | None = None,
    ):
        self.seconds = 0.0  # wall-clock seconds on the last kept line
        self._directory, self._steps, self._write = Path(directory), steps, write
        self._history: list[dict[str, Any]] = []
        self._progress: Progress | None = None
        if not write:
            return
        from tensorboardX import SummaryWriter  # slow to import, and only one process needs it

        self._directory.mkdir(parents=True, exist_ok=True)
        self._console = console or Console(highlight=False, soft_wrap=True)
        path = self._directory / "metrics.jsonl"
        if resume_step is not None:
            self._history, dropped = _read_lines(path, resume_step)
            self.seconds = max((line.get("seconds") or 0.0 for line in self._history), default=0.0)
            if dropped:
                self.say(f"dropped {dropped} unreadable line(s) of {path}")
        temporary = path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in self._history), "utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")
        purge = None if resume_step is None else resume_step + 1
        self._board = SummaryWriter(str(self._directory / "tensorboard"), purge_step=purge)
        self._last = (self._history[-1]["step"] if self._history else resume_step or 0, time.perf_counter())
        self._pace = 0.0  # seconds per step, of the last two training lines
        if self._console.is_terminal:
            where = TextColumn("step {task.completed:.0f}/{task.total:.0f}  {task.description}")
            progress = Progress(where, BarColumn(), console=self._console)
            self._task = progress.add_task("compiling", total=steps, completed=resume_step or 0)
            progress.start()
            self._progress = progress

    def train(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one training line: ``metrics`` after ``step`` updates, keys as they shall appear."""
        if not self._write:
            return
        line = self._record(step, metrics)
        last, then = self._last
        now = time.perf_counter()
        if step > last:
            self._pace = (now - then) / (step - last)
        self._last = (step, now)
        text = self._describe(line)
        if self._progress:
            self._progress.update(self._task, completed=step, description=text)
        else:
            self.say(f"step {step}/{self._steps}  {text}")

    def tick(self, step: int) -> None:
        """Move the live line on to ``step``, between training lines; without a terminal there is none."""
        if self._progress:
            # until the first line there is nothing to show but that steps are being made
            self._progress.update(self._task, completed=step, description=None if self._pace else "running")

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one evaluation line, every key with the prefix ``eval/``, and redraw the picture."""
        if not self._write:
            return
        line = self._record(step, {f"eval/{name}": value for name, value in metrics.items()})
        values = "  ".join(f"{name[5:]} {_short(value)}" for name, value in line.items() if name != "step")
        self.say(f"evaluation at step {step}/{self._steps}  {values}")
        self.draw()
        self._last = (line["step"], time.perf_counter())  # the evaluation's time is not training pace

    def diagnostics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one line of diagnostics, every key with the prefix ``diagnostics/``; printed but for single layers."""
        if not self._write:
            return
        line = self._record(step, {f"diagnostics/{name}": value for name, value in metrics.items()})
        shown = [name for name in metrics if name.count("/") == 1]
        values = "  ".join(f"{name} {_short(line[f'diagnostics/{name}'])}" for name in shown)
        self.say(f"diagnostics of step {step}/{self._steps}  {values}")
        self._last = (step - 1, time.perf_counter())  # measured before the step, and no training pace either

    def say(self, message: str) -> None:
        """Print a line that stays, above the live line."""
        if self._write:
            self._console.print(Text(message))

    def draw(self) -> None:
        """Redraw loss.png; a failure to draw is said and never stops a run."""
        if not self._write:
            return
        try:
            _draw(self._history, self._directory / "loss.png", title=self._directory.name)
        except Exception as error:  # a picture is not worth a run
            self.say(f"could not draw loss.png: {error}")

    def close(self) -> None:
        """Draw the last picture and close the files; the writer is not usable afterwards."""
        if not self._write:
            return
        self.draw()
        if self._progress:
            self._progress.stop()
        self._file.close()
        self._board.close()
        self._write = False

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        line = {"step": int(step)} | {name: _plain(value) for name, value in metrics.items() if name != "step"}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in line.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, step)
        self._history.append(line)
        return line

    def _describe(self, line: Mapping[str, Any]) -> str:
        left = max(self._steps - line["step"], 0) * self._pace
        parts = [f"loss {_short(line.get('loss'))}"]
        parts += [f"{_short(line['tokens_per_second'])} tokens/s"] if "tokens_per_second" in line else []
        shares = (("MFU", "mfu"), ("data wait", "data_wait"))
        parts += [f"{label} {line[key]:.1%}" for label, key in shares if line.get(key) is not None]
        parts += [f"skipped {line['skipped_steps']}"] if line.get("skipped_steps") else []
        return "  ".join([*parts, f"ETA {int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}"])


def _plain(value: Any) -> int | float | None:
    """A JSON number: integers as they are, floats in full, null for what is not finite."""
    value = value.item() if hasattr(value, "item") else value
    if value is None or isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def _short(value: float | None) -> str:
    if value is None:
        return "not finite"
    if isinstance(value, float) and 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    if abs(value) >= 1e4:
        return f"{value / 1e6:.3g}M" if abs(value) >= 1e6 else f"{value / 1e3:.3g}k"
    return f"{value:.3g}"


def _read_lines(path: Path, last_step: int) -> tuple[list[dict[str, Any]], int]:
    """The lines of metrics.jsonl up to ``last_step``, and how many lines could not be read."""
    kept, dropped = [], 0
    for text in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            step = int(line["step"])
        except (ValueError, TypeError, KeyError):
            dropped += bool(text.strip())
            continue
        if step <= last_step:
            kept.append(line)
    return kept, dropped


def _draw(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Training and evaluation loss over the steps, with the unigram baseline where an evaluation gave one."""
    import logging

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # "building the font cache" is no news
    from matplotlib.figure import Figure  # without pyplot: no backend is chosen, no window can open
    from matplotlib.ticker import LogLocator, ScalarFormatter

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats, log scale)", title=title, yscale="log")
    for key, label, style in (("loss", "training", "-"), ("eval/loss", "evaluation", "o-")):
        points = [(line["step"], line[key]) for line in lines if (line.get(key) or 0.0) > 0.0]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=f"{label}: {points[-1][1]:.3f}", markersize=3)
    baselines = [line[f"eval/{BASELINE}"] for line in lines if line.get(f"eval/{BASELINE}")]
    if baselines:
        axes.axhline(baselines[-1], color="gray", linestyle="--", label=f"unigram baseline: {baselines[-1]:.3f}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    temporary = path.with_suffix(".tmp.png")  # a killed run leaves the old picture, not half of a new one
    figure.savefig(temporary)
    temporary.replace(path)
