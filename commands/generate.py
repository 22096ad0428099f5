"""`psp generate`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from commands.options import json_option, settings_options
from commands.printing import echo, print_json
from sparse_operators.settings import GenerateConfig

if TYPE_CHECKING:
    from architectures.checkpoint import Checkpoint
    from architectures.model import LoadedModel
    from sparse_operators.generation import Switch


@click.command(short_help="Run a model with the sparse FFN operators.")
@settings_options(GenerateConfig)
@json_option
def generate(config: GenerateConfig, as_json: bool) -> None:
    """Continue a text greedily, exactly, without a predictor.

    The model runs in transformers, dense and with its FFNs replaced, by turns.
    """
    document = _generate(config)
    if as_json:
        return print_json(document)
    echo(_report(document))


def _generate(config: GenerateConfig) -> dict[str, Any]:
    import torch

    from architectures.checkpoint import Checkpoint
    from architectures.model import load_model
    from architectures.tokenizer import load_tokenizer
    from sparse_operators.generation import compare

    checkpoint, device = Checkpoint.open(config.model), config.device
    _require_gated(checkpoint)
    chosen = {"auto": torch.float32 if device == "cpu" else checkpoint.dtype}
    floating = chosen.get(config.dtype) or getattr(torch, config.dtype)
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.shape.vocab_size, checkpoint.config)
    ids = [tokenizer.bos_id(), *tokenizer.encode(config.prompt)]
    if len(ids) + config.count > (context := checkpoint.shape.context_length):
        raise click.UsageError(
            f"{len(ids)} tokens of --prompt and {config.count} more exceed the model's context of "
            f"{context}; lower -n or shorten the prompt."
        )
    loaded = load_model(checkpoint, dtype=floating, device=device, weights="resident")
    result = compare(
        loaded.causal_lm,
        torch.tensor([ids], device=device),
        config.count,
        operators=_switch(checkpoint, loaded) if config.operators else None,
        repeats=config.repeats,
    )
    for kind in {"dense", "operators"} & result.keys():
        result[kind]["text"] = tokenizer.decode(result[kind]["tokens"])
    facts = {"model": config.model, "prompt": config.prompt, "prompt_tokens": len(ids)}
    facts |= {"device": device, "dtype": str(floating).removeprefix("torch.")}
    return {**facts, "threads": config.threads, **result}


def _require_gated(checkpoint: Checkpoint) -> None:
    from common.errors import CheckpointError

    if checkpoint.architecture.ffn_matrices != 3:
        raise CheckpointError(
            f"{checkpoint.path}/config.json: {checkpoint.architecture.name} has no gated FFN, "
            "which the operators need",
            "pass a LLaMA-like model with ReLU or FATReLU",
        )


def _switch(checkpoint: Checkpoint, loaded: LoadedModel) -> Switch:
    from sparse_operators.module import replaced_mlps

    shape, down = checkpoint.shape, checkpoint.architecture.ffn_output
    return partial(
        replaced_mlps,
        loaded.blocks,
        name=down.rpartition(".")[0],
        threshold=shape.activation_threshold,
        double_relu=shape.activation == "drelu",
    )


def _report(document: Mapping[str, Any]) -> str:
    dense = document["dense"]
    if "operators" not in document:
        return f"{dense['text']}\n\ndense: {dense['tokens_per_second']:.2f} tokens/s"
    sparse, same = document["operators"], document["same_tokens"]
    total = len(sparse["tokens"])
    outcome = (
        "greedy text identical"
        if same == total
        else f"greedy text differs after {same} of {total} tokens"
    )
    lines = [
        sparse["text"],
        "",
        f"with operators: {sparse['tokens_per_second']:.2f} tokens/s, "
        f"dense: {dense['tokens_per_second']:.2f}, speedup {document['speedup']:.2f}; {outcome}",
    ]
    return "\n".join(lines)
