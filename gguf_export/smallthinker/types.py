"""Element types of such files: all that llama.cpp multiplies with, four of which are written."""

from __future__ import annotations

from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from architectures.spec import ModelShape
from common.element_types import DENSE_NAMES
from common.errors import ExportError
from gguf_export.pwri.schema import HEAD
from gguf_files.names import ROUTER

DENSE_TYPES = {name: GGMLQuantizationType[name.upper()] for name in DENSE_NAMES}
"""What `--dense-type` may be."""


@dataclass(frozen=True, kw_only=True)
class ExpertTypes:
    """Element types of a file.

    Attributes:
        weights: of its matrices, one of `DENSE_TYPES`.
        chosen: whether it was asked for; else what a GGUF model stores stays.
        pure: the head is rounded as all others; else it stays F16 beside Q4_0.
    """

    weights: str = "f16"
    chosen: bool = True
    pure: bool = False

    def of(self, name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
        """Return the type of a tensor.

        Args:
            name: its name in the file.
            shape: numpy order; vectors and routers are F32.
        """
        if len(shape) == 1 or f".{ROUTER}." in name:
            return GGMLQuantizationType.F32
        if name == HEAD and self.weights == "q4_0" and not self.pure:
            return GGMLQuantizationType.F16
        return DENSE_TYPES[self.weights]

    def keeps(self, kind: GGMLQuantizationType) -> bool:
        """Whether a matrix of a GGUF model stays in its type."""
        return not self.chosen or kind is DENSE_TYPES[self.weights]

    def check(self, shape: ModelShape) -> None:
        """Refuse sizes that do not go into blocks.

        Raises:
            ExportError: naming the size and the type.
        """
        block, _ = GGML_QUANT_SIZES[DENSE_TYPES[self.weights]]
        sizes = {
            "d_model": shape.d_model,
            "d_ff": shape.d_ff,
            "heads times head size": shape.n_heads * shape.head_dim,
        }
        for name, size in sizes.items():
            if size % block:
                raise ExportError(
                    f"{name} {size} is no multiple of {block}, as {self.weights} needs",
                    "choose f16 or bf16",
                )
