"""The weights of an exported file, and the norms and matrix products that PowerInfer's CPU makes.

The vector that multiplies a weight is rounded by the weight's type. Results are float32: a dot
product of blocks is an exact sum of integers times both scales, which float32 reproduces up to the
order of summation. Source: PowerInfer@d3ebd7c ggml.c:type_traits (`vec_dot_type`) and
ggml-quants.c:quantize_row_q8_1, quantize_row_q8_K_reference; the rest is in `common.rounding`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch.nn import functional

from common.rounding import q8_steps, to_f16, to_q8_0
from gguf_export.pwri.hyperparameters import Hyperparameters
from gguf_files.pieces import pieces
from gguf_files.reader import GGUFFile

_Q8_K_BLOCK = 256


class Weights:
    """Gives out tensors as float32: kept in memory if they fit, else converted at every use."""

    def __init__(self, file: GGUFFile, budget: int) -> None:
        """Take a file whose tensors are those of its contract.

        Args:
            file: the opened file.
            budget: bytes of weights, as float32, that may stay in memory.
        """
        self._file = file
        elements = sum(math.prod(info.shape) for info in file.tensors.values())
        self.resident = 4 * elements <= budget
        self._kept: dict[str, torch.Tensor] = {}
        self._held = False

    def __call__(self, name: str) -> torch.Tensor:
        """Return tensor `name` (without `.weight`) as float32."""
        return self._whole(f"{name}.weight")

    def bias(self, name: str) -> torch.Tensor | None:
        """Return the bias that goes with `name`, if there is one."""
        return self._whole(f"{name}.bias") if f"{name}.bias" in self._file.tensors else None

    def _whole(self, name: str) -> torch.Tensor:
        kept = self._kept.get(name)
        if kept is None:
            kept = self._read(name)
            if self.resident or self._held:
                self._kept[name] = kept
        return kept

    def _read(self, name: str) -> torch.Tensor:
        """Return a tensor as float32, of which nothing else is in memory than a piece."""
        numbers = np.empty(self._file.tensors[name].shape, np.float32)
        flat = numbers.reshape(-1)
        for start, found in pieces(self._file, name):
            flat[start : start + len(found)] = found
        return torch.from_numpy(numbers)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep what is read within the block in memory until it ends."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            if not self.resident:
                self._kept.clear()

    def kind(self, name: str) -> GGMLQuantizationType:
        """Return the type in which tensor `name` (without `.weight`) is stored."""
        return self._file.tensors[f"{name}.weight"].kind

    def width(self, name: str) -> float:
        """Return the bytes that a number of tensor `name` (without `.weight`) takes."""
        info = self._file.tensors[f"{name}.weight"]
        return info.size / math.prod(info.shape)

    def rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """Return the chosen rows of a matrix as float32."""
        if self.resident:
            return self(name)[index]
        chosen = self._file.tensor(f"{name}.weight", index.numpy())
        return torch.from_numpy(chosen.astype(np.float32))


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


def rounded(x: torch.Tensor, kind: GGMLQuantizationType) -> torch.Tensor:
    """Round (..., n) float32 as ggml does before it multiplies with weights of type `kind`."""
    name = kind.name
    if name == "F32":
        return x
    if name == "F16":
        return to_f16(x)
    if name == "BF16":
        return x.bfloat16().float()
    if name.endswith("_K"):
        return to_q8_k(x)
    return to_q8_0(x) if name.endswith("_0") else to_q8_1(x)


def to_q8_1(x: torch.Tensor) -> torch.Tensor:
    """Round as `to_q8_0`, but the scale is a float32."""
    steps, largest = q8_steps(x)
    return (steps * (largest / 127)).reshape(x.shape)


def to_q8_k(x: torch.Tensor) -> torch.Tensor:
    """Round to 8 bits in blocks of 256: the value of largest magnitude becomes -128."""
    blocks = x.reshape(-1, _Q8_K_BLOCK)
    extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    inverse = torch.where(extreme != 0, -128 / extreme, 0)
    numbers = (blocks * inverse).round().clamp(max=127)
    return torch.where(inverse != 0, numbers / inverse, 0).reshape(x.shape)
