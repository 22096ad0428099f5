"""Settings of `psp export-gguf` and `psp gpu-split`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from common.element_types import DENSE_NAMES, ELEMENT_NAMES
from common.errors import ExportError
from common.settings import Force, ModelFile, ModelName, Option, check_settings
from common.units import MIB, parse_size
from gguf_files.names import SMALLTHINKER

if TYPE_CHECKING:
    from gguf_export.pwri.element_types import FileTypes
    from gguf_export.smallthinker.types import ExpertTypes

SUFFIX, SECOND_SUFFIX, PLAIN_SUFFIX = ".powerinfer.gguf", ".smallthinker.gguf", ".gguf"

POWERINFER, SECOND_ENGINE, LLAMA_CPP = "powerinfer", "smallthinker", "llama.cpp"
"""What `--engine` may be; the second is PowerInfer's other engine, in its folder smallthinker/."""

_SUFFIXES = {POWERINFER: SUFFIX, SECOND_ENGINE: SECOND_SUFFIX, LLAMA_CPP: PLAIN_SUFFIX}

AUTO = "auto"

_DEFAULT, _NEURONS = "f16", "q4_0"
_TYPES = f"[{'|'.join(ELEMENT_NAMES)}]"
_BUDGET = Option("VRAM for PowerInfer, such as 24GiB: write which neurons live there.", "SIZE")
_CONTEXT = Option(
    "Context that PowerInfer will be run with (-c), tokens.", names=("--ctx",), least=1
)
_KV_TYPE = Option(
    "Type of the KV cache in that run; f32 is PowerInfer's --memory-f32.", choices=("f16", "f32")
)
_TOKENS, _KV = 512, "f16"
"""What that run has if nothing else is said."""


def _expert_types(name: str | None, option: str) -> ExpertTypes:
    from gguf_export.smallthinker.types import ExpertTypes

    if name is not None and name not in DENSE_NAMES:
        raise ExportError(f"--{option} {name}: unknown", f"choose of {', '.join(DENSE_NAMES)}")
    return ExpertTypes(weights=_DEFAULT if name is None else name, chosen=name is not None)


def _second_engine_types(name: str | None) -> ExpertTypes:
    from gguf_export.smallthinker.types import ExpertTypes

    if name not in (None, _NEURONS):
        raise ExportError(
            f"--outtype {name}: PowerInfer's second engine computes neurons in Q4_0 alone and "
            "stops with an assertion at others",
            f"leave it out or choose {_NEURONS}",
        )
    return ExpertTypes(weights=_NEURONS, pure=True)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of an export.

    Attributes:
        predictors: see `predictor_kinds.open_predictors`; None of an engine that takes none.
        vram_budget: with one a GPU split will follow, which needs activation statistics; so do
            `context` and `kv_type`.
    """

    model: ModelName
    out: Annotated[
        Path,
        Option("Model file; the rest of the bundle is written beside it.", "NAME.powerinfer.gguf"),
    ]
    engine: Annotated[
        str,
        Option(
            "What will run it; smallthinker is PowerInfer's second engine. That one and llama.cpp "
            "(and what is built on it) take no predictors.",
            choices=(POWERINFER, SECOND_ENGINE, LLAMA_CPP),
        ),
    ] = POWERINFER
    predictors: Annotated[
        Path | None,
        Option(
            "From psp train-predictor; or PowerInfer's model_N.pt; or a GGUF file that has some; "
            "or none, which computes every neuron.",
            "PREDICTORS|none",
        ),
    ] = None
    outtype: Annotated[
        str | None,
        Option(
            "Element type of the matrices of the model; for llama.cpp also bf16 and q8_0, for "
            "smallthinker q4_0 alone.",
            _TYPES,
            unset="what predictors were trained for; else f16, a GGUF model keeps what the engine "
            "runs; smallthinker: q4_0",
        ),
    ] = None
    predictor_type: Annotated[
        str | None,
        Option(
            "Element type of the matrices of predictors.",
            _TYPES,
            unset="as trained; those in a GGUF file keep theirs, others become f16",
        ),
    ] = None
    head_predictor: Annotated[
        Path | None,
        Option(
            "From psp train-predictor --head; for --engine smallthinker, which then reads those "
            "rows of the output head that a token needs.",
            "HEAD",
        ),
    ] = None
    dense: Annotated[
        bool, Option("Also write NAME.dense.gguf, which llama.cpp runs with the right text.")
    ] = False
    dense_arch: Annotated[
        str,
        Option(
            "Graph of the dense file: llama is what PowerInfer's dense mode can time, with "
            "wrong text.",
            choices=(AUTO, SMALLTHINKER, "llama"),
        ),
    ] = AUTO
    dense_type: Annotated[
        str | None,
        Option(
            "Element type of the dense file's matrices.",
            choices=DENSE_NAMES,
            unset="--outtype",
        ),
    ] = None
    vram_budget: Annotated[str | None, _BUDGET] = None
    context: Annotated[int | None, replace(_CONTEXT, unset=f"{_TOKENS}")] = None
    kv_type: Annotated[str | None, replace(_KV_TYPE, unset=_KV)] = None
    force: Force = False

    def __post_init__(self) -> None:
        """Refuse element types that do not run, and names that make no other names."""
        check_settings(self, ExportError)
        suffix = _SUFFIXES[self.engine]
        if not self.out.name.endswith(suffix) or self.out.name == suffix:
            raise ExportError(f"--out {self.out}: expected a name that ends in {suffix}")
        for option, given in () if self.engine == POWERINFER else self._for_powerinfer():
            if given:
                raise ExportError(
                    f"{option} is for PowerInfer's first engine, not for --engine {self.engine}",
                    f"leave --engine or {option} out",
                )
        if self.head_predictor is not None and self.engine != SECOND_ENGINE:
            raise ExportError(
                "--head-predictor is for PowerInfer's second engine",
                f"pass --engine {SECOND_ENGINE} or leave it out",
            )
        if self.engine != POWERINFER and self.dense_type is not None:
            raise ExportError(
                f"--dense-type {self.dense_type} is for the file that --dense writes beside "
                f"PowerInfer's, not for --engine {self.engine}",
                f"pass --outtype {self.dense_type}",
            )
        if not self.dense and (self.dense_arch != AUTO or self.dense_type is not None):
            raise ExportError("--dense-arch and --dense-type are for --dense", "pass --dense")
        _ = (self.types if self.engine == POWERINFER else self.plain_types), self.split

    def _for_powerinfer(self) -> Iterator[tuple[str, bool]]:
        """Yield options that make no sense of a single file, and whether they are given."""
        yield "--predictors", self.predictors is not None
        yield "--predictor-type", self.predictor_type is not None
        yield "--dense", self.dense
        yield "--dense-arch", self.dense_arch != AUTO
        yield "--vram-budget", self.vram_budget is not None
        yield "--ctx", self.context is not None
        yield "--kv-type", self.kv_type is not None
        sparse = self.out.name.endswith(SUFFIX)
        yield f"the name *{SUFFIX}", sparse

    @property
    def plain_types(self) -> ExpertTypes:
        """Element types of a file that is all of an export."""
        if self.engine == SECOND_ENGINE:
            return _second_engine_types(self.outtype)
        return _expert_types(self.outtype, "outtype")

    @property
    def dense_types(self) -> ExpertTypes:
        """Element types of the dense file, where its arch has experts."""
        given = self.outtype if self.dense_type is None else self.dense_type
        return _expert_types(given, "dense-type")

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
            context=_TOKENS if self.context is None else self.context,
            kv_type=_KV if self.kv_type is None else self.kv_type,
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
    context: Annotated[int, _CONTEXT] = _TOKENS
    kv_type: Annotated[str, _KV_TYPE] = _KV
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
