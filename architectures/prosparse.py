"""ProSparse LLaMA: a gated FFN whose activation passes values from a threshold on (FATReLU).

Config: `hidden_act: fatrelu`, `hidden_act_param` the threshold, as in the published checkpoints of
arXiv 2402.13516, whose modelling code compares with `>=`.
"""

from __future__ import annotations

from architectures.gated import gated_family, relu_shape

_OWN_CLASS = "SparseLlamaForCausalLM"


PROSPARSE = gated_family(
    name="prosparse",
    hf_classes=(_OWN_CLASS, "LlamaForCausalLM", "MistralForCausalLM"),
    claims=lambda config: (
        _OWN_CLASS in config["architectures"] or config.get("hidden_act") == "fatrelu"
    ),
    gguf_name="llama",
    read_shape=relu_shape,
)
"""Also MiniCPM-S in llama-format, whose constants are in the weights already."""
