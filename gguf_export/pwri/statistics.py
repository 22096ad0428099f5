"""PowerInfer's activation statistics: `activation/activation_N.pt` beside a model file."""

from __future__ import annotations

from pathlib import Path

import torch

from common.errors import PredictorError
from gguf_export.tensor_file import is_plain, read_tensor_file


def _statistics(directory: Path, layer: int) -> Path:
    return directory / "activation" / f"activation_{layer}.pt"


def has_statistics(directory: Path, n_layers: int) -> bool:
    """Whether every layer has its file in `directory`'s `activation/`."""
    return all(_statistics(directory, layer).is_file() for layer in range(n_layers))


def layer_statistics(directory: Path, layer: int) -> torch.Tensor:
    """Read the counts of a layer, (d_ff,) int64.

    Raises:
        PredictorError: missing, damaged, or no counts.
    """
    file = _statistics(directory, layer)
    counts = read_tensor_file(file)
    if not (
        is_plain(counts) and counts.dim() == 1 and bool(((counts >= 0) & (counts < 2**62)).all())
    ):
        raise PredictorError(f"{file}: expected a vector of counts", "fetch it again or remove it")
    return counts.long()


def read_statistics(directory: Path, n_layers: int, d_ff: int) -> list[torch.Tensor]:
    """Read `activation/activation_N.pt` of every layer, (d_ff,) int64 each.

    Raises:
        PredictorError: missing, damaged or of another size.
    """
    if not has_statistics(directory, n_layers):
        raise PredictorError(
            f"{directory}/activation: holds no statistics of {n_layers} layers",
            "export with predictors from psp train-predictor",
        )
    counts = [layer_statistics(directory, layer) for layer in range(n_layers)]
    for layer, found in enumerate(counts):
        if len(found) != d_ff:
            file = _statistics(directory, layer)
            raise PredictorError(
                f"{file}: {len(found)} counts, the model has {d_ff} neurons", "export again"
            )
    return counts
