"""Random models of real sizes, for costs that do not depend on what the weights say."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch


def random_llama_7b(path: Path, n_layers: int, tokenizer: Path, dtype: torch.dtype) -> Path:
    """Write a random ReGLU LLaMA of 7B sizes with few layers and the given tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=n_layers,
        num_attention_heads=32,
        max_position_embeddings=2048,
        hidden_act="relu",
        dtype=dtype,
    )
    LlamaForCausalLM(settings).to(dtype).save_pretrained(path)
    shutil.copy(tokenizer, path / "tokenizer.model")
    return path
