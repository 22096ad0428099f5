"""Greedy decoding with a Hugging Face model, timed dense and with the operators by turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from architectures.checkpoint import Checkpoint
from architectures.model import LoadedModel, load_model
from common.errors import CheckpointError, SettingsError
from common.typed_json import plain
from sparse_operators.module import replaced_mlps
from sparse_operators.settings import GenerateConfig

Switch = Callable[[], AbstractContextManager[None]]
"""Puts the operators into a model while its context is open."""


@dataclass(frozen=True)
class Continuation:
    """A greedy continuation.

    Attributes:
        tokens: its ids, without the prompt's.
        seconds: time to decode all but the first token, which comes from the prompt.
    """

    tokens: list[int]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, prompt excluded."""
        return (len(self.tokens) - 1) / self.seconds


@torch.inference_mode()
def continue_greedily(model: nn.Module, prompt: Tensor, count: int) -> Continuation:
    """Continue a prompt by the likeliest tokens, end-of-sequence ignored.

    Args:
        model: transformers' causal LM.
        prompt: (1, length) int64 token ids on the model's device.
        count: tokens to make, at least 2.
    """
    output: Any = model(input_ids=prompt, use_cache=True)
    made = [output.logits[:, -1:].argmax(-1)]
    _wait_for(prompt.device)
    start = time.perf_counter()
    while len(made) < count:
        output = model(input_ids=made[-1], past_key_values=output.past_key_values, use_cache=True)
        made.append(output.logits[:, -1:].argmax(-1))
    _wait_for(prompt.device)
    seconds = time.perf_counter() - start
    return Continuation(torch.cat(made, 1)[0].tolist(), seconds)


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a model decoded, over several turns.

    Attributes:
        tokens: its continuation.
        tokens_per_second: median of the turns.
        samples: the turns' own.
    """

    tokens: list[int]
    tokens_per_second: float
    samples: list[float]

    @classmethod
    def of(cls, turns: list[Continuation]) -> Decoding:
        """Sum up the turns."""
        samples = [continuation.tokens_per_second for continuation in turns]
        speed = statistics.median(samples)
        return cls(tokens=turns[-1].tokens, tokens_per_second=speed, samples=samples)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The dense model and, unless it ran alone, the same with the operators."""

    dense: Decoding
    operators: Decoding | None = None

    def figures(self) -> dict[str, object]:
        """Return the speedup, and the length of what the continuations have in common."""
        if self.operators is None:
            return {}
        speedup = self.operators.tokens_per_second / self.dense.tokens_per_second
        same = common_length(self.dense.tokens, self.operators.tokens)
        return {"speedup": speedup, "same_tokens": same}


def compare(
    model: nn.Module, prompt: Tensor, count: int, *, operators: Switch | None, repeats: int
) -> Comparison:
    """Continue a prompt dense and with the operators by turns, after one untimed turn.

    Args:
        model: the dense model.
        prompt: (1, length) int64 token ids on the model's device.
        count: tokens to make, at least 2.
        operators: puts the operators in; None runs the dense model only.
        repeats: timed turns.
    """
    dense: list[Continuation] = []
    sparse: list[Continuation] = []
    for _ in range(repeats + 1):
        dense.append(continue_greedily(model, prompt, count))
        if operators is not None:
            with operators():
                sparse.append(continue_greedily(model, prompt, count))
    return Comparison(
        dense=Decoding.of(dense[1:]), operators=Decoding.of(sparse[1:]) if sparse else None
    )


def common_length(one: list[int], other: list[int]) -> int:
    """Return how many tokens two continuations have in common before they part."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Continue a prompt with a checkpoint, dense and with the operators.

    Returns:
        The document that `psp generate --json` prints.

    Raises:
        CheckpointError: the model cannot be loaded, or has no gated FFN.
        SettingsError: the model's context is too short for the prompt and its continuation.
    """
    checkpoint, device = Checkpoint.open(config.model), config.device
    _require_gated(checkpoint)
    chosen = {"auto": torch.float32 if device == "cpu" else checkpoint.dtype}
    dtype = chosen.get(config.dtype) or getattr(torch, config.dtype)
    tokenizer = checkpoint.tokenizer()
    ids = [tokenizer.bos_id(), *tokenizer.encode(config.prompt)]
    if len(ids) + config.count > (context := checkpoint.shape.context_length):
        raise SettingsError(
            f"{len(ids)} tokens of --prompt and {config.count} more exceed the model's context of "
            f"{context}",
            "lower -n or shorten the prompt",
        )
    loaded = load_model(checkpoint, dtype=dtype, device=device, weights="resident")
    compared = compare(
        loaded.causal_lm,
        torch.tensor([ids], device=device),
        config.count,
        operators=_switch(checkpoint, loaded) if config.operators else None,
        repeats=config.repeats,
    )
    kinds = {"dense": compared.dense, "operators": compared.operators}
    return {
        "model": config.model,
        "prompt": config.prompt,
        "prompt_tokens": len(ids),
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": config.threads,
        **{
            kind: {**plain(made), "text": tokenizer.decode(made.tokens)}
            for kind, made in kinds.items()
            if made is not None
        },
        **compared.figures(),
    }


def _require_gated(checkpoint: Checkpoint) -> None:
    if checkpoint.architecture.ffn_matrices != 3:
        raise CheckpointError(
            f"{checkpoint.path}/config.json: {checkpoint.architecture.name} has no gated FFN, "
            "which the operators need",
            "pass a LLaMA-like model with ReLU or FATReLU",
        )


def _switch(checkpoint: Checkpoint, loaded: LoadedModel) -> Switch:
    shape, down = checkpoint.shape, checkpoint.architecture.ffn_output
    return partial(
        replaced_mlps,
        loaded.blocks,
        name=down.rpartition(".")[0],
        threshold=shape.activation_threshold,
        double_relu=shape.activation == "drelu",
    )


def report(document: Mapping[str, Any]) -> str:
    """Return a document of `generate` as text: the continuation, speeds, whether both agree."""
    dense = document["dense"]
    if "operators" not in document:
        return f"{dense['text']}\n\ndense: {dense['tokens_per_second']:.2f} tokens/s"
    sparse, same = document["operators"], document["same_tokens"]
    total = len(sparse["tokens"])
    outcome = "identical" if same == total else f"differs after {same} of {total} tokens"
    return (
        f"{sparse['text']}\n\n"
        f"with operators: {sparse['tokens_per_second']:.2f} tokens/s, "
        f"dense: {dense['tokens_per_second']:.2f}, speedup {document['speedup']:.2f}; "
        f"greedy text {outcome}"
    )
