"""Which families there are, and which one a config belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from architectures.llama import LLAMA
from architectures.spec import Architecture
from common.errors import CheckpointError

ARCHITECTURES: tuple[Architecture, ...] = (LLAMA,)


def resolve(config: Mapping[str, Any]) -> Architecture:
    """Return the family of a config.json.

    Raises:
        CheckpointError: no family claims the config's class; the line lists what is supported.
    """
    declared = config.get("architectures")
    classes = declared if isinstance(declared, list) else []
    for architecture in ARCHITECTURES:
        if any(name in architecture.hf_classes for name in classes):
            return architecture
    supported = ", ".join(name for family in ARCHITECTURES for name in family.hf_classes)
    raise CheckpointError(
        f"config.json: architectures is {declared!r}, which psp does not support; "
        f"supported: {supported}"
    )
