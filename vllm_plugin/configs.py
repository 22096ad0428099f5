"""Config classes for the published `model_type`s that neither transformers nor vLLM knows.

So no code of a checkpoint is needed to read its config. Defaults are those of the publishers'
configuration files.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, LlamaConfig, MistralConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


class SparseLlamaConfig(LlamaConfig):  # type: ignore[misc]  # transformers is untyped here
    """ProSparse LLaMA."""

    model_type = "sparsellama"


class MiniCPMConfig(LlamaConfig):  # type: ignore[misc]
    """MiniCPM, whose embeddings are tied unless its config says otherwise."""

    model_type = "minicpm"

    def __init__(self, **kwargs: Any) -> None:
        """Take a config.json's values."""
        constants = {"scale_emb": 1, "dim_model_base": 1, "scale_depth": 1}
        super().__init__(**{"tie_word_embeddings": True, **constants, **kwargs})


class BambooConfig(MistralConfig):  # type: ignore[misc]
    """Bamboo and TurboSparse-Mistral."""

    model_type = "bamboo"


_CONFIGS = {
    "SparseLlamaForCausalLM": SparseLlamaConfig,
    "MiniCPMForCausalLM": MiniCPMConfig,
    "BambooForCausalLM": BambooConfig,
}


def register_configs() -> None:
    """Make transformers' AutoConfig know them, where it does not yet."""
    for kind in _CONFIGS.values():
        if kind.model_type not in CONFIG_MAPPING:
            AutoConfig.register(kind.model_type, kind)


def name_types(types: dict[str, str]) -> None:
    """Add the types of these classes to vLLM's table for configs that have no `model_type`.

    MiniCPM's published config.json is such a one.

    Args:
        types: `model_type` by class.
    """
    for name, kind in _CONFIGS.items():
        types.setdefault(name, kind.model_type)
