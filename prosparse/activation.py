"""The activation of a gated FFN, in the runnable model and in its config.

Substitution (arXiv 2402.13516 §3.2): the activation becomes ReLU, everything else stays. FATReLU
comes last. Configs as the published modelling code reads them: `hidden_act: fatrelu` with the
threshold as `hidden_act_param`; ReLU and SiLU by `hidden_act` alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from architectures.checkpoint import Checkpoint, locate
from architectures.gated import FATReLU
from architectures.registry import resolve
from common.errors import CheckpointError
from common.files import read_json

SUBSTITUTABLE = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "fatrelu")
"""Values of `hidden_act` in whose place ReLU may come."""


def open_as(model: str, activation: str, threshold: float = 0.0) -> Checkpoint:
    """Open a gated checkpoint of any activation as if it had another one.

    Args:
        model: directory or hub id.
        activation: `relu` or `fatrelu`.
        threshold: FATReLU's.

    Raises:
        CheckpointError: not gated, an unsupported family, an activation that ReLU may not replace,
            or a damaged checkpoint.
    """
    path = locate(model)
    found = read_json(path / "config.json", CheckpointError, "pass a Hugging Face model directory")
    config = with_activation(found, activation, threshold)
    family = resolve(config)
    if family.ffn_matrices != 3:
        raise CheckpointError(
            f"{path / 'config.json'}: family {family.name} has no gated FFN",
            "psp sparsify makes gated models sparse (LLaMA, Mistral, MiniCPM, ProSparse)",
        )
    if len(family.activation_taps) != 1 or found.get("hidden_act") not in SUBSTITUTABLE:
        raise CheckpointError(
            f"{path / 'config.json'}: hidden_act is {found.get('hidden_act')!r} in family "
            f"{family.name}, expected one of {', '.join(SUBSTITUTABLE)}",
            "pass such a model",
        )
    checkpoint = Checkpoint(path, config, family, family.read_shape(config))
    checkpoint.check_tensors()
    return checkpoint


def with_activation(config: Any, activation: str, threshold: float = 0.0) -> dict[str, Any]:
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
    from transformers.activations import ACT2FN

    for block in model.get_submodule("model.layers").children():
        mlp = block.get_submodule("mlp")
        mlp.act_fn = FATReLU(threshold) if activation == "fatrelu" else ACT2FN[activation]
    config: Any = model.config
    config.hidden_act = activation
    if activation == "fatrelu":
        config.hidden_act_param = threshold
