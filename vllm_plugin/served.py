"""Which models the plugin serves, and what it tells its model class about one.

Pure: takes a config.json as a mapping, needs no vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from architectures.config_json import Config
from architectures.gated import GATED, Arithmetic, read_arithmetic
from architectures.registry import resolve, with_class
from architectures.spec import Architecture
from vllm_plugin.act_info import read_act_info
from vllm_plugin.switches import read_switches

MODEL_CLASS = "PspForCausalLM"
"""What vLLM knows the plugin's model class by."""

CLASSES = frozenset(name for family in GATED for name in family.hf_classes)

OWN_PREDICTOR = ".mlp.predictor."
"""In the names of tensors of TurboSparse's checkpoints that the model does not need."""

_ZEROING = ("relu", "fatrelu", "drelu")
_ALWAYS = ("SparseLlamaForCausalLM", "BambooForCausalLM")
"""Classes that stand for an activation with zeros, whatever else the config says."""


_WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")
"""What torch.compile, DataParallel and peft put before all names."""


def plain_name(name: str) -> str:
    """Return a tensor's name as the causal language model has it, from where psp reads others."""
    while wrapper := next((each for each in _WRAPPERS if name.startswith(each)), None):
        name = name.removeprefix(wrapper)
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model that the plugin serves.

    Attributes:
        family: psp's.
        arithmetic: its activation and constants.
        notes: what whoever starts the server should read.
    """

    family: Architecture
    arithmetic: Arithmetic
    notes: tuple[str, ...] = ()

    @property
    def unties(self) -> bool:
        """Whether embedding and head differ by their factors, and so cannot be one matrix."""
        return self.arithmetic.embedding_scale != self.arithmetic.output_scale


def served(config: Config, environment: Mapping[str, str]) -> Served | None:
    """Return how the plugin serves a model; None if vLLM is to run it by itself.

    Args:
        config: config.json, or what vLLM made of it.
        environment: variables, of which `ACT_INFO` wins over the config.

    Raises:
        CheckpointError: an activation without its threshold, constants that are no numbers,
            quantised weights.
        SettingsError: `ACT_INFO` does not parse.
    """
    config = with_class(config)
    names = set(config.get("architectures") or ())
    if not names & CLASSES or config.get("num_experts"):
        return None
    notes: tuple[str, ...] = ()
    info = read_act_info(environment)
    if info is not None and "BambooForCausalLM" in names:
        notes = ("ACT_INFO is passed over: the model computes dReLU",)
    elif info is not None:
        config, notes = _by_act_info(config, *info)
    if config.get("hidden_act") not in _ZEROING and not names & set(_ALWAYS):
        return None
    family = resolve(config)
    return Served(family=family, arithmetic=read_arithmetic(family, config), notes=notes)


def _by_act_info(
    config: Config, activation: str, threshold: float
) -> tuple[Config, tuple[str, ...]]:
    said, own = config.get("hidden_act"), config.get("hidden_act_param")
    changed = {**config, "hidden_act": activation, "hidden_act_param": threshold}
    if said == activation and (activation == "relu" or own == threshold):
        return changed, ()
    took = activation if activation == "relu" else f"{activation} from {threshold:g}"
    instead = said if said != "fatrelu" else f"fatrelu from {own}"
    return changed, (f"ACT_INFO wins: {took} instead of config.json's {instead}",)


def factors(found: Served) -> Mapping[str, float]:
    """Return what each tensor is multiplied with, by its name in a checkpoint.

    `{layer}` stands for the block's number; tensors without a factor are left out.
    """
    values = found.arithmetic
    return {
        rule.source: value
        for rule in found.family.tensors
        if rule.scale is not None and (value := getattr(values, rule.scale)) != 1
    }


def told(found: Served, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return what the model class must know, as JSON that a config can hold.

    All that changes the model's graph is in it, because vLLM keeps compiled graphs by the config.

    Raises:
        SettingsError: a variable of the environment does not say what it may.
    """
    values, switches = found.arithmetic, read_switches(environment)
    return {
        "family": found.family.name,
        "activation": values.activation,
        "activation_threshold": values.activation_threshold,
        "factors": dict(factors(found)),
        "sparse": switches.sparse,
        "counted": switches.statistics is not None,
    }
