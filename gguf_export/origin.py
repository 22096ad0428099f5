"""Whether a file was made from a checkpoint, as far as it tells."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGUFValueType

from common.errors import CheckpointError
from gguf_files.names import FINGERPRINT_KEY
from gguf_files.reader import GGUFFile

if TYPE_CHECKING:
    from architectures.checkpoint import Checkpoint


def made_from(file: GGUFFile, checkpoint: Checkpoint) -> bool | None:
    """Return whether a file names a checkpoint as its model; None if it names none.

    Raises:
        FormatError: what it names is no text.
    """
    fingerprint = file.optional(FINGERPRINT_KEY, GGUFValueType.STRING, None)
    return None if fingerprint is None else bool(fingerprint == checkpoint.fingerprint)


def require_made_from(path: Path, file: GGUFFile, checkpoint: Checkpoint, model: str) -> None:
    """Do nothing unless a file names another model.

    Args:
        path: the file.
        file: opened.
        checkpoint: the model.
        model: as the user named it.

    Raises:
        CheckpointError: it is another's.
    """
    if made_from(file, checkpoint) is False:
        raise CheckpointError(
            f"{model}: is not the model that {path} was made from", "pass that as --model"
        )
