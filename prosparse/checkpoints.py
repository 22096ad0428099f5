"""The checkpoints of a run: only those that carry a mark are whole."""

from __future__ import annotations

import shutil
from pathlib import Path

MARK = "complete"
"""File that is written into a checkpoint after everything else."""


def newest_checkpoint(training: Path) -> Path | None:
    """Return the complete checkpoint with the most steps, if any.

    Args:
        training: directory of the run, with a `checkpoint-N` for some steps N.
    """
    return max(
        (mark.parent for mark in training.glob(f"checkpoint-*/{MARK}")),
        key=lambda path: int(path.name.rpartition("-")[2]),
        default=None,
    )


def drop_unfinished(training: Path) -> None:
    """Remove checkpoints that a killed run did not finish; they would count as the newest."""
    for path in training.glob("checkpoint-*"):
        if not (path / MARK).exists():
            shutil.rmtree(path)


def remove_checkpoints(training: Path) -> None:
    """Remove all checkpoints of a run that has written its model."""
    for path in training.glob("checkpoint-*"):
        shutil.rmtree(path)
