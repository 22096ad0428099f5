"""What crosses the link for each token, counted in PowerInfer's graph.

Source: PowerInfer@d3ebd7c llama.cpp:build_llama_variants, llm_build_ffn_sparse,
llm_build_sparse_mul_mat, llm_build_sparse_axpy, and ggml-cuda.cu:ggml_cuda_op_mul_mat and
ggml_cuda_op_flatten, which copy whatever operand or result is not where the operation runs. It was
read there, not run.
"""

from __future__ import annotations

from dataclasses import dataclass

from cost_model.model_bytes import FLOAT_BYTES, LayerBytes, LayerPlace


@dataclass(frozen=True)
class Crossing:
    """Copies over the link.

    Attributes:
        size: bytes of all of them.
        copies: their number.
    """

    size: float = 0.0
    copies: float = 0.0

    def __add__(self, other: Crossing) -> Crossing:
        """Return both."""
        return Crossing(self.size + other.size, self.copies + other.copies)


def vectors(length: float, copies: float = 1) -> Crossing:
    """Return `copies` copies of an F32 vector."""
    return Crossing(copies * length * FLOAT_BYTES, copies)


def layer_crossing(layer: LayerBytes, place: LayerPlace, d_model: int, kv: float) -> Crossing:
    """Return what one layer of the sparse graph copies for a token.

    Args:
        layer: its bytes.
        place: where they lie.
        d_model: hidden size.
        kv: share of the KV cache in VRAM.
    """
    if place.attention == 0:
        return Crossing()
    if place.attention < 1:
        # Some matrices here, some there: in and out of the GPU once.
        return vectors(d_model, 2)
    total = Crossing()
    if kv < 1:
        # Queries, keys and values leave for the cache, the attended values come back.
        total += vectors(d_model, 4)
    if layer.fc1 and not place.fc1:
        # ggml_cuda_mul_mat runs where the input lies, so the weights come over, token by token.
        total += Crossing(layer.fc1, 1) + vectors(layer.fc1 / (2 * d_model))
    if place.neurons == 1:
        return total
    # The FFN's norm is computed on the GPU, in two operations whose results belong to the CPU.
    total += vectors(d_model, 3)
    if place.fc2:
        total += vectors(layer.d_ff)  # the predictor's logits
    if place.neurons == 0:
        return total + vectors(d_model)  # the FFN's output goes to the residual
    inputs = 2 if layer.gated else 1
    # Gate and up: input to the GPU; both halves are added there, so the CPU's goes and the sum
    # comes. The activations go to the GPU's axpy, the CPU's half of its result to the sum.
    total += vectors(d_model, inputs) + vectors(layer.d_ff, 2 * inputs)
    total += vectors(layer.d_ff) + vectors(d_model)
    # The kernels read the logits of their rows where they lie, in the CPU's memory.
    return total + Crossing((inputs + 1) * place.neurons * layer.d_ff * FLOAT_BYTES, 0)
