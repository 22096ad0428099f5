"""Which activation a file's model has: what it says, what its program computes, what a user says.

A PowerInfer file (`PWRI`) means ReLU. A dense one of arch llama says nothing unless psp wrote it:
llama.cpp computes SiLU whatever the model was trained with.
"""

from __future__ import annotations

import math
from typing import Any

from architectures.config_json import ConfigError
from architectures.gguf_model.keys import Keys, shortest, text_of
from architectures.spec import SUBSTITUTABLE
from common.errors import CheckpointError
from gguf_files.names import ACTIVATION_KEY, ACTIVATION_THRESHOLD_KEY

_PLAIN = (*(name for name in SUBSTITUTABLE if name != "fatrelu"), "drelu")
"""What may be named after a file's name, and needs no threshold."""


def activation_of(
    keys: Keys,
    chosen: str | None,
    *,
    always: str | None = None,
    dense: str = "silu",
    sparse: tuple[str, ...] = ("relu", "fatrelu"),
) -> dict[str, Any]:
    """Return `hidden_act`, and `hidden_act_param` of FATReLU.

    Args:
        keys: of the file.
        chosen: what the user says, `fatrelu:T` with its threshold; None for nothing.
        always: the only activation that the architecture has.
        dense: what programs compute for a dense file.
        sparse: what a sparse file may have, the first if nothing more is known.

    Raises:
        CheckpointError: the user says something else than the file, or no activation.
    """
    wanted = None if chosen is None else _parse(keys, chosen)
    found, sure = _found(keys, always, dense, sparse)
    if wanted is None:
        return found
    possible = wanted == found if sure else not keys.file.sparse or wanted["hidden_act"] in sparse
    if not possible:
        problem = f"its model has {found['hidden_act']}, not {chosen}"
        raise keys.error(problem, f"leave ':{chosen}' out")
    return wanted


def _found(
    keys: Keys, always: str | None, dense: str, sparse: tuple[str, ...]
) -> tuple[dict[str, Any], bool]:
    """Return what the file tells, and whether that is beyond doubt."""
    said = keys.file.values.get(ACTIVATION_KEY)
    name = always or (sparse[0] if keys.file.sparse else dense)
    if said is None or always:
        return {"hidden_act": name}, always is not None
    name = text_of(said.data)
    if name != "fatrelu":
        return {"hidden_act": name}, True
    threshold = keys.file.values.get(ACTIVATION_THRESHOLD_KEY)
    if threshold is None:
        return {"hidden_act": name}, False
    number = threshold.data
    if not isinstance(number, float) or not 0 < number < math.inf:
        raise keys.error(f"key {ACTIVATION_THRESHOLD_KEY} is {number!r}, expected a number above 0")
    return {"hidden_act": name, "hidden_act_param": shortest(number)}, True


def _parse(keys: Keys, text: str) -> dict[str, Any]:
    name, colon, number = text.partition(":")
    if not colon and name in _PLAIN:
        return {"hidden_act": name}
    try:
        threshold = float(number)
    except ValueError:
        threshold = math.nan
    if name != "fatrelu" or not 0 < threshold < math.inf:
        problem = f"activation {text!r} after the file's name, expected relu, or fatrelu:0.01"
        others = ", ".join(other for other in _PLAIN if other != "relu")
        raise keys.error(problem, f"write one of these or {others}, or leave the colon out")
    return {"hidden_act": name, "hidden_act_param": threshold}


def other_activation(keys: Keys, chosen: str | None, error: ConfigError) -> CheckpointError:
    """Return a refusal of a model's activation that says where it comes from.

    Args:
        keys: of the file.
        chosen: what the user says; None for nothing.
        error: about `hidden_act`, or what it is called in the family.
    """
    expected, path = f"expected {error.expected}", keys.file.path
    if error.key == "hidden_act_param":
        remedy = f"name the threshold: --model {path}:fatrelu:0.01"
        return keys.error(f"key {ACTIVATION_THRESHOLD_KEY} is missing", remedy)
    if chosen is not None:
        remedy = "name relu if it was trained with that, else give it ReLU first (psp sparsify)"
        return keys.error(
            f"its activation, as ':{chosen}' says, is {error.found!r}, {expected}", remedy
        )
    if ACTIVATION_KEY in keys.file.values:
        problem = f"key {ACTIVATION_KEY} is {error.found!r}, {expected}"
        return keys.error(problem, "give the model ReLU first (psp sparsify)")
    problem = f"its activation is {error.found!r}, which programs compute where a file names none"
    remedy = f"if the model was trained with ReLU, say so: --model {path}:relu"
    return keys.error(f"{problem}, {expected}", remedy)
