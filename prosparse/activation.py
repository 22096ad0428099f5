"""The activation of an FFN: what it is called, in a checkpoint's config and in the runnable model.

Substitution (arXiv 2402.13516 §3.2): the activation becomes ReLU, everything else stays. FATReLU
comes last. Configs as the published modelling code reads them: `hidden_act: fatrelu` with the
threshold as `hidden_act_param`; ReLU and SiLU by `hidden_act` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from architectures.checkpoint import Checkpoint, open_source
from architectures.config_json import Config
from architectures.gated import FATReLU
from architectures.registry import resolve
from architectures.source import Source
from architectures.spec import SUBSTITUTABLE
from common.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An activation of all layers.

    Attributes:
        activation: `relu`, `fatrelu`, `drelu` or another of transformers' names, such as `silu`.
        thresholds: of FATReLU, one a layer; empty for the others.
    """

    activation: str
    thresholds: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """How tables call it; `fatrelu_0.01` is how the published models' card writes it."""
        if not self.thresholds:
            return self.activation
        low, high = min(self.thresholds), max(self.thresholds)
        return f"fatrelu_{low:g}" if low == high else f"fatrelu_{low:g}..{high:g}"


def shifted(thresholds: Sequence[float]) -> Setting:
    """Return FATReLU with a threshold for each layer, ReLU if all are 0."""
    if not any(thresholds):
        return Setting(activation="relu")
    return Setting(activation="fatrelu", thresholds=tuple(thresholds))


def has_one_gate(checkpoint: Checkpoint) -> bool:
    """Tell whether the FFN is down(act(gate(x)) * up(x)), in which FATReLU can stand."""
    architecture = checkpoint.architecture
    return architecture.ffn_matrices == 3 and len(architecture.activation_taps) == 1


def open_with_relu(model: str | Source) -> Checkpoint:
    """Open a gated checkpoint of any activation as if it had ReLU.

    Args:
        model: see `architectures.checkpoint.open_source`, or what it gave.

    Raises:
        CheckpointError: not gated, an unsupported family, an activation that ReLU may not replace,
            or a damaged checkpoint.
    """
    origin = open_source(model) if isinstance(model, str) else model
    found = origin.config
    config = with_activation(found, "relu")
    family = resolve(config)
    if family.ffn_matrices != 3:
        raise CheckpointError(
            f"{origin.config_name}: family {family.name} has no gated FFN",
            "psp sparsify makes gated models sparse (LLaMA, Mistral, MiniCPM, ProSparse)",
        )
    if len(family.activation_taps) != 1 or found.get("hidden_act") not in SUBSTITUTABLE:
        raise CheckpointError(
            f"{origin.config_name}: {origin.words.activation} is {found.get('hidden_act')!r} in "
            f"family {family.name}, expected one of {', '.join(SUBSTITUTABLE)}",
            "pass such a model",
        )
    return Checkpoint.of(origin, config)


@dataclass(frozen=True)
class Opened:
    """A checkpoint that may have any activation.

    Attributes:
        checkpoint: opened with ReLU where the FFN has one gate.
        own: the activation that its config names.
    """

    checkpoint: Checkpoint
    own: Setting

    @property
    def base(self) -> Setting:
        """What perplexity gaps are relative to: its own activation, without a threshold."""
        return shifted((0.0,)) if self.own.activation == "fatrelu" else self.own


def open_any(model: str) -> Opened:
    """Open a checkpoint of any supported family, SiLU ones included; see `open_source`.

    Raises:
        CheckpointError: an unsupported family or a damaged checkpoint.
    """
    origin = open_source(model)
    name = origin.config.get("hidden_act")
    if name in ("relu", "fatrelu", "drelu") or resolve(origin.config).ffn_matrices != 3:
        shape = (checkpoint := Checkpoint.of(origin, origin.config)).shape
        if not has_one_gate(checkpoint):
            return Opened(checkpoint, Setting(activation=shape.activation))
        own = shifted((shape.activation_threshold,) * shape.n_layers)
    else:
        own = Setting(activation=str(name))
    return Opened(open_with_relu(origin), own)


def with_activation(config: Config, activation: str, threshold: float = 0.0) -> dict[str, Any]:
    """Return a config.json with another activation.

    Args:
        config: config.json.
        activation: `silu`, `relu` or `fatrelu`.
        threshold: FATReLU's, written as `hidden_act_param`.
    """
    changed = {key: value for key, value in config.items() if key != "hidden_act_param"}
    changed["hidden_act"] = activation
    if activation == "fatrelu":
        changed["hidden_act_param"] = threshold
    return changed


def set_activation(model: nn.Module, activation: str, threshold: float = 0.0) -> None:
    """Replace the activation of a runnable gated model and note it in its config.

    Args:
        model: transformers' causal LM as `architectures` builds it.
        activation: `relu`, `fatrelu`, or another that transformers knows.
        threshold: FATReLU's.
    """
    blocks = list(model.get_submodule("model.layers").children())
    fatrelu = activation == "fatrelu"
    exchange(blocks, activation, [threshold] * len(blocks) if fatrelu else ())
    config: Any = model.config
    config.hidden_act = activation
    if fatrelu:
        config.hidden_act_param = threshold


def exchange(blocks: Iterable[nn.Module], activation: str, thresholds: Sequence[float]) -> None:
    """Replace the activation of gated blocks.

    Args:
        blocks: of a runnable model, in order.
        activation: one that transformers knows; passed over where there are thresholds.
        thresholds: FATReLU's, one a block; empty for the others.
    """
    from transformers.activations import ACT2FN

    for layer, block in enumerate(blocks):
        act_fn = FATReLU(thresholds[layer]) if thresholds else ACT2FN[activation]
        block.get_submodule("mlp").act_fn = act_fn
