"""Random models of real sizes, for costs that do not depend on what the weights say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from architectures.checkpoint import Checkpoint
from predictor.artifact import PredictorHeader


def reglu_settings(**changes: Any) -> Any:
    """Return transformers' settings of a ReGLU LLaMA of 7B sizes, save for what changes."""
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "hidden_act": "relu",
    }
    return LlamaConfig(**(sizes | changes))


def random_llama_7b(path: Path, n_layers: int, tokenizer: Path, dtype: torch.dtype) -> Path:
    """Write a random ReGLU LLaMA of 7B sizes with few layers and the given tokenizer."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    settings = reglu_settings(num_hidden_layers=n_layers, dtype=dtype)
    LlamaForCausalLM(settings).to(dtype).save_pretrained(path)
    shutil.copy(tokenizer, path / "tokenizer.model")
    return path


def made_header(model: Path, rank: int, name: str) -> PredictorHeader:
    """Return the header of predictors that were made for a model without traces.

    Args:
        model: checkpoint directory.
        rank: of every layer.
        name: what to call the recipe.
    """
    checkpoint = Checkpoint.open(model)
    shape = checkpoint.shape
    return PredictorHeader(
        model=str(model),
        model_fingerprint=checkpoint.fingerprint,
        architecture=checkpoint.architecture.name,
        activation=shape.activation,
        n_layers=shape.n_layers,
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        rank=rank,
        threshold=0.0,
        traces_identity="",
        recipe={"name": name},
        holdout=0.1,
        label_top_fraction=None,
        seed=0,
    )
