"""Which families there are, and which one a config belongs to.

A new family whose graph is LLaMA's is an entry of `architectures.gated.GATED`. One of another
graph is a file of its own, with an `architectures.spec.Architecture`, and a name in the list below.
"""

from __future__ import annotations

from architectures.config_json import Config, refuse
from architectures.falcon import FALCON
from architectures.gated import GATED
from architectures.opt import OPT
from architectures.spec import Architecture
from common.errors import CheckpointError

ARCHITECTURES: tuple[Architecture, ...] = (*GATED, OPT, *FALCON)


def resolve(config: Config) -> Architecture:
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
