"""Q4_0 blocks against gguf's own, and what folding does to them."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants

from common.rounding import (
    pack_q4_0,
    q4_scales,
    scale_q4_0,
    to_f16,
    to_q4_0,
    unpack_q4_0,
)


def parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = to_f16(q4_scales(x.reshape(-1, 32)))
    steps = (to_q4_0(x).reshape(-1, 32) / scales).round()
    return scales.reshape(len(x), -1), steps.reshape(x.shape)


def test_blocks_are_those_of_gguf() -> None:
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    theirs = quants.quantize(x.numpy(), GGMLQuantizationType.Q4_0)
    ours = pack_q4_0(*parts(x))
    np.testing.assert_array_equal(ours.numpy(), theirs)
    back = quants.dequantize(theirs, GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(unpack_q4_0(ours).numpy(), back)
    assert torch.equal(unpack_q4_0(ours), to_q4_0(x))


def test_a_row_is_scaled_by_its_scales_alone() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    stored = pack_q4_0(*parts(x))
    factors = torch.tensor([2.0, 0.25, 0.3])
    scaled = scale_q4_0(stored, factors)
    wanted = unpack_q4_0(stored) * factors[:, None]
    assert torch.equal(unpack_q4_0(scaled)[:2], wanted[:2]), "powers of two are exact"
    torch.testing.assert_close(unpack_q4_0(scaled), wanted, rtol=2**-11, atol=0)
    blocks, before = (rows.reshape(3, 2, 18)[:, :, 2:] for rows in (scaled, stored))
    assert torch.equal(blocks, before)
    zeros = unpack_q4_0(scale_q4_0(stored, torch.zeros(3)))
    assert not zeros.any()
