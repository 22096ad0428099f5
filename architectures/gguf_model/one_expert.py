"""What a file of arch `smallthinker` with one expert must hold to be a ReLU-gated LLaMA.

Source: llama.cpp@0c1e570 src/models/smallthinker.cpp.
"""

from __future__ import annotations

import numpy as np
from gguf import ExpertGatingFuncType, GGUFValueType

from gguf_files.elements import readable
from gguf_files.names import ACTIVATION_KEY, ROUTER, SMALLTHINKER
from gguf_files.reader import GGUFFile

_ONE = ("expert_count", "expert_used_count")
_WINDOW_KEY = f"{SMALLTHINKER}.attention.sliding_window"
_GATING_KEY = f"{SMALLTHINKER}.expert_gating_func"
_GATINGS = (int(ExpertGatingFuncType.SOFTMAX), int(ExpertGatingFuncType.SIGMOID))
"""Of either the one weight is 1; llama.cpp stops at others, and at a file that names none."""

_ACTIVATIONS = ("relu", "fatrelu")
"""The graph computes ReLU; of a FATReLU model that is its unshifted form."""


def check_one_expert_keys(file: GGUFFile) -> None:
    """Do nothing if a file's keys make its one expert an FFN with ReLU.

    Raises:
        FormatError: another number of experts, a window, a gating that programs stop at, or a
            model of another activation.
    """
    for name in _ONE:
        count = file.value(f"{SMALLTHINKER}.{name}", GGUFValueType.UINT32)
        if count != 1:
            raise file.error(f"{SMALLTHINKER}.{name} is {count}, expected 1")
    if file.optional(_WINDOW_KEY, GGUFValueType.UINT32, 0):
        raise file.error(
            f"{_WINDOW_KEY} is there, with which llama.cpp takes the positions of some layers away"
        )
    gating = file.value(_GATING_KEY, GGUFValueType.UINT32)
    if gating not in _GATINGS:
        expected = " or ".join(map(str, _GATINGS))
        raise file.error(f"{_GATING_KEY} is {gating}, expected {expected}")
    activation = file.optional(ACTIVATION_KEY, GGUFValueType.STRING, _ACTIVATIONS[0])
    if activation not in _ACTIVATIONS:
        raise file.error(f"{ACTIVATION_KEY} is {activation!r}, and its graph computes ReLU")


def check_routers(file: GGUFFile, n_layers: int, d_model: int) -> None:
    """Do nothing if every layer's router makes the weight of its one expert 1.

    Args:
        file: of one expert.
        n_layers: of the model.
        d_model: columns of a router, whose one row may be stored as a vector.

    Raises:
        FormatError: one that is missing, of another shape, of a type that psp cannot read, or with
            a number that is not finite, of which programs make weights that are none.
    """
    for name in (f"blk.{layer}.{ROUTER}.weight" for layer in range(n_layers)):
        info = file.tensors.get(name)
        if info is None:
            raise file.error(f"tensor {name} is missing")
        if info.shape not in ((1, d_model), (d_model,)):
            raise file.error(f"tensor {name} has shape {info.shape}, expected (1, {d_model})")
        if not readable(info.kind):
            raise file.error(f"tensor {name} has type {info.kind.name}, which psp cannot read")
        if not np.isfinite(file.tensor(name)).all():
            raise file.error(f"tensor {name} holds NaN or infinity")
