"""How ggml rounds the vector that multiplies a weight, by the weight's type.

Results are float32: a dot product of blocks is an exact sum of integers times both scales, which
float32 reproduces up to the order of summation. Source: PowerInfer@d3ebd7c ggml.c:type_traits
(`vec_dot_type`) and ggml-quants.c:quantize_row_q8_0, quantize_row_q8_K_reference.
"""

from __future__ import annotations

import torch
from gguf import GGMLQuantizationType

_Q8_0_BLOCK, _Q8_K_BLOCK = 32, 256


def rounded(x: torch.Tensor, kind: GGMLQuantizationType) -> torch.Tensor:
    """Round (..., n) float32 as ggml does before it multiplies with weights of type `kind`."""
    if kind is GGMLQuantizationType.F16:
        return to_f16(x)
    return to_q8_k(x) if kind is GGMLQuantizationType.Q6_K else to_q8_0(x)


def to_f16(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to the nearest float16 value, kept as float32."""
    return x.half().float()


def to_q8_0(x: torch.Tensor) -> torch.Tensor:
    """Round to 8 bits in blocks of 32: the scale is a float16, ties go to even."""
    blocks = x.reshape(-1, _Q8_0_BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, 0)
    return ((blocks * inverse).round() * to_f16(largest / 127)).reshape(x.shape)


def to_q8_k(x: torch.Tensor) -> torch.Tensor:
    """Round to 8 bits in blocks of 256: the value of largest magnitude becomes -128."""
    blocks = x.reshape(-1, _Q8_K_BLOCK)
    extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    inverse = torch.where(extreme != 0, -128 / extreme, 0)
    numbers = (blocks * inverse).round().clamp(max=127)
    return torch.where(inverse != 0, numbers / inverse, 0).reshape(x.shape)
