"""Which families there are, and which one a config belongs to.

A new family whose graph is LLaMA's is an entry of `architectures.gated.GATED`. One of another
graph is a file of its own, with an `architectures.spec.Architecture`, and a name in the list below.
"""

from __future__ import annotations

from architectures.config_json import Config, refuse
from architectures.directory import ORIGINAL
from architectures.falcon import FALCON
from architectures.gated import GATED
from architectures.opt import OPT
from architectures.smallthinker import SMALLTHINKER
from architectures.spec import Architecture
from common.errors import CheckpointError

ARCHITECTURES: tuple[Architecture, ...] = (*GATED, OPT, *FALCON)

MIXTURES: tuple[Architecture, ...] = (SMALLTHINKER,)
"""Mixtures of experts: only what asks for them gets them, as nothing is predicted for them."""

_MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "sparsellama": "SparseLlamaForCausalLM",
    "minicpm": "MiniCPMForCausalLM",
    "bamboo": "BambooForCausalLM",
    "opt": "OPTForCausalLM",
    "falcon": "FalconForCausalLM",
    "smallthinker": "SmallThinkerForCausalLM",
}
"""Class of a `model_type`: transformers' AutoModelForCausalLM, or the model's own code."""


def with_class(config: Config) -> Config:
    """Return a config that names its class, where `model_type` alone tells it.

    So it does where `architectures` is absent or empty, or holds the model without its head
    (`LlamaModel`): transformers goes by `model_type` too.
    """
    declared, kind = config.get("architectures"), config.get("model_type")
    name = _MODEL_TYPES.get(kind) if isinstance(kind, str) else None
    if name is None or declared not in (None, [], [name.replace("ForCausalLM", "Model")]):
        return config
    return {**config, "architectures": [name]}


def model_type_of(config: Config) -> str | None:
    """Return the `model_type` of a config's class, None if psp does not know the class."""
    declared = config.get("architectures")
    classes = declared if isinstance(declared, list) else []
    return next((kind for kind, name in _MODEL_TYPES.items() if name in classes), None)


def mixture_of(config: Config) -> Architecture | None:
    """Return the mixture of experts that a config.json is of; None for other models."""
    declared = config.get("architectures")
    classes = declared if isinstance(declared, list) else []
    found = (family for family in MIXTURES if any(name in family.hf_classes for name in classes))
    return next(found, None)


def resolve(config: Config, *, experts: bool = False) -> Architecture:
    """Return the family of a config.json.

    Args:
        config: config.json.
        experts: the caller takes mixtures of experts too.

    Raises:
        CheckpointError: no family claims the config's class; the line lists what is supported. Or
            a mixture of experts that the caller does not take.
    """
    declared = config.get("architectures")
    classes = declared if isinstance(declared, list) else []
    for key in ("quantization_config", "quantization"):
        if (found := config.get(key)) is not None:
            method = found.get("quant_method") if isinstance(found, dict) else None
            refuse(key, method or found, "none, because the weights are quantised", ORIGINAL)
    for architecture in ARCHITECTURES:
        known = any(name in architecture.hf_classes for name in classes)
        if known and architecture.claims(config):
            return architecture
    if (mixture := mixture_of(config)) is not None:
        if experts:
            return mixture
        raise CheckpointError(
            f"config.json: architectures is {declared!r}, a mixture of experts, whose neurons are "
            "skipped by their exact gates, without predictors",
            "use psp sparsity to measure it, and psp export-gguf --engine smallthinker",
        )
    if isinstance(config.get("text_config"), dict):
        raise CheckpointError(
            f"config.json: architectures is {declared!r}, a model around a language model, which "
            "text_config describes",
            "save the language model alone (model.language_model.save_pretrained) and pass that",
        )
    supported = {name: None for family in ARCHITECTURES for name in family.hf_classes}
    raise CheckpointError(
        f"config.json: architectures is {declared!r}, model_type {config.get('model_type')!r}, "
        "which psp does not support",
        f"supported: {', '.join(supported)}",
    )
