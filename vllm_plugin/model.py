"""The model class: vLLM's LLaMA with another FFN, and constants folded into its weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.models.llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
)

from vllm_plugin.ffn import GatedFFN

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
_OWN_PREDICTOR = ".mlp.predictor."
"""TurboSparse's checkpoints hold predictors, which the model does not need."""


class PspDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]  # vLLM is untyped here
    """vLLM's LLaMA block with a ReLU-family FFN."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        prefix: str = "",
        config: Any = None,
        attn_layer_type: type[torch.nn.Module] = LlamaAttention,
    ) -> None:
        """Build a block; `config` is transformers', with what `served.told` put there."""
        config = config or vllm_config.model_config.hf_config
        parts = get_tensor_model_parallel_world_size()
        if config.intermediate_size % parts:
            raise ValueError(
                f"config.json: intermediate_size {config.intermediate_size} does not divide into "
                f"{parts} parts; choose another --tensor-parallel-size"
            )
        plain = copy.copy(config)
        plain.hidden_act = "silu"  # vLLM's FFN takes no other; it only lends its projections
        super().__init__(vllm_config, prefix, plain, attn_layer_type)
        self.mlp: Any = GatedFFN(
            self.mlp, config.psp["activation"], config.psp["activation_threshold"]
        )


class PspForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """A ReLU-family LLaMA, Mistral, MiniCPM or Bamboo."""

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str = "",
        layer_type: type[torch.nn.Module] = PspDecoderLayer,
    ) -> None:
        """Build the model."""
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors, each times its factor."""
        loaded: set[str] = super().load_weights(self._adapted(weights))
        return loaded

    def _adapted(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        factors, embedding, has_head = self.config.psp["factors"], None, False
        for name, tensor in weights:
            if _OWN_PREDICTOR in name:
                continue
            if name == _EMBEDDING:
                embedding = tensor
            has_head = has_head or name == _HEAD
            yield name, _times(tensor, factors.get(_LAYER.sub("{layer}", name), 1))
        if not (has_head or self.config.tie_word_embeddings) and embedding is not None:
            yield _HEAD, _times(embedding, factors.get(_HEAD, 1))


def _times(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    return tensor if factor == 1 else (tensor.float() * factor).to(tensor.dtype)
