"""Dense layers: their FFN is computed whole, because a predictor is not worth its bytes there.

PowerInfer's loader wants a predictor of every layer (llama.cpp:llm_load_sparse_model_tensors), so
these get the least one that lets every neuron through. Its units come in pairs of opposite rows,
and fc2 holds one positive number: logits are that number times Σ|w·x| over the pairs. They are
never below 0, whatever x is, and above 0 unless x is orthogonal to every w at once, so far that
the file's threshold may have any sign. The rows w are drawn once and for all: none of a model's
directions, such as one that pruning left empty, is theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from common.element_types import ELEMENT_TYPES, F16
from common.rounding import BLOCK, pack_q4_0
from predictor.size import Size
from predictor.stored import LayerPredictor

_STEPS = 7
"""Rows hold whole numbers from 1 to this, of either sign, times a power of two: exact in any type,
and no coordinate of an input escapes."""

_GAIN = 4096.0
"""fc2 holds `_STEPS` times this, which a float16 can hold."""

_REMEDY = "allow more, collect more --tokens, or make the model sparser: psp sparsify"


def least_size(kinds: Iterable[str]) -> Size:
    """Return the fewest bytes in which a layer is computed whole, of some types."""
    smallest = (Size(kind, ELEMENT_TYPES[kind].row_multiple) for kind in kinds)
    return min(smallest, key=lambda size: ELEMENT_TYPES[size.kind].width * size.rank)


def least_predictor(size: Size, d_model: int, d_ff: int, tokens: int) -> LayerPredictor:
    """Return the predictor of a dense layer.

    Args:
        size: of `least_size`.
        d_model: hidden size.
        d_ff: neurons.
        tokens: on which all of them were computed: none is hotter than another.
    """
    generator = torch.Generator().manual_seed(0)
    shape = size.rank // 2, d_model
    drawn = torch.randint(1, _STEPS + 1, shape, generator=generator)
    drawn *= 2 * torch.randint(2, shape, generator=generator) - 1
    steps = torch.stack([drawn, -drawn], dim=1).reshape(size.rank, d_model)
    # Rows of about norm 1 keep hidden units within float16 for every residual that is.
    spread = math.sqrt((_STEPS + 1) * (2 * _STEPS + 1) / 6 * d_model)
    unit = 2.0 ** -round(math.log2(spread))
    counts = torch.full((d_ff,), tokens, dtype=torch.int64)
    if size.kind == F16:
        fc2 = torch.full((d_ff, size.rank), _STEPS * _GAIN).half()
        return LayerPredictor((steps * unit).half(), fc2, counts)
    fc1 = pack_q4_0(torch.full((size.rank, d_model // BLOCK), unit), steps)
    gains = torch.full((d_ff, size.rank // BLOCK), _GAIN)
    return LayerPredictor(fc1, pack_q4_0(gains, torch.full((d_ff, size.rank), _STEPS)), counts)


def dense_metrics(activation_sparsity: float, least: float) -> dict[str, float]:
    """Return the metrics of a dense layer, see `common.decisions.DecisionCounts.metrics`.

    Args:
        activation_sparsity: of the layer.
        least: bytes of the least predictor relative to the FFN.
    """
    return {
        "activation_sparsity": activation_sparsity,
        "activation_recall": 1.0,
        "precision": 1 - activation_sparsity,
        "predicted_sparsity": 0.0,
        "ffn_bytes_ratio": 1 + least,
    }


def worth_line(ratios: Mapping[int, float], dense: Mapping[int, float]) -> str:
    """Say in which layers a predictor is worth its bytes.

    Args:
        ratios: layer number to FFN bytes ratio, of all layers.
        dense: those of them that are dense, to what the ratio is with a predictor.
    """
    worth = {layer: ratio for layer, ratio in ratios.items() if layer not in dense}
    read = f"{_range(worth)} of the FFN's bytes" if worth else _REMEDY
    if not dense:
        return f"worth a predictor: all {len(worth)} layers ({read})"
    least, with_predictors = _range({n: ratios[n] for n in dense}), _range(dense)
    return (
        f"worth a predictor: {len(worth)} of {len(ratios)} layers ({read}); computed whole: "
        f"{', '.join(map(str, sorted(dense)))} ({least}, with a predictor {with_predictors})"
    )


def _range(ratios: Mapping[int, float]) -> str:
    low, high = (f"{ends(ratios.values()):.3f}" for ends in (min, max))
    return low if low == high else f"{low} to {high}"
