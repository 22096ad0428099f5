"""Sizes of an output head and its predictor that PowerInfer's second engine takes.

Source: PowerInfer@d3ebd7c smallthinker/powerinfer/powerinfer-cpu/src/sparse_lmhead.cpp, and
smallthinker/ggml/src/ggml-cpu/ops.cpp:powerinfer_forward_lmhead, which counts in an int.
"""

from __future__ import annotations

D_MODEL_MULTIPLE = 128
"""Inputs are rounded in groups of four blocks (powerinfer_host_lmhead_q4_0_f32_impl)."""

VOCABULARY_MULTIPLE = 32
"""Rows are decided upon in groups of 32 (lmhead_profile)."""

RANK_MULTIPLE = 32
"""Hidden units are rounded in blocks of 32 (likewise)."""

MOST_NUMBERS = 2**31 - 1


def misfit(d_model: int, vocab_size: int, rank: int) -> str | None:
    """Return what of a predictor's sizes the engine cannot take, None if it takes them."""
    for name, size, multiple in (
        ("d_model", d_model, D_MODEL_MULTIPLE),
        ("the vocabulary", vocab_size, VOCABULARY_MULTIPLE),
        ("rank", rank, RANK_MULTIPLE),
    ):
        if size % multiple:
            return f"{name} {size} is no multiple of {multiple}"
    numbers = rank * (d_model + vocab_size)
    return None if numbers <= MOST_NUMBERS else f"{numbers} numbers are more than an int counts"
