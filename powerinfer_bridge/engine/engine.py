"""The embedded engine: computes what PowerInfer computes from an exported file.

It follows PowerInfer's CPU arithmetic (commit d3ebd7c): weights are float16, the vector that
multiplies them is rounded to float16 and sums are float32 (ggml's F16 dot product); keys, values
and attention weights are stored as float16. Only the order of summation differs. It is an oracle
and a stand-in; its speed says nothing about PowerInfer's.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common.decisions import DecisionCounts
from common.errors import EngineError
from common.machine import weight_budget
from gguf_export.contract import OpenedFile, require_layout
from gguf_export.pwri.hyperparameters import POSITION_OFFSET, POSITION_ROWS
from powerinfer_bridge.engine.arithmetic import Operators, Weights, rounded
from powerinfer_bridge.engine.attention import Attention, KVCache


class Engine:
    """A sparse model loaded from a PWRI file."""

    def __init__(
        self, path: Path, *, threshold: float | None = None, budget: int | None = None
    ) -> None:
        """Open and check a file.

        Args:
            path: `*.powerinfer.gguf`.
            threshold: replaces the file's, as PowerInfer's environment variable
                LLAMA_SPARSE_PRED_THRESHOLD does.
            budget: bytes of weights, as float32, that may stay in memory; a larger model is read
                from the file at every use. By default `common.machine.weight_budget`.

        Raises:
            FormatError: the file breaks the contract.
        """
        opened = OpenedFile(path)
        self.hyper = opened.hyper
        self.vocabulary = opened.vocabulary
        require_layout(opened)
        self.weights = Weights(opened.file, weight_budget() if budget is None else budget)
        self.threshold = self.hyper.threshold if threshold is None else threshold
        self.counts: list[DecisionCounts] | None = None
        self._operators = Operators(self.weights, self.hyper)
        self._attention = Attention(self._operators)

    def with_threshold(self, threshold: float) -> Engine:
        """Return an engine on the same weights in memory with another threshold, counting off."""
        other = copy.copy(self)
        other.threshold, other.counts = threshold, None
        return other

    def count(self) -> list[DecisionCounts]:
        """Count the truly active neurons against those computed, layer by layer, from now on.

        Costs a full gate for every token; set `counts` to None to stop.
        """
        self.counts = [DecisionCounts() for _ in range(self.hyper.n_layers)]
        return self.counts

    def rank(self, layer: int) -> int:
        """Return the rank of a layer's predictor."""
        return len(self.weights(f"blk.{layer}.fc1"))

    @torch.inference_mode()
    def forward(
        self, tokens: list[int], cache: KVCache, *, last: int | None = None
    ) -> torch.Tensor:
        """Evaluate tokens that follow those in `cache`.

        Args:
            tokens: ids.
            cache: grows by `len(tokens)`.
            last: return the logits of so many last positions only, at least 1.

        Returns:
            Logits (tokens or `last`, vocab_size), float32.

        Raises:
            EngineError: an id outside the vocabulary, no token at all, or more than there are
                learned positions.
        """
        if not tokens or not all(0 <= token < len(self.vocabulary.tokens) for token in tokens):
            raise EngineError("token ids must lie within the file's vocabulary, at least one")
        positions = torch.arange(cache.length, cache.length + len(tokens))
        x = self._embed(tokens, positions)
        for layer in range(self.hyper.n_layers):
            x = self._block(layer, x, positions, cache)
        cache.length += len(tokens)
        x = self._operators.norm("output_norm", x if last is None else x[-last:])
        return self._operators.linear("output" if self.hyper.graph.own_head else "token_embd", x)

    def _embed(self, tokens: list[int], positions: torch.Tensor) -> torch.Tensor:
        x = self.weights.rows("token_embd", torch.tensor(tokens))
        if self.hyper.graph.rotary:
            return x
        rows = positions + POSITION_OFFSET
        if int(rows[-1]) >= POSITION_ROWS:
            raise EngineError(f"the model has {POSITION_ROWS - POSITION_OFFSET} positions only")
        return x + self.weights.rows("position_embd", rows)

    def _block(
        self, layer: int, x: torch.Tensor, positions: torch.Tensor, cache: KVCache
    ) -> torch.Tensor:
        """Return the residual stream (tokens, d_model) after a block."""
        norm, block = self._operators.norm, f"blk.{layer}"
        attention_norm = "attn_norm_2" if self.hyper.two_norms else "attn_norm"
        mixed = self._attention(layer, norm(f"{block}.{attention_norm}", x), positions, cache)
        if self.hyper.graph.parallel:
            return x + (self._ffn(layer, x, norm(f"{block}.attn_norm", x)) + mixed)
        x = x + mixed
        return x + self._ffn(layer, x, norm(f"{block}.ffn_norm", x))

    def _ffn(self, layer: int, residual: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """Return what the FFN adds to the residual stream (llama.cpp:llm_build_ffn_sparse).

        Args:
            layer: number of the block.
            residual: (tokens, d_model), which the predictor reads.
            normed: (tokens, d_model), which the neurons read.
        """
        block, linear = f"blk.{layer}", self._operators.linear
        hidden = torch.relu(linear(f"{block}.fc1", residual))
        predicted = ~(linear(f"{block}.fc2", hidden) < self.threshold)
        if self.counts is not None:
            self.counts[layer].add(self._active(block, normed), predicted)
        down = f"{block}.ffn_down_t"
        kind = self.weights.kind(down)
        if len(normed) == 1 and not predicted.all():
            rows = predicted[0].nonzero()[:, 0]
            neurons = torch.zeros(predicted.shape)  # blocks are rounded with skipped neurons as 0
            neurons[:, rows] = self._neurons(block, normed, rows)
            output = rounded(neurons, kind)[:, rows] @ self.weights.rows(down, rows)
        else:
            neurons = self._neurons(block, normed) * predicted
            output = rounded(neurons, kind) @ self.weights(down)
        bias = self.weights.bias(down)
        return output if bias is None else output + bias

    def _neurons(
        self, block: str, normed: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return what the neurons (those in `rows`) give, (tokens, neurons)."""
        up = self._operators.linear(f"{block}.ffn_up", normed, rows)
        if self.hyper.graph.up_activated:
            up = torch.relu(up)
        if not self.hyper.graph.gated:
            return up
        return torch.relu(self._operators.linear(f"{block}.ffn_gate", normed, rows)) * up

    def _active(self, block: str, normed: torch.Tensor) -> torch.Tensor:
        """Return which neurons the model's own activation lets through, (tokens, d_ff) bool."""
        graph, threshold = self.hyper.graph, self.hyper.activation_threshold
        active = torch.tensor(True)
        if graph.up_activated:
            active = self._operators.linear(f"{block}.ffn_up", normed) > 0
        if graph.gated:
            gate = self._operators.linear(f"{block}.ffn_gate", normed)
            active = active & (gate >= threshold if threshold else gate > 0)
        return active


@dataclass(frozen=True)
class Generation:
    """A greedy continuation.

    Attributes:
        text: the continuation, without the prompt.
        tokens: its ids.
        seconds: time to decode all but the first token.
    """

    text: str
    tokens: list[int]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, prompt excluded."""
        return (len(self.tokens) - 1) / self.seconds


def generate(engine: Engine, prompt: str, count: int) -> Generation:
    """Continue a prompt greedily by `count` tokens (at least 2), end-of-sequence ignored.

    The prompt is encoded as PowerInfer's `main` does, see `Vocabulary.prompt_ids`.
    """
    vocabulary = engine.vocabulary
    cache = KVCache(engine.hyper.n_layers)
    logits = engine.forward(vocabulary.prompt_ids(prompt), cache, last=1)
    made = [int(logits.argmax())]
    start = time.perf_counter()
    while len(made) < count:
        made.append(int(engine.forward(made[-1:], cache, last=1).argmax()))
    seconds = time.perf_counter() - start
    return Generation(vocabulary.decode(made).decode("utf-8", "replace"), made, seconds)
