"""Checkpoints that notice damage, restore onto any mesh, and survive a kill at any moment.

Orbax writes and reads the arrays; this folder is the only place that knows it. On top of what Orbax does, a
finished step holds ``jaxpt.json``: the caller's metadata, a digest per leaf that does not depend on the mesh,
and the SHA-256 of every file of the step. It is written last, so a step without it was cut short, and it
vouches for itself. ``restore`` verifies the files, then the leaves, names what is wrong and goes back to the
previous step; Orbax alone loads flipped bits without a word.

    RUN/checkpoints/
      100/                   a finished step: jaxpt.json beside what Orbax wrote
      200.damaged/           a step that was refused, moved aside by the next save; jaxpt never deletes it
"""

from jaxpt.checkpoint.checkpoints import CheckpointError, Checkpoints, Restored, Transferred
from jaxpt.checkpoint.integrity import Leaf, Saved, leaf_digest
from jaxpt.checkpoint.processes import Preemption

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Leaf",
    "Preemption",
    "Restored",
    "Saved",
    "Transferred",
    "leaf_digest",
]
