"""LLaMA with a ReLU-gated FFN (ReGLU): ReluLLaMA, ProSparse models without FATReLU, and Mistral."""

from __future__ import annotations

from architectures.gated import gated_family, relu_shape

LLAMA = gated_family(
    name="llama",
    hf_classes=("LlamaForCausalLM", "MistralForCausalLM"),
    claims=lambda config: config.get("hidden_act") not in ("fatrelu", "drelu"),
    gguf_name="llama",
    read_shape=relu_shape,
)
