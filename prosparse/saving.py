"""The trained model as an ordinary Hugging Face directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from architectures.checkpoint import Checkpoint
from common.files import write_bytes

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def save_model(trainer: Any, checkpoint: Checkpoint, out: Path) -> None:
    """Write weights in the type of the original, then tokenizer, and config.json last of all.

    Args:
        trainer: transformers' Trainer after training; every process calls.
        checkpoint: the original.
        out: the directory, which may hold other files.
    """
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    state = {name: tensor.to(checkpoint.dtype) for name, tensor in state.items()}
    part = out / "training" / "model.part"
    shutil.rmtree(part, ignore_errors=True)
    trainer.model.config.use_cache = True  # off in training
    trainer.model.config.architectures = [type(trainer.model).__name__]
    trainer.model.save_pretrained(part, state_dict=state)
    copy_tokenizer(checkpoint.path, out)
    # Whoever finds a config.json finds all of the model.
    config = (part / "config.json").read_bytes()
    for file in sorted(part.iterdir()):
        if file.name != "config.json":
            file.replace(out / file.name)
    write_bytes(out / "config.json", config)
    shutil.rmtree(part)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the tokenizer's files of a checkpoint, those that there are."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            write_bytes(out / name, (source / name).read_bytes())
