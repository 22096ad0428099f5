"""The model for PowerInfer's second engine: checked before anything runs, and what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.errors import FormatError
from gguf_export.contract import Report
from gguf_export.smallthinker.contract import ExpertFile, check_expert_structure, open_model_file
from gguf_export.smallthinker.hyperparameters import is_transposed
from gguf_files.reader import GGUFFile
from results.parts import Metrics

_EXPORT = "export it with psp export-gguf --engine smallthinker"


def open_second_file(path: Path) -> GGUFFile:
    """Open the model for the second engine.

    Args:
        path: of arch `smallthinker`, down matrices transposed.

    Raises:
        FormatError: it is a file of another engine, or damaged.
    """
    opened = open_model_file(path)
    if not isinstance(opened, ExpertFile):
        kind = "for PowerInfer's first engine" if opened.file.sparse else "of another arch"
        raise FormatError(f"{path}: is {kind}, not for its second engine", _EXPORT)
    if not is_transposed(opened.file):
        raise FormatError(
            f"{path}: is for llama.cpp, and its down matrices are not transposed: PowerInfer's "
            "second engine would compute every neuron",
            _EXPORT,
        )
    report = Report(path)
    check_expert_structure(report, opened, header_only=True)
    broken = (found for found in report.checks.values() if not found.ok)
    for outcome in broken:
        raise FormatError(f"{path}: {outcome.line}", _EXPORT)
    return opened.file


def exact_bytes_ratio(layers: Sequence[Metrics]) -> float:
    """Return the FFN bytes that a token reads over all of them where sparsity is exact.

    The engine reads every row of the gate, and of up and down those of neurons that are active.
    """
    shares = [(1 + 2 * (1 - layer.activation_sparsity)) / 3 for layer in layers]
    return sum(shares) / len(shares)
