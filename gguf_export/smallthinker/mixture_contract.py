"""The contract of a file of arch `smallthinker` with several experts as checks; see `contract`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from architectures.checkpoint import Checkpoint
from common.errors import CheckpointError, FormatError
from gguf_export.contract import OpenedFile, Report, check_container, check_finite, check_tensors
from gguf_export.smallthinker.hyperparameters import engine_of, is_transposed
from gguf_export.smallthinker.mixture import mixture_tensors
from gguf_export.smallthinker.second_engine import (
    check_neuron_types,
    check_profiler,
    size_problem,
)
from gguf_files.elements import readable
from gguf_files.names import PROFILER


@dataclass(frozen=True)
class MixtureFile(OpenedFile):
    """The parts of such a file, each read when first needed."""

    @property
    def engine(self) -> str:
        """Whose file it is."""
        return engine_of(self.file)

    @cached_property
    def model(self) -> Checkpoint:
        """The file as a model.

        Raises:
            FormatError: keys or tensors are missing or those of no such model.
        """
        try:
            return Checkpoint.open(self.path, experts=True)
        except CheckpointError as error:
            raise FormatError(error.problem, error.remedy) from error

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes that the keys imply."""
        tensors = mixture_tensors(self.model, transposed=is_transposed(self.file))
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        held = self.file.tensors
        return shapes | ({PROFILER: held[PROFILER].shape} if PROFILER in held else {})


def check_mixture_structure(
    report: Report, opened: MixtureFile, *, header_only: bool = False
) -> None:
    """Check what holds of a file alone.

    Args:
        report: takes the results.
        opened: the file.
        header_only: do not read the tensors' numbers.
    """
    check_container(report, opened)
    report.check("keys", lambda: _keys(opened), "file")
    check_tensors(report, opened, "the graph's")
    report.check("types", lambda: _types(opened), "file")
    report.check("engine", lambda: _engine(opened), "keys")
    if not header_only:
        check_finite(report, opened, "norms", "weights")


def _keys(opened: MixtureFile) -> str:
    model = opened.model.shape
    assert model.experts is not None
    assert model.attention is not None
    experts, window = model.experts, sum(model.attention.windowed)
    return (
        f"{model.n_layers} layers, d_model {model.d_model}, {experts.count} experts of "
        f"{model.d_ff} neurons, {experts.chosen} for a token weighed by {experts.gating}, "
        f"{sum(model.attention.rotary)} layers with positions, {window} with a window of "
        f"{model.attention.window}, context {model.context_length}"
    )


def _types(opened: MixtureFile) -> str:
    for name, info in opened.file.tensors.items():
        if not readable(info.kind):
            raise FormatError(
                f"{opened.path}: tensor {name} has type {info.kind.name}, which psp cannot read",
                "check another quantisation",
            )
    infos = opened.file.tensors.values()
    return f"matrices {', '.join(sorted({i.kind.name for i in infos if len(i.shape) > 1}))}"


def _engine(opened: MixtureFile) -> str:
    if is_transposed(opened.file):
        check_neuron_types(opened.file)
        problem = size_problem(opened.model.shape.d_model, opened.model.shape.d_ff)
        if problem is not None:
            raise opened.file.error(f"{problem}, in PowerInfer's second engine")
        check_profiler(opened.file, opened.model.shape.d_model, opened.model.shape.vocab_size)
        said = "PowerInfer's second engine: down matrices are transposed"
        return f"{said}, the head has a predictor" if PROFILER in opened.file.tensors else said
    if PROFILER in opened.file.tensors:
        raise opened.file.error(f"{PROFILER} is there, which llama.cpp does not know")
    return "llama.cpp's arch smallthinker: ReLU after the experts' gates"
