"""Which families there are, and which one a config belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from architectures.bamboo import BAMBOO
from architectures.config import refuse
from architectures.falcon import FALCON_7B, FALCON_40B
from architectures.llama import LLAMA
from architectures.minicpm import MINICPM
from architectures.opt import OPT
from architectures.prosparse import PROSPARSE
from architectures.spec import Architecture
from common.errors import CheckpointError

ARCHITECTURES: tuple[Architecture, ...] = (
    LLAMA,
    PROSPARSE,
    MINICPM,
    BAMBOO,
    OPT,
    FALCON_7B,
    FALCON_40B,
)


def resolve(config: Mapping[str, Any]) -> Architecture:
    """Return the family of a config.json.

    Raises:
        CheckpointError: no family claims the config's class; the line lists what is supported.
    """
    declared = config.get("architectures")
    classes = declared if isinstance(declared, list) else []
    if config.get("quantization_config") is not None:
        refuse(
            "quantization_config",
            config["quantization_config"],
            "none",
            "pass the float16, bfloat16 or float32 original",
        )
    for architecture in ARCHITECTURES:
        known = any(name in architecture.hf_classes for name in classes)
        if known and architecture.claims(config):
            return architecture
    supported = {name: None for family in ARCHITECTURES for name in family.hf_classes}
    raise CheckpointError(
        f"config.json: architectures is {declared!r}, which psp does not support",
        f"supported: {', '.join(supported)}",
    )
