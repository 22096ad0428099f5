"""MiniCPM: LLaMA with three constants, which are folded into the weights.

Source: OpenBMB/MiniCPM@5977a63 `model/modeling_minicpm.py`. The embedding is multiplied by
`scale_emb`, what attention and FFN add to the residual stream by `scale_depth / sqrt(n_layers)`,
and the head's input by `dim_model_base / hidden_size`. All three are linear, so they move into the
embedding, into the output projections and into the (untied) head without changing the residual
stream that predictors read.
"""

from __future__ import annotations

import math
from dataclasses import replace

from architectures.config import real
from architectures.gated import gated_family, relu_shape
from architectures.spec import Config, ModelShape


def _shape(config: Config) -> ModelShape:
    # configuration_minicpm.py ties embeddings unless the config says otherwise.
    shape = relu_shape(config, tied=True)
    return replace(
        shape,
        embedding_scale=real(config, "scale_emb", 1.0),
        residual_scale=real(config, "scale_depth", 1.0) / math.sqrt(shape.n_layers),
        output_scale=real(config, "dim_model_base", 1.0) / shape.d_model,
    )


MINICPM = gated_family(
    name="minicpm", hf_classes=("MiniCPMForCausalLM",), gguf_name="llama", read_shape=_shape
)
