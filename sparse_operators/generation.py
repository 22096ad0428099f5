"""Greedy decoding with a Hugging Face model, timed dense and with the operators by turns."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from architectures.checkpoint import Checkpoint
from architectures.model import LoadedModel, choose_device, load_model
from common.errors import CheckpointError, SettingsError
from common.typed_json import plain
from sparse_operators.module import replaced_mlps
from sparse_operators.settings import GenerateConfig

Note = Callable[[str], None]
Switch = Callable[[], AbstractContextManager[None]]
"""Gives a model another FFN while its context is open."""


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
    cache = _cache_name(model)
    output: Any = model(input_ids=prompt, use_cache=True)
    made = [output.logits[:, -1:].argmax(-1)]
    _wait_for(prompt.device)
    start = time.perf_counter()
    while len(made) < count:
        past = {cache: getattr(output, cache)}
        output = model(input_ids=made[-1], use_cache=True, **past)
        made.append(output.logits[:, -1:].argmax(-1))
    _wait_for(prompt.device)
    seconds = time.perf_counter() - start
    return Continuation(torch.cat(made, 1)[0].tolist(), seconds)


def _cache_name(model: nn.Module) -> str:
    """Return what a model calls its keys and values; from transformers 5.24 on `cache`."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


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


def decode_by_turns(
    model: nn.Module, prompt: Tensor, count: int, *, kinds: Mapping[str, Switch], repeats: int
) -> dict[str, Decoding]:
    """Continue a prompt with every kind of FFN by turns, after one untimed turn.

    Args:
        model: the dense model.
        prompt: (1, length) int64 token ids on the model's device.
        count: tokens to make, at least 2.
        kinds: what makes the model one of a kind, by the kind's name.
        repeats: timed turns.
    """
    turns: dict[str, list[Continuation]] = {kind: [] for kind in kinds}
    for _ in range(repeats + 1):
        for kind, switch in kinds.items():
            with switch():
                turns[kind].append(continue_greedily(model, prompt, count))
    return {kind: Decoding.of(continued[1:]) for kind, continued in turns.items()}


def common_length(one: list[int], other: list[int]) -> int:
    """Return how many tokens two continuations have in common before they part."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def generate(config: GenerateConfig, note: Note = lambda line: None) -> dict[str, Any]:
    """Continue a prompt with a checkpoint, dense and with the operators.

    Args:
        config: settings.
        note: receives lines about the checkpoint.

    Returns:
        The document that `psp generate --json` prints.

    Raises:
        CheckpointError: the model cannot be loaded, or has no gated FFN.
        SettingsError: the model's context is too short for the prompt and its continuation.
    """
    checkpoint, device = Checkpoint.open(config.model), choose_device(config.device)
    for line in checkpoint.notes:
        note(line)
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
    kinds: dict[str, Switch] = {"dense": nullcontext}
    if config.operators:
        kinds["operators"] = _switch(checkpoint, loaded)
    prompt = torch.tensor([ids], device=device)
    made = decode_by_turns(
        loaded.causal_lm, prompt, config.count, kinds=kinds, repeats=config.repeats
    )
    return {
        "model": config.model,
        "prompt": config.prompt,
        "prompt_tokens": len(ids),
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": config.threads,
        **{
            kind: {**plain(decoding), "text": tokenizer.decode(decoding.tokens)}
            for kind, decoding in made.items()
        },
        **(_agreement(**made) if config.operators else {}),
    }


def _agreement(dense: Decoding, operators: Decoding) -> dict[str, object]:
    """Return the speedup, and the length of what the continuations have in common."""
    return {
        "speedup": operators.tokens_per_second / dense.tokens_per_second,
        "same_tokens": common_length(dense.tokens, operators.tokens),
    }


def _require_gated(checkpoint: Checkpoint) -> None:
    if checkpoint.architecture.ffn_matrices != 3:
        raise CheckpointError(
            f"{checkpoint.origin.config_name}: {checkpoint.architecture.name} has no gated FFN, "
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
