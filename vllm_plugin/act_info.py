"""`ACT_INFO`: the environment variable by which the model card's llama.py knows the activation.

Source: the card of openbmb/MiniCPM-S-1B-sft, "Inference with vLLM": `relu` or `fatrelu_0.01`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from common.errors import SettingsError

VARIABLE = "ACT_INFO"


def read_act_info(environment: Mapping[str, str]) -> tuple[str, float] | None:
    """Return activation (`relu`, `fatrelu`) and threshold; None if the variable says nothing.

    Raises:
        SettingsError: it is neither `relu` nor `fatrelu_T` with T above 0.
    """
    text = environment.get(VARIABLE, "").strip()
    if not text:
        return None
    name, _, number = text.lower().partition("_")
    if name == "relu" and not number and "_" not in text:
        return "relu", 0.0
    try:
        threshold = float(number)
    except ValueError:
        threshold = math.nan
    if name != "fatrelu" or not 0 < threshold < math.inf:
        raise SettingsError(
            f"{VARIABLE} is {text!r}, expected relu or fatrelu_T with T above 0",
            f"set {VARIABLE}=relu or {VARIABLE}=fatrelu_0.01, or unset it to follow config.json",
        )
    return "fatrelu", threshold
