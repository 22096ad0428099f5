"""The runnable torch model of a checkpoint, on transformers' own classes."""

from __future__ import annotations

import torch
from torch import nn

from architectures.checkpoint import Checkpoint
from common.errors import CheckpointError


def load_model(checkpoint: Checkpoint, *, dtype: torch.dtype, device: str) -> nn.Module:
    """Build the model and load its weights; no code from the checkpoint is run.

    Args:
        checkpoint: the opened checkpoint.
        dtype: floating type to run in.
        device: torch device.

    Raises:
        CheckpointError: transformers refuses the checkpoint, or the device is not there.
    """
    import transformers

    model_class = getattr(transformers, checkpoint.architecture.model_class)
    transformers.utils.logging.disable_progress_bar()
    try:
        model = model_class.from_pretrained(checkpoint.path, dtype=dtype, local_files_only=True)
        loaded: nn.Module = model.eval().to(device)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{checkpoint.path}: cannot run on {device} ({reason}); check the model and --device"
        ) from error
    return loaded


def layers_of(model: nn.Module, checkpoint: Checkpoint) -> list[nn.Module]:
    """Return the model's blocks in order."""
    return list(model.get_submodule(checkpoint.architecture.layers).children())
