"""PowerInfer's activation statistics: `activation/activation_N.pt` beside a model file."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from architectures.tensor_files import is_plain, read_torch_file
from common.errors import FormatError, PredictorError
from common.files import refuse_pointer, write_bytes, write_error
from gguf_export.pwri.hyperparameters import read_hyperparameters
from gguf_files.reader import GGUFFile

ACTIVATION_DIRECTORY = "activation"
"""PowerInfer looks for its statistics under this name beside the model file."""


def statistics_file(directory: Path, layer: int) -> Path:
    """Return the file of a layer in such a directory."""
    return directory / f"activation_{layer}.pt"


def read_saved(file: Path) -> Any:
    """Read a `.pt` file as PowerInfer's own tools write and read it.

    Raises:
        PredictorError: damaged, a Git LFS pointer, or it holds more than tensors.
    """
    refuse_pointer(file, PredictorError)
    try:
        return read_torch_file(file)
    except ValueError as error:
        raise PredictorError(f"{file}: {error}", "fetch the predictors again") from error


def write_saved(file: Path, content: object) -> None:
    """Write a `.pt` file as PowerInfer's own tools write and read it.

    Raises:
        OutputError: it cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(file, buffer.getvalue())


def write_statistics(directory: Path, counts: Iterable[torch.Tensor]) -> None:
    """Write `activation/activation_N.pt` in a directory, from each layer's (d_ff,) int64 counts.

    Raises:
        OutputError: they cannot be written.
    """
    try:
        (directory / ACTIVATION_DIRECTORY).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(directory / ACTIVATION_DIRECTORY, error) from error
    for layer, found in enumerate(counts):
        write_saved(statistics_file(directory / ACTIVATION_DIRECTORY, layer), found)


def has_statistics(directory: Path, n_layers: int) -> bool:
    """Whether every layer has its file in `directory`'s `activation/`."""
    files = (statistics_file(directory / ACTIVATION_DIRECTORY, n) for n in range(n_layers))
    return all(file.is_file() for file in files)


def layer_statistics(directory: Path, layer: int) -> torch.Tensor:
    """Read the counts of a layer, (d_ff,) int64.

    Raises:
        PredictorError: missing, damaged, or no counts.
    """
    file = statistics_file(directory / ACTIVATION_DIRECTORY, layer)
    counts = read_saved(file)
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
            f"{directory / ACTIVATION_DIRECTORY}: holds no statistics of {n_layers} layers",
            "export with predictors from psp train-predictor",
        )
    counts = [layer_statistics(directory, layer) for layer in range(n_layers)]
    for layer, found in enumerate(counts):
        if len(found) != d_ff:
            file = statistics_file(directory / ACTIVATION_DIRECTORY, layer)
            raise PredictorError(
                f"{file}: {len(found)} counts, the model has {d_ff} neurons", "export again"
            )
    return counts


def may_have_statistics(model_file: Path) -> bool:
    """Whether the statistics that lie beside a model file may be its own.

    Nothing says whose they are, so everything that can tell does: they are not those of a file made
    without predictors, and belong to no model of other sizes. A file that cannot be read may have
    any.
    """
    directory = model_file.parent
    if not (directory / ACTIVATION_DIRECTORY).is_dir():
        return False
    try:
        hyper = read_hyperparameters(GGUFFile(model_file))
    except FormatError:
        return True
    try:
        read_statistics(directory, hyper.n_layers, hyper.d_ff)
    except PredictorError:
        return False
    more = statistics_file(directory / ACTIVATION_DIRECTORY, hyper.n_layers)
    return hyper.skips_neurons and not more.exists()
