"""Checkpoints to go on from, and the trained model as an ordinary Hugging Face directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from architectures.checkpoint import Checkpoint
from architectures.old_keys import with_old_keys
from common.errors import OutputError
from common.files import read_json, write_json
from prosparse.tokenizer_output import write_tokenizer

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


def save_model(
    trainer: Any, checkpoint: Checkpoint, out: Path, report: Callable[[str], None]
) -> None:
    """Write weights in the type of the original, then tokenizer, and config.json last of all.

    Args:
        trainer: transformers' Trainer after training; every process calls.
        checkpoint: the original.
        out: the directory, which may hold other files.
        report: receives a line about a tokenizer that transformers misreads.
    """
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    state = {name: tensor.to(checkpoint.dtype) for name, tensor in state.items()}
    part = out / "training" / "model.part"
    shutil.rmtree(part, ignore_errors=True)
    trainer.model.config.use_cache = True  # off in training
    trainer.model.save_pretrained(part, state_dict=state)
    config = read_json(part / "config.json", OutputError, "start again")
    write_tokenizer(checkpoint.directory, checkpoint.tokenizer(), config, out, report)
    for file in sorted(part.iterdir()):
        if file.name != "config.json":
            file.replace(out / file.name)
    # Whoever finds a config.json finds all of the model. Its dtype is still that of training.
    name = str(checkpoint.dtype).removeprefix("torch.")
    write_json(out / "config.json", with_old_keys(config | {"dtype": name}))
    shutil.rmtree(part)
