"""What these programs share: processes of their own, and random models of real sizes.

Random weights do where costs do not depend on what they say.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from architectures.checkpoint import Checkpoint
from predictor.artifact import PredictorHeader

Value = TypeVar("Value")


def print_line(document: Mapping[str, Any]) -> None:
    """Print one JSON line, at once."""
    click.echo(json.dumps(document))


def in_process(function: Callable[..., Value], *arguments: object) -> Value:
    """Run a function in a new process, whose memory nothing has used before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_rss_bytes() -> int:
    """Return this program's peak. Not getrusage's, which a process inherits from its parent."""
    return _status("VmHWM")


def own_bytes() -> int:
    """Return this program's memory, files that it maps left out."""
    return _status("VmData")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


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
