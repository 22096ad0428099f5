"""The magnitude of an active neuron in one byte: a logarithmic code with eight steps an octave.

The magnitude |act(g)·u|, times the norm of the neuron's down column, is the norm of what the neuron
adds to the residual stream: its importance. Only the order of magnitude matters to training, so it
is stored as `round(8 · log2(magnitude)) + 160`, clipped to 0..255: 9e-7 to 3.7e3, within 4.5 %.
"""

from __future__ import annotations

import torch

_STEPS = 8.0
_ZERO = 160.0


def encode_magnitude(magnitude: torch.Tensor) -> torch.Tensor:
    """Encode float magnitudes (any shape, >= 0) as uint8 of the same shape."""
    code = torch.log2(magnitude.float().clamp_min(1e-30)) * _STEPS + _ZERO
    return code.round_().clamp_(0, 255).to(torch.uint8)


def decode_magnitude(code: torch.Tensor) -> torch.Tensor:
    """Return the float32 magnitudes of uint8 codes (any shape)."""
    return torch.exp2((code.float() - _ZERO) / _STEPS)
