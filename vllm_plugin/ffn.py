"""The FFN on vLLM's parallel projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from sparse_operators.reference import rounded_threshold
from vllm_plugin.operators import activate, count_active, gated_ffn


class GatedFFN(nn.Module):
    """`down(act(gate(x)) * up(x))` with an activation that makes zeros."""

    counts: Tensor | None

    def __init__(
        self, mlp: Any, activation: str, threshold: float, *, sparse: bool, counted: bool
    ) -> None:
        """Take over the projections of vLLM's LlamaMLP.

        Args:
            mlp: has `gate_up_proj` and `down_proj`, not yet loaded.
            activation: `relu`, `fatrelu` or `drelu`.
            threshold: FATReLU passes values from this on; 0 for the others.
            sparse: run steps of few tokens with the sparse operators where that is faster.
            counted: count for each neuron the tokens that activate it.
        """
        super().__init__()
        self.gate_up_proj, self.down_proj = mlp.gate_up_proj, mlp.down_proj
        self.double_relu, self.sparse = activation == "drelu", sparse
        weight = self.down_proj.weight
        self.threshold = rounded_threshold(threshold, weight.dtype)
        counts = torch.zeros(weight.shape[1] + 1, dtype=torch.int64) if counted else None
        self.register_buffer("counts", counts, persistent=False)
        if sparse:
            self.gate_up_proj.quant_method = PlainWeights()
            self.down_proj.quant_method = NeuronRows()

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (tokens, d_model) for `x` (tokens, d_model)."""
        if self.sparse:
            return self._sparse(x)
        gate_up, _ = self.gate_up_proj(x)
        if self.counts is not None:
            count_active(gate_up, self.counts, self.threshold, self.double_relu)
        gate, up = gate_up.chunk(2, -1)
        y: Tensor = self.down_proj(activate(gate, up, self.threshold, self.double_relu))[0]
        return y

    def _sparse(self, x: Tensor) -> Tensor:
        down = self.down_proj
        weights = self.gate_up_proj.weight, down.weight, down.rows
        y: Tensor = gated_ffn(x, *weights, self.counts, self.threshold, self.double_relu)
        if get_tensor_model_parallel_world_size() > 1:
            y = tensor_model_parallel_all_reduce(y)
        return y


class PlainWeights(UnquantizedLinearMethod):  # type: ignore[misc]  # vLLM is untyped here
    """Leaves weights as they were loaded, where vLLM's CPU path would pack them."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Do nothing."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the product with `layer.weight`."""
        return linear(x, layer.weight, bias)


class NeuronRows(PlainWeights):
    """Also gives a down projection `rows`, its weight neuron by neuron."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Make `layer.rows` (d_ff, d_model): on a GPU the weight's own memory, else a copy.

        A persistent buffer: vLLM copies no other when weights are loaded anew.
        """
        weight: Any = layer.weight
        rows = weight.data.T.contiguous()
        if weight.is_cuda:
            weight.data = rows.T
        layer.register_buffer("rows", rows)
