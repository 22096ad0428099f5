"""Settings of `psp export-gguf` and `psp gpu-split`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from common.element_types import ELEMENT_NAMES
from common.errors import ExportError
from common.settings import Force, ModelFile, ModelName, Option, check_settings
from common.units import MIB, parse_size

if TYPE_CHECKING:
    from gguf_export.pwri.element_types import FileTypes

SUFFIX = ".powerinfer.gguf"

_DEFAULT = "f16"
_TYPES = f"[{'|'.join(ELEMENT_NAMES)}]"
_BUDGET = Option("VRAM for PowerInfer, such as 24GiB: write which neurons live there.", "SIZE")
Context = Annotated[
    int, Option("Context that PowerInfer will be run with (-c), tokens.", names=("--ctx",), least=1)
]
KvType = Annotated[
    str,
    Option(
        "Type of the KV cache in that run; f32 is PowerInfer's --memory-f32.",
        choices=("f16", "f32"),
    ),
]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of an export.

    Attributes:
        predictors: see `predictor_kinds.open_predictors`.
        vram_budget: with one a GPU split will follow, which needs activation statistics; so do
            `context` and `kv_type`.
    """

    model: ModelName
    predictors: Annotated[
        Path,
        Option(
            "From psp train-predictor; or PowerInfer's model_N.pt; or a GGUF file that has some; "
            "or none, which computes every neuron.",
            "PREDICTORS|none",
        ),
    ]
    out: Annotated[
        Path,
        Option("Model file; the rest of the bundle is written beside it.", "NAME.powerinfer.gguf"),
    ]
    outtype: Annotated[
        str | None,
        Option(
            "Element type of the matrices of the model.",
            _TYPES,
            unset="f16; a GGUF model keeps what PowerInfer runs",
        ),
    ] = None
    predictor_type: Annotated[
        str | None,
        Option(
            "Element type of the matrices of predictors.",
            _TYPES,
            unset="f16; those in a GGUF file keep theirs",
        ),
    ] = None
    dense: Annotated[
        bool,
        Option("Also write NAME.dense.gguf, to time against; for arch llama its text is wrong."),
    ] = False
    vram_budget: Annotated[str | None, _BUDGET] = None
    context: Context = 512
    kv_type: KvType = "f16"
    force: Force = False

    def __post_init__(self) -> None:
        """Refuse element types that do not run, and names that make no other names."""
        check_settings(self, ExportError)
        if not self.out.name.endswith(SUFFIX) or self.out.name == SUFFIX:
            raise ExportError(f"--out {self.out}: expected a name that ends in {SUFFIX}")
        _ = self.types, self.split  # refuse others

    @property
    def types(self) -> FileTypes:
        """Element types of the files."""
        from gguf_export.pwri.element_types import FileTypes

        return FileTypes(
            weights=_DEFAULT if self.outtype is None else self.outtype,
            predictors=_DEFAULT if self.predictor_type is None else self.predictor_type,
            weights_chosen=self.outtype is not None,
            predictors_chosen=self.predictor_type is not None,
        )

    @property
    def split(self) -> SplitConfig | None:
        """Settings of the GPU split that follows; None if none does."""
        if self.vram_budget is None:
            return None
        return SplitConfig(
            file=self.out,
            vram_budget=self.vram_budget,
            context=self.context,
            kv_type=self.kv_type,
        )


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Settings of a split.

    Attributes:
        file: `NAME.powerinfer.gguf`, with `activation/` beside it.
        statistics: directory whose `activation/` counts instead.
        least_budget: bytes; less is taken for a budget without its unit.
    """

    file: ModelFile
    vram_budget: Annotated[str, _BUDGET]
    context: Context = 512
    kv_type: KvType = "f16"
    statistics: Annotated[
        Path | None,
        Option(
            "Take activation/ from here, such as a server's counts of its own traffic.",
            "DIR",
            unset="the file's directory",
        ),
    ] = None
    force: Force = False
    least_budget: int = MIB

    def __post_init__(self) -> None:
        """Refuse a budget that lacks its unit."""
        check_settings(self, ExportError)
        if parse_size(self.vram_budget) < self.least_budget:
            raise ExportError(
                f"--vram-budget {self.vram_budget} is less than 1 MiB", "add a unit, such as 24GiB"
            )
