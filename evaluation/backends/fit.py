"""Whether a file answers for a checkpoint, and how far an answer may go."""

from __future__ import annotations

from pathlib import Path

from architectures.checkpoint import Checkpoint
from common.errors import FormatError
from gguf_export.contract import OpenedFile
from gguf_export.origin import require_made_from
from gguf_export.tokens.model_vocabulary import read_vocabulary
from powerinfer_bridge.verify.tokens import require_vocabulary


def check_fit(path: Path, checkpoint: Checkpoint) -> None:
    """Do nothing if a file is of a checkpoint, and its ids mean what the checkpoint's mean.

    Args:
        path: `*.powerinfer.gguf`.
        checkpoint: whose tokenizer makes the ids.

    Raises:
        CheckpointError: the file says that it was made from another model.
        FormatError: it cannot be read, or has another vocabulary.
    """
    opened = OpenedFile(path)
    require_made_from(path, opened.file, checkpoint, str(checkpoint.directory))
    rows = len(opened.vocabulary.tokens)
    if rows != checkpoint.shape.vocab_size:
        raise FormatError(
            f"{path}: has {rows} tokens, the model {checkpoint.shape.vocab_size}",
            "export the model again",
        )
    try:
        expected = read_vocabulary(checkpoint.directory, rows, checkpoint.config)
        require_vocabulary(opened.vocabulary, expected)
    except FormatError as error:
        raise FormatError(f"{path}: {error.problem}", error.remedy) from error


def room_for(length: int, count: int, context: int) -> int:
    """Return how many tokens may follow: those asked for, as far as the context reaches.

    Args:
        length: of the prompt, tokens.
        count: asked for.
        context: tokens in all.
    """
    return max(0, min(count, context - length))
