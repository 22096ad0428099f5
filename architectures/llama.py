"""LLaMA with a ReLU-gated FFN (ReGLU): ReluLLaMA, ProSparse models without FATReLU, and Mistral."""

from __future__ import annotations

from architectures.gated import gated_family, gated_shape, relu_activation
from architectures.spec import Config, ModelShape


def _shape(config: Config) -> ModelShape:
    activation, threshold = relu_activation(config)
    mistral = "MistralForCausalLM" in config["architectures"]
    return gated_shape(config, activation=activation, threshold=threshold, mistral=mistral)


LLAMA = gated_family(
    name="llama",
    hf_classes=("LlamaForCausalLM", "MistralForCausalLM"),
    claims=lambda config: config.get("hidden_act") not in ("fatrelu", "drelu"),
    gguf_name="llama",
    read_shape=_shape,
)
