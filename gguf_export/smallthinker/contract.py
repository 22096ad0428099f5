"""The contract of a file of arch `smallthinker` with one expert as checks; see `contract`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from common.errors import FormatError
from gguf_export.contract import (
    OpenedFile,
    Report,
    check_container,
    check_finite,
    check_tensors,
    sizes_line,
)
from gguf_export.pwri.hyperparameters import Hyperparameters
from gguf_export.pwri.schema import HEAD
from gguf_export.smallthinker.hyperparameters import (
    engine_of,
    expert_shapes,
    is_expert_file,
    is_mixture_file,
    is_transposed,
    read_expert_hyperparameters,
)
from gguf_export.smallthinker.mixture_contract import MixtureFile
from gguf_export.smallthinker.second_engine import check_neuron_types, check_profiler, size_problem
from gguf_files.elements import readable
from gguf_files.names import PROFILER
from gguf_files.reader import GGUFFile

RUNNABLE = ("keys", "tokenizer", "tensor set", "shapes", "types")
"""What must hold before its graph can be computed."""


@dataclass(frozen=True)
class ExpertFile(OpenedFile):
    """The parts of such a file, each read when first needed; each raises `FormatError`."""

    @property
    def engine(self) -> str:
        """Whose file it is."""
        return engine_of(self.file)

    @cached_property
    def hyper(self) -> Hyperparameters:
        """Its sizes and constants."""
        return read_expert_hyperparameters(self.file)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes that the keys imply.

        A head that is the embedding may be left out, and so may the dimension of the one expert,
        which llama.cpp's and PowerInfer's `llama-quantize` drop.
        """
        rows = len(self.vocabulary.tokens)
        shapes = expert_shapes(self.hyper, rows, transposed=is_transposed(self.file))
        if HEAD not in self.file.tensors:
            del shapes[HEAD]
        held = {name: info.shape for name, info in self.file.tensors.items()}
        if PROFILER in held:
            shapes[PROFILER] = held[PROFILER]
        return {
            name: shape[1:] if shape[0] == 1 and held.get(name) == shape[1:] else shape
            for name, shape in shapes.items()
        }


def open_model_file(path: Path) -> OpenedFile:
    """Return a file by what its header says it is.

    Raises:
        FormatError: no such file.
    """
    file = GGUFFile(path)
    if is_mixture_file(file):
        return MixtureFile(path)
    return ExpertFile(path) if is_expert_file(file) else OpenedFile(path)


def check_expert_structure(
    report: Report, opened: ExpertFile, *, header_only: bool = False
) -> None:
    """Check what holds of a file alone.

    Args:
        report: takes the results.
        opened: the file.
        header_only: do not read the tensors' numbers.
    """
    check_container(report, opened)
    report.check("keys", lambda: sizes_line(opened), "file")
    check_tensors(report, opened, "the graph's")
    report.check("types", lambda: _types(opened.file), "file")
    report.check("engine", lambda: _engine(opened), "keys")
    if not header_only:
        check_finite(report, opened, "norms", "weights")


def _types(file: GGUFFile) -> str:
    for name, info in file.tensors.items():
        if not readable(info.kind):
            raise FormatError(
                f"{file.path}: tensor {name} has type {info.kind.name}, which psp cannot read",
                "check another quantisation",
            )
    kinds = sorted({info.kind.name for info in file.tensors.values() if len(info.shape) > 1})
    return f"matrices {', '.join(kinds)}"


def _engine(opened: ExpertFile) -> str:
    if is_transposed(opened.file):
        check_neuron_types(opened.file)
        check_profiler(opened.file, opened.hyper.d_model, len(opened.vocabulary.tokens))
        problem = size_problem(opened.hyper.d_model, opened.hyper.d_ff)
        if problem is not None:
            raise opened.file.error(f"{problem}, in PowerInfer's second engine")
        said = "PowerInfer's second engine: down matrices are transposed"
        return f"{said}, the head has a predictor" if PROFILER in opened.file.tensors else said
    if PROFILER in opened.file.tensors:
        raise opened.file.error(f"{PROFILER} is there, which llama.cpp does not know")
    return "llama.cpp's arch smallthinker: one expert, ReLU after its gate"
