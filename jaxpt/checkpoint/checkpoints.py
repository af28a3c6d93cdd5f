"""The checkpoints of one run: save in the background, keep the newest and the best, restore what is sound."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from jaxpt.checkpoint.integrity import Leaf, Saved, file_digests, file_problems, list_files
from jaxpt.checkpoint.leaves import describe, differences, flatten, load, nest, say, short
from jaxpt.checkpoint.processes import gather, on_first, union
from jaxpt.checkpoint.steps import StepFolders, ranked
from jaxpt.types import Array, Params, Tree

Which: TypeAlias = int | Literal["latest", "best"]

_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """No step can be restored; the message says why for each."""


class Restored(NamedTuple):
    """A restored step, and which newer steps were refused and why."""

    step: int
    state: Tree
    metadata: dict[str, Any]
    refused: list[str]


class Transferred(NamedTuple):
    """Parameters of which those that fit were taken from a checkpoint."""

    step: int
    params: Params
    taken: list[str]  # paths
    left: list[str]  # a sentence per leaf that keeps its value, or that only the checkpoint has
    refused: list[str]


class Checkpoints:
    """The checkpoints of one run.

    ``save``, ``wait``, ``close`` and the three ``restore`` functions are collective: with several processes,
    all must call them.

    Args:
      directory: where the steps lie, any path that etils.epath opens and all processes see.
      keep: how many of the newest finished steps to keep, at least 1.
      keep_best: how many of the steps with the lowest metric to keep besides.

    >>> import tempfile, jax.numpy as jnp
    >>> state = {"params": {"w": jnp.arange(4.0)}, "step": jnp.int32(7)}
    >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
    ...     checkpoints.save(7, state, metadata={"config": "tiny"}, metric=2.5)
    ...     checkpoints.wait()
    ...     restored = checkpoints.restore(jax.eval_shape(lambda: state))
    >>> restored.step, restored.metadata, restored.state["params"]["w"].tolist(), restored.refused
    (7, {'config': 'tiny'}, [0.0, 1.0, 2.0, 3.0], [])
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2, keep_best: int = 1):
        if keep < 1 or keep_best < 0:
            raise ValueError(f"keep must be at least 1 and keep_best at least 0, not {keep} and {keep_best}")
        self._folders = StepFolders(directory)
        self.directory = self._folders.directory
        self._keep, self._keep_best = keep, keep_best
        self._refused: set[int] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # the other processes may not come: finish what this one has begun, without them
            self._thread.shutdown()
            if self._pending and (error := self._pending.exception()):
                _log.error("the last checkpoint could not be saved: %s", error)

    # ---------------------------------------------------------------------------------------- looking

    def steps(self) -> list[int]:
        """The finished steps, oldest first, without those that this object has refused."""
        return [step for step in self._folders.finished() if step not in self._refused]

    @property
    def latest(self) -> int | None:
        """The newest finished step."""
        return max(self.steps(), default=None)

    @property
    def best(self) -> int | None:
        """The finished step with the lowest metric; None where none has one."""
        return next(iter(ranked(self._intact())), None)

    def describe(self, step: Which = "latest") -> Saved:
        """What a step says of itself: metadata, metric, and path, shape and dtype of each leaf.

        Falls back to the previous step as ``restore`` does, unless the step is given by number.

        Raises:
          CheckpointError: no step has a sound description.
        """
        refused = []
        for name in self._order(step):
            saved, problem = self._folders.read(name)
            if saved:
                return saved
            refused.append(f"step {name}: {problem}")
        raise self._none_usable(step, refused)

    # ----------------------------------------------------------------------------------------- saving

    def save(self, step: int, state: Tree, metadata: dict[str, Any] | None = None, metric: float | None = None) -> None:
        """Save a step in the background; returns as soon as the arrays may be donated.

        Waits for the previous save first. A sound step of the same number is left alone where its leaves are
        the same; otherwise what stands there is moved aside. When the new step is finished, steps that are
        neither among the newest nor among the best are deleted.

        Args:
          step: the number of steps done.
          state: a nest of jax.Arrays: dicts, tuples, NamedTuples, None; any dtype, shape and sharding.
          metadata: what JSON can hold.
          metric: the lower the better, for example the evaluation loss. A step without a finite one is never
            "best".

        Raises:
          ValueError: a leaf is not a jax.Array.
          RuntimeError: the previous save failed.
        """
        leaves, _ = flatten(state, jax.Array)
        score = float(metric) if metric is not None and math.isfinite(metric) else None
        told = json.loads(json.dumps(metadata or {}))  # what is no JSON meets the caller here, not the thread
        self.wait()
        saved = Saved(int(step), score, told, describe(leaves), files={})
        new = on_first(lambda: self._make_room(saved))
        self._refused.clear()
        if new:
            response = ocp.save_async(self._folders / saved.step, nest(leaves))
            self._pending = self._thread.submit(self._finish, response, saved)

    def wait(self) -> None:
        """Return when the last save is finished.

        Raises:
          RuntimeError: it failed, on any process.
        """
        cause, pending = None, self._pending
        if pending:
            try:
                pending.result()
            except Exception as error:
                cause = error
            self._pending = None
        problems = [problem for problem in gather(f"{type(cause).__name__}: {cause}" if cause else "") if problem]
        if problems:
            raise RuntimeError(f"the last checkpoint could not be saved: {short(problems)}") from cause

    def close(self) -> None:
        """Wait for the last save and let the background thread go."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _make_room(self, new: Saved) -> bool:
        """Clear what killed runs have left and what stands at this step; False where it is saved already."""
        self._folders.clear()
        for step in sorted(self._refused):
            if (self._folders / step).exists():
                self._folders.move_aside(step, "damaged")
        if (self._folders / new.step).exists():
            old, problem = self._folders.read(str(new.step))
            if old and old.leaves == new.leaves and not file_problems(self._folders / new.step, old.files):
                return False
            self._folders.move_aside(new.step, "damaged" if problem else "replaced")
        return True

    def _finish(self, response: ocp.AsyncResponse[None], saved: Saved) -> None:
        """In the background: when Orbax has committed, hash its files and write the manifest, the last of all."""
        response.result()
        if jax.process_index() != 0:
            return
        folder = self._folders / saved.step
        self._folders.finish(saved._replace(files=file_digests(folder, list_files(folder))))
        intact = self._intact()
        kept = {*sorted(intact)[-self._keep :], *ranked(intact)[: self._keep_best]}
        for step in intact.keys() - kept:
            self._folders.delete(step)

    # -------------------------------------------------------------------------------------- restoring

    def restore(self, abstract_state: Tree, step: int | None = None) -> Restored:
        """Restore the newest sound step onto the mesh of the target, whatever mesh it was saved on.

        Files are verified before, leaves after loading. A step that fails is named, in the log and in
        ``refused``, and the previous one is tried.

        Args:
          abstract_state: the state as jax.ShapeDtypeStructs with shardings.
          step: this one and no other.

        Raises:
          ValueError: the state has other leaves, shapes or dtypes than the checkpoint; they are listed.
          CheckpointError: there is no sound step; the message says what is wrong with each.
        """
        leaves, treedef = flatten(abstract_state, jax.ShapeDtypeStruct | jax.Array)

        def choose(saved: Saved) -> dict[str, Any]:
            self._must_match(saved, leaves, saved.leaves)
            return leaves

        saved, arrays, refused = self._first_sound("latest" if step is None else step, choose)
        state = jax.tree.unflatten(treedef, [arrays[name] for name in leaves])
        return Restored(saved.step, state, saved.metadata, refused)

    def restore_params(self, abstract_params: Params, step: Which = "latest", averaged: bool = False) -> Restored:
        """Restore the parameters alone, as ``restore`` does the whole state.

        Args:
          abstract_params: the parameters as jax.ShapeDtypeStructs with shardings.
          step: a number, "latest", or "best" (the lowest metric; the latest where none has a metric).
          averaged: take the moving average of the parameters instead.

        Raises:
          ValueError, CheckpointError: as ``restore``; or there is no average.
        """
        prefix = "averaged/" if averaged else "params/"
        leaves, treedef = flatten(abstract_params, jax.ShapeDtypeStruct | jax.Array, prefix)

        def choose(saved: Saved) -> dict[str, Any]:
            self._must_match(saved, leaves, self._part(saved, prefix))
            return leaves

        saved, arrays, refused = self._first_sound(step, choose)
        params = jax.tree.unflatten(treedef, [arrays[name] for name in leaves])
        return Restored(saved.step, params, saved.metadata, refused)

    def restore_into(self, params: Params, step: Which = "latest", averaged: bool = False) -> Transferred:
        """Replace those parameters that the checkpoint has with the same path, shape and dtype.

        Args:
          params: initialised parameters, jax.Arrays; what is taken gets their shardings.
          step, averaged: as in ``restore_params``.

        Raises:
          ValueError: not a single one fits.
          CheckpointError: as ``restore``.
        """
        prefix = "averaged/" if averaged else "params/"
        leaves, treedef = flatten(params, jax.Array, prefix)

        def choose(saved: Saved) -> dict[str, Any]:
            there = self._part(saved, prefix)
            fitting = {name: x for name, x in leaves.items() if say(x) == say(there.get(name))}
            if not fitting:
                self._must_match(saved, leaves, there)
            return fitting

        saved, arrays, refused = self._first_sound(step, choose)
        left = differences(leaves, self._part(saved, prefix))
        merged = jax.tree.unflatten(treedef, [arrays.get(name, x) for name, x in leaves.items()])
        taken = [name.removeprefix(prefix) for name in arrays]
        return Transferred(saved.step, merged, taken, [each.removeprefix(prefix) for each in left], refused)

    def _first_sound(
        self, step: Which, choose: Callable[[Saved], dict[str, Any]]
    ) -> tuple[Saved, dict[str, Array], list[str]]:
        """Verify and load the first sound step in the order of preference.

        All processes take the same turns: process 0 lists the steps, and what any of them finds wrong is known
        to all before the next collective.
        """
        refused: list[str] = []
        for name in on_first(lambda: self._order(step)):
            saved, problem = self._folders.read(name)
            problems = union([problem] if problem else [])
            wanted, arrays = {}, {}
            if saved and not problems:
                wanted = choose(saved)
                mine = sorted(saved.files)[jax.process_index() :: jax.process_count()]  # they share the hashing
                problems = union(file_problems(self._folders / name, {path: saved.files[path] for path in mine}))
            if saved and not problems:
                arrays = load(self._folders / name, wanted)
                bad = [path for path, leaf in describe(arrays).items() if leaf != saved.leaves[path]]
                problems = union([f"{path} is damaged (its digest differs)" for path in bad])
            if saved and not problems:
                self._refused.discard(saved.step)
                return saved, arrays, refused
            refused.append(f"step {name}: {short(problems)}")
            _log.info("checkpoint refused: %s in %s", refused[-1], self.directory)  # the caller has it, too
            if name.isdigit():
                self._refused.add(int(name))
        raise self._none_usable(step, refused)

    def _order(self, step: Which) -> list[str]:
        if step not in ("latest", "best"):
            return [str(int(step))]
        first = [str(self.best)] if step == "best" and self.best is not None else []
        return first + [name for name in self._folders.names() if name not in first]

    def _intact(self) -> dict[int, Saved]:
        """The finished steps whose description is sound."""
        return {step: saved for step in self.steps() if (saved := self._folders.read(str(step))[0])}

    def _part(self, saved: Saved, prefix: str) -> dict[str, Leaf]:
        part = {name: leaf for name, leaf in saved.leaves.items() if name.startswith(prefix)}
        if not part:
            raise ValueError(f"step {saved.step} of {self.directory} holds no {prefix.rstrip('/')} parameters")
        return part

    def _must_match(self, saved: Saved, wanted: dict[str, Any], there: dict[str, Leaf]) -> None:
        if found := differences(wanted, there):
            raise ValueError(
                f"step {saved.step} of {self.directory} is another model's or optimizer's state:\n  "
                + short(found, "\n  ")
            )

    def _none_usable(self, step: Which, refused: list[str]) -> CheckpointError:
        which = "any step" if step in ("latest", "best") else f"step {step}"
        return CheckpointError(
            f"cannot restore {which} of {self.directory}"
            + (f" (there are {', '.join(map(str, self.steps()))})" if self.steps() else "")
            + ": "
            + ("\n  ".join(["", *refused]) or "there are none")
        )
