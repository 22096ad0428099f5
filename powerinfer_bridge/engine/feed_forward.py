"""The sparse FFN of the embedded engine (PowerInfer@d3ebd7c llama.cpp:llm_build_ffn_sparse)."""

from __future__ import annotations

import torch

from common.decisions import DecisionCounts
from powerinfer_bridge.engine.operators import Operators, rounded


class FeedForward:
    """Predictor, the neurons that it lets through, and what they add up to."""

    def __init__(self, operators: Operators) -> None:
        """Keep the operators."""
        self._operators = operators
        self._weights = operators.weights
        self._hyper = operators.hyper

    def __call__(
        self,
        layer: int,
        residual: torch.Tensor,
        normed: torch.Tensor,
        threshold: float,
        counts: DecisionCounts | None,
    ) -> torch.Tensor:
        """Return what the FFN adds to the residual stream, (tokens, d_model).

        Args:
            layer: number of the block.
            residual: (tokens, d_model), which the predictor reads.
            normed: (tokens, d_model), which the neurons read.
            threshold: neurons with a logit below it are skipped.
            counts: takes the truly active neurons and those computed, if given.
        """
        block, linear = f"blk.{layer}", self._operators.linear
        hidden = torch.relu(linear(f"{block}.fc1", residual))
        predicted = ~(linear(f"{block}.fc2", hidden) < threshold)
        if counts is not None:
            counts.add(self._active(block, normed), predicted)
        down = f"{block}.ffn_down_t"
        kind = self._weights.kind(down)
        if len(normed) == 1 and not predicted.all():
            rows = predicted[0].nonzero()[:, 0]
            neurons = torch.zeros(predicted.shape)  # blocks are rounded with skipped neurons as 0
            neurons[:, rows] = self._neurons(block, normed, rows)
            output = rounded(neurons, kind)[:, rows] @ self._weights.rows(down, rows)
        else:
            neurons = self._neurons(block, normed) * predicted
            output = rounded(neurons, kind) @ self._weights(down)
        bias = self._weights.bias(down)
        return output if bias is None else output + bias

    def _neurons(
        self, block: str, normed: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return what the neurons (those in `rows`) give, (tokens, neurons)."""
        up = self._operators.linear(f"{block}.ffn_up", normed, rows)
        if self._hyper.graph.up_activated:
            up = torch.relu(up)
        if not self._hyper.graph.gated:
            return up
        return torch.relu(self._operators.linear(f"{block}.ffn_gate", normed, rows)) * up

    def _active(self, block: str, normed: torch.Tensor) -> torch.Tensor:
        """Return which neurons the model's own activation lets through, (tokens, d_ff) bool."""
        graph, threshold = self._hyper.graph, self._hyper.activation_threshold
        active = torch.tensor(True)
        if graph.up_activated:
            active = self._operators.linear(f"{block}.ffn_up", normed) > 0
        if graph.gated:
            gate = self._operators.linear(f"{block}.ffn_gate", normed)
            active = active & (gate >= threshold if threshold else gate > 0)
        return active
