"""Norms and matrix products as PowerInfer's CPU computes them."""

from __future__ import annotations

import torch
from torch.nn import functional

from gguf_export.pwri.hyperparameters import Hyperparameters
from powerinfer_bridge.engine.arithmetic import rounded
from powerinfer_bridge.engine.weights import Weights


class Operators:
    """The operators on a file's weights, by tensor names without `.weight`."""

    def __init__(self, weights: Weights, hyper: Hyperparameters) -> None:
        """Keep both."""
        self.weights = weights
        self.hyper = hyper

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Normalise (tokens, d_model) float32 (llama.cpp:llm_build_norm)."""
        if self.hyper.graph.centred:
            x = x - x.mean(-1, keepdim=True)
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.hyper.norm_eps)
        bias = self.weights.bias(name)
        normed = x * scale * self.weights(name)
        return normed if bias is None else normed + bias

    def linear(self, name: str, x: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply (tokens, n) by a matrix (m, n) and add its bias, if it has one.

        Args:
            name: the matrix.
            x: float32; rounded as the matrix's type demands.
            rows: of the matrix, those to use; None uses all.
        """
        matrix = self.weights(name) if rows is None else self.weights.rows(name, rows)
        bias = self.weights.bias(name)
        if bias is not None and rows is not None:
            bias = bias[rows]
        return functional.linear(rounded(x, self.weights.kind(name)), matrix, bias)
