"""Element types of exported tensors: which PowerInfer runs, and how numbers become them.

Its sparse operators read FFN weights as F16 or Q4_0 whatever the header says (PowerInfer@d3ebd7c
ggml.c:ggml_compute_forward_mul_mat_axpy; ggml-cuda.cu asserts the same), so there is no third.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType, quants

from common.element_types import ELEMENT_TYPES
from common.errors import ExportError, FormatError
from gguf_export.pwri.schema import HEAD, parse_name
from gguf_files.elements import PLAIN
from gguf_files.names import PREDICTOR_TYPE_KEY, RECIPE_KEY, stays_float16
from gguf_files.reader import GGUFFile

OUTTYPES = {name: GGMLQuantizationType[name.upper()] for name in ELEMENT_TYPES}
"""What `--outtype` and `--predictor-type` may be."""

_OTHER_NAMES = ("F32", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_OTHERS = tuple(GGMLQuantizationType[name] for name in _OTHER_NAMES)
"""What matrices outside the sparse FFN may have besides: all other types that PowerInfer's ggml
multiplies with (ggml.c:type_traits), each of them run. It has no BF16 and none of the IQ types."""

WIDE = (GGMLQuantizationType.F32, GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0)
"""Types that are made of float32; the others of float16, in which PowerInfer computes."""

WRITABLE = {*PLAIN, *WIDE, *OUTTYPES.values()}
"""Types that numbers can be written in."""


@dataclass(frozen=True, kw_only=True)
class FileTypes:
    """Element types of a file.

    Attributes:
        weights: of the model's matrices, `f16` or `q4_0`.
        predictors: of the predictors' matrices, likewise.
        weights_chosen: whether the first was asked for; else what a GGUF model stores stays where
            PowerInfer runs it.
        predictors_chosen: the same of predictors in a file.
    """

    weights: str = "f16"
    predictors: str = "f16"
    weights_chosen: bool = True
    predictors_chosen: bool = True

    def __post_init__(self) -> None:
        """Refuse what PowerInfer's sparse operators do not read."""
        for option, value in (("outtype", self.weights), ("predictor-type", self.predictors)):
            if value not in OUTTYPES:
                raise ExportError(
                    f"--{option} {value}: PowerInfer's sparse operators read FFN weights as F16 or "
                    "Q4_0 whatever the file says and compute nonsense from others",
                    f"choose {' or '.join(OUTTYPES)}",
                )

    def of(self, name: str, shape: tuple[int, ...], head: str = HEAD) -> GGMLQuantizationType:
        """Return the type of a tensor.

        Args:
            name: its name in the file.
            shape: numpy order; vectors are F32.
            head: the matrix that makes logits, where it is another: OPT's is its embedding.
        """
        if len(shape) == 1:
            return GGMLQuantizationType.F32
        if parse_name(name).role == "predictor":
            return OUTTYPES[self.predictors]
        left = stays_float16(name, head)
        return GGMLQuantizationType.F16 if left else OUTTYPES[self.weights]


def runnable(name: str, shape: tuple[int, ...]) -> tuple[GGMLQuantizationType, ...]:
    """Return the types in which a tensor of the file may be stored."""
    if len(shape) == 1:
        return (GGMLQuantizationType.F32,)
    both = tuple(OUTTYPES.values())
    return both if parse_name(name).neurons else (*both, *_OTHERS)


def check_predictor_types(file: GGUFFile) -> str:
    """Return what types a file's predictors have, which must be those that they were exported in.

    PowerInfer's `quantize` rounds them with everything else, which those trained for float16 do not
    bear.

    Raises:
        FormatError: they were rounded.
    """
    found = {
        name: info.kind.name
        for name, info in file.tensors.items()
        if parse_name(name).role == "predictor" and len(info.shape) > 1
    }
    said = intended_type(file)
    each = "" if said is None else said.upper()
    for name, kind in found.items() if said is not None else ():
        if kind != _of_layer(each, parse_name(name).layer or 0):
            raise FormatError(
                f"{file.path}: tensor {name} is {kind}, the predictors were exported as {each}, "
                "and rounding spoils them",
                "run no quantize on the file, export it with --outtype q4_0 instead",
            )
    kinds = " and ".join(sorted(set(found.values()))) or "none"
    return f"{kinds}, as exported" if said is not None else f"{kinds}, the file says no other"


def _of_layer(said: str, layer: int) -> str | None:
    kinds = said.split(",")
    if len(kinds) == 1:
        return kinds[0]
    return kinds[layer] if layer < len(kinds) else None


def intended_type(file: GGUFFile) -> str | None:
    """Return the type that a file's predictors were exported in, such as `f16`; None if unknown.

    Where layers differ it is one for each, with commas. Files from before the key tell it where a
    recipe knows float16 only.
    """
    said = file.optional(PREDICTOR_TYPE_KEY, GGUFValueType.STRING, None)
    if said is not None:
        return str(said).lower()
    recipe = file.optional(RECIPE_KEY, GGUFValueType.STRING, "{}")
    return None if recipe_allows(recipe, "q4_0") else "f16"


def recipe_allows(recipe: str, kind: str) -> bool:
    """Whether predictors of a recipe (JSON; text of others allows all) may be rounded to a type.

    Those that start as a constant have units that differ from it by little.
    """
    try:
        settings = json.loads(recipe)
    except (ValueError, RecursionError):
        return True
    constant = isinstance(settings, dict) and settings.get("start") == "constant"
    return ELEMENT_TYPES[kind].fine or not constant


def encode(numbers: npt.NDArray[np.generic], kind: GGMLQuantizationType) -> npt.NDArray[np.generic]:
    """Return numbers as the file stores them.

    Args:
        numbers: float16 or float32, any shape; they fit float16 unless `kind` is F32, BF16 or Q8_0.
        kind: F32, F16, BF16, Q8_0 or Q4_0. Q4_0 is gguf's own quantiser, with the arithmetic of
            PowerInfer's `quantize` (ggml-quants.c:quantize_row_q4_0_reference); a compiler that
            fuses product and sum there moves about one number in 100,000 by a step.

    Returns:
        An array of that type, or bytes (..., row bytes) uint8 for others than F32 and F16.
    """
    if kind not in PLAIN:
        with np.errstate(over="ignore", invalid="ignore"):  # NaN stays what it is
            blocks: npt.NDArray[np.generic] = quants.quantize(np.ascontiguousarray(numbers), kind)
        return blocks
    return numbers.astype(PLAIN[kind], copy=False)
