"""Greedy decoding with a Hugging Face model, timed dense and with the operators by turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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


def compare(
    model: nn.Module, prompt: Tensor, count: int, *, operators: Switch | None, repeats: int
) -> dict[str, Any]:
    """Continue a prompt dense and with the operators by turns, after one untimed turn.

    Args:
        model: the dense model.
        prompt: (1, length) int64 token ids on the model's device.
        count: tokens to make, at least 2.
        operators: puts the operators in; None runs the dense model only.
        repeats: timed turns.

    Returns:
        `dense` and, unless `operators` is None, `operators`: `tokens`, the median
        `tokens_per_second` and the turns' own under `samples`. With both of them also `speedup`,
        and `same_tokens`, the length of what the two continuations have in common.
    """
    runs: dict[str, list[Continuation]] = {"dense": []}
    if operators is not None:
        runs["operators"] = []
    for _ in range(repeats + 1):
        runs["dense"].append(continue_greedily(model, prompt, count))
        if operators is not None:
            with operators():
                runs["operators"].append(continue_greedily(model, prompt, count))
    result: dict[str, Any] = {kind: _summary(made[1:]) for kind, made in runs.items()}
    if operators is not None:
        dense, sparse = result["dense"], result["operators"]
        result["speedup"] = sparse["tokens_per_second"] / dense["tokens_per_second"]
        result["same_tokens"] = common_length(dense["tokens"], sparse["tokens"])
    return result


def common_length(one: list[int], other: list[int]) -> int:
    """Return how many tokens two continuations have in common before they part."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _summary(made: list[Continuation]) -> dict[str, Any]:
    samples = [continuation.tokens_per_second for continuation in made]
    speed = statistics.median(samples)
    return {"tokens": made[-1].tokens, "tokens_per_second": speed, "samples": samples}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
