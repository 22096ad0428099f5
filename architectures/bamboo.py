"""Bamboo and TurboSparse-Mistral: Mistral with ReLU on both halves of the gated FFN (dReLU).

Source: the authors' modeling_bamboo.py (`down(act(gate(x)) * act(up(x))`) and arXiv 2406.05955 §4.
TurboSparse checkpoints hold predictors of their own (`mlp.predictor.*`), which mask the FFN when
they are run by their own code; traces are made of the model without that mask.
"""

from __future__ import annotations

from architectures.config import refuse
from architectures.gated import gated_family, gated_shape
from architectures.spec import Config, ModelShape

_OWN_CLASS = "BambooForCausalLM"


def _shape(config: Config) -> ModelShape:
    activation = config.get("hidden_act")
    if activation not in ("relu", "drelu"):
        refuse("hidden_act", activation, "'relu'", "the model needs ReLU-fication first")
    mistral = "LlamaForCausalLM" not in config["architectures"]
    return gated_shape(config, activation="drelu", mistral=mistral)


BAMBOO = gated_family(
    name="bamboo",
    hf_classes=(_OWN_CLASS, "MistralForCausalLM", "LlamaForCausalLM"),
    claims=lambda config: (
        _OWN_CLASS in config["architectures"] or config.get("hidden_act") == "drelu"
    ),
    activation_taps=("mlp.gate_proj", "mlp.up_proj"),
    gguf_name="bamboo",
    dense_note="dense file for timing; PowerInfer computes dReLU, other programs may not",
    read_shape=_shape,
)
