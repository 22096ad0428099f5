"""Dense layers of a file: those of which every neuron is computed, and the proof that it is.

The proof is in the numbers of a predictor. Its hidden units are never below 0, so with fc2 nowhere
below 0 neither are logits, whatever the input is: enough for a threshold of at most 0. For one
above 0 units have to come in pairs of opposite rows w and −w, of which fc2 takes at least some
`gain`: logits are then at least gain · Σ|w·x|, which no residual that occurs makes small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFValueType

from common.errors import EXPORT_AGAIN, FormatError
from gguf_export.pwri.schema import FC1, FC2, THRESHOLD_KEY
from gguf_files.names import DENSE_LAYERS_KEY
from gguf_files.reader import GGUFFile

_LEAST_REACH = 1e-4
"""Root mean square of the smallest residual that has to reach a threshold above 0. Rounding vectors
to float16 or 8 bits leaves nothing of some hundredth of it."""

_MEAN_SIZE = math.sqrt(2 / math.pi)
"""Of |w·x| relative to the norm of w times the root mean square of x, where these are unrelated."""


def joined(layers: Iterable[int]) -> str:
    """Return what a file says of its dense layers, such as `0,5`."""
    return ",".join(map(str, sorted(layers)))


def dense_layers(file: GGUFFile) -> tuple[int, ...]:
    """Return the layers that a file says are dense, ascending; none of files of others.

    Raises:
        FormatError: the key holds something else.
    """
    said = file.optional(DENSE_LAYERS_KEY, GGUFValueType.STRING, "")
    parts = said.split(",") if said else []
    if not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        raise file.error(f"{DENSE_LAYERS_KEY} is {said[:40]!r}, expected numbers with commas")
    return tuple(map(int, parts))


def check_dense_layers(file: GGUFFile) -> str:
    """Prove that every neuron of the dense layers is computed.

    Raises:
        FormatError: there is no such layer, or its predictor may skip a neuron.
    """
    layers = dense_layers(file)
    if not layers:
        return "none"
    threshold: float = file.optional(THRESHOLD_KEY, GGUFValueType.FLOAT32, 0.0)
    reach = max(_reach(file, layer, threshold) for layer in layers)
    named = f"every neuron of layer {', '.join(map(str, layers))} is computed"
    if threshold <= 0:
        return f"{named}: logits are never below 0, the threshold is {threshold:g}"
    return f"{named}: residuals of root mean square {reach:.1g} reach the threshold {threshold:g}"


def _reach(file: GGUFFile, layer: int, threshold: float) -> float:
    """Return the root mean square of residuals from which on logits reach the threshold."""
    fc1, fc2 = (_matrix(file, name.format(layer=layer)) for name in (FC1, FC2))
    if not fc2.min(initial=0.0) >= 0:
        raise _skips(file, layer)
    if threshold <= 0:
        return 0.0
    pairs = fc1[0::2], fc1[1::2]
    if len(fc1) % 2 or not np.array_equal(pairs[0], -pairs[1]):
        raise _skips(file, layer)
    reach = threshold / max(_gain(pairs[0], fc2), 1e-30)
    if not reach <= _LEAST_REACH:
        raise _skips(file, layer)
    return reach


def _gain(rows: npt.NDArray[Any], fc2: npt.NDArray[Any]) -> float:
    """Return the least logit of a residual of root mean square 1 that is like any other.

    Args:
        rows: (pairs, d_model), one of each pair.
        fc2: (d_ff, 2 · pairs), none below 0.
    """
    least = np.minimum(fc2[:, 0::2], fc2[:, 1::2]).min(axis=0)
    return float(_MEAN_SIZE * (least * np.linalg.norm(rows, axis=1)).sum())


def _matrix(file: GGUFFile, name: str) -> npt.NDArray[Any]:
    if name not in file.tensors or len(file.tensors[name].shape) != 2:
        raise file.error(f"tensor {name} is missing or no matrix")
    found: npt.NDArray[Any] = np.asarray(file.tensor(name), dtype=np.float32)
    return found


def _skips(file: GGUFFile, layer: int) -> FormatError:
    return FormatError(
        f"{file.path}: layer {layer} is said to be dense, but its predictor may skip neurons",
        EXPORT_AGAIN,
    )


def said_of(layers: Sequence[int]) -> str:
    """Return what tables say of dense layers; empty if there are none."""
    return f"; computed whole: {', '.join(map(str, layers))}" if layers else ""
