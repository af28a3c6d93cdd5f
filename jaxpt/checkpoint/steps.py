"""The directories of steps: which lie there, what they say of themselves, and putting them away."""

from __future__ import annotations

import logging
import re
from typing import Any

from etils import epath

from jaxpt.checkpoint.integrity import MANIFEST, Saved

_STEP_NAME = re.compile(r"(0|[1-9][0-9]*)(\.orbax-checkpoint-tmp.*)?")
_DELETING = "deleting"  # a file that marks a step whose deletion has begun
_log = logging.getLogger(__name__)


class StepFolders:
    """The steps under one directory, on disk; nothing is remembered.

    Args:
      directory: any path that etils.epath opens.
    """

    def __init__(self, directory: Any):
        path = epath.Path(directory).expanduser()
        self.directory = path if "://" in str(path) else path.absolute()  # Orbax wants absolute paths

    def __truediv__(self, name: str | int) -> epath.Path:
        return self.directory / str(name)

    def names(self) -> list[str]:
        """The names of steps, newest first, half-written ones included."""
        return [name for name in self._listing() if not (self / name / _DELETING).exists()]

    def finished(self) -> list[int]:
        """The steps whose save has come to its end, oldest first."""
        numbers = (int(name) for name in self.names() if name.isdigit())
        return sorted(step for step in numbers if (self / step / MANIFEST).exists())

    def _listing(self) -> list[str]:
        if not self.directory.exists():
            return []
        found = [match for path in self.directory.iterdir() if (match := _STEP_NAME.fullmatch(path.name))]
        return [match[0] for match in sorted(found, key=lambda match: (-int(match[1]), match[0]))]

    def read(self, name: str) -> tuple[Saved | None, str]:
        """The description of a step, or else what is wrong."""
        if not name.isdigit():
            return None, "half-written: its save was cut short"
        if not (self / name).exists():
            return None, "there is no such step"
        try:
            saved = Saved.parse((self / name / MANIFEST).read_bytes())
        except FileNotFoundError:
            return None, f"{MANIFEST} is missing: its save was cut short, or the file was removed"
        except (OSError, ValueError) as error:
            return None, f"{MANIFEST} is damaged ({error})"
        return (saved, "") if saved.step == int(name) else (None, f"{MANIFEST} is that of step {saved.step}")

    def finish(self, saved: Saved) -> None:
        """Write the description of a step, at once or not at all."""
        unfinished = self / saved.step / f"{MANIFEST}.tmp"
        unfinished.write_bytes(saved.render())
        unfinished.replace(self / saved.step / MANIFEST)

    def clear(self) -> None:
        """Delete what killed saves and killed deletions have left."""
        for name in self._listing():
            if not name.isdigit() or (self / name / _DELETING).exists():
                self.delete(name)

    def delete(self, name: str | int) -> None:
        """Remove a step; a kill in between leaves the mark, by which ``clear`` goes on."""
        (self / name / _DELETING).touch()
        for path in (self / name).iterdir():
            if path.name != _DELETING:
                path.rmtree() if path.is_dir() else path.unlink()
        (self / name).rmtree()

    def move_aside(self, step: int, why: str) -> None:
        """Rename a step so that it is none any more."""
        target, tries = self / f"{step}.{why}", 1
        while target.exists():
            tries += 1
            target = self / f"{step}.{why}-{tries}"
        _log.warning("moving %s to %s", self / step, target.name)
        (self / step).rename(target)


def ranked(intact: dict[int, Saved]) -> list[int]:
    """The steps that have a metric, the lowest first and among equals the newest."""
    scores = [(saved.metric, -step) for step, saved in intact.items() if saved.metric is not None]
    return [-step for _, step in sorted(scores)]
