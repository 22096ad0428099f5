"""The L1 term: how large the FFNs' sparse intermediate outputs are.

Source: arXiv 2402.13516 §3.2, equation 2. For a token, the intermediate output of a gated FFN is
x₁ = act(gate(x)) ⊙ up(x), a vector of d_ff. The loss of layer i is λ·‖x₁‖₁, the losses of all
layers are summed, and the sum is added to the next-token loss. The paper leaves open how tokens are
pooled; here as in the next-token loss, by their mean:

    term = Σ_layers mean_tokens ‖x₁‖₁ / n,    loss = next-token loss + λ·term

with n = 1 under `sum`, the letter of equation 2, and n = d_ff under `mean`, the mean magnitude of a
neuron. The published λ (1e-3 to 2e-1) fit `mean`: see docs/sparsify.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn


class Watch:
    """What one forward pass showed.

    Attributes:
        terms: of each layer, the L1 term, float32 scalar that carries gradients.
        active: of each layer, the share of intermediate outputs that are not zero.
    """

    def __init__(self, layers: int) -> None:
        """Wait for so many layers."""
        self.terms: list[torch.Tensor | None] = [None] * layers
        self.active: list[torch.Tensor | None] = [None] * layers

    def term(self) -> torch.Tensor:
        """Return the term summed over layers."""
        return _stacked(self.terms).sum()

    def shares(self) -> torch.Tensor:
        """Return (layers,) float32 shares of active neurons."""
        return _stacked(self.active)


def _stacked(layers: Sequence[torch.Tensor | None]) -> torch.Tensor:
    seen = [value for value in layers if value is not None]
    assert len(seen) == len(layers), "a layer was not run"
    return torch.stack(seen)


class L1Regulariser:
    """Watches every FFN's intermediate output by a hook on the module that takes it.

    Under gradient checkpointing the hook runs again during the backward pass. It then does the same
    arithmetic, which checkpointing demands, and keeps nothing, because nobody watches. Only
    checkpointing without reentry lets gradients reach the term.
    """

    def __init__(self, blocks: Sequence[nn.Module], ffn_output: str, norm: str = "mean") -> None:
        """Set the hooks.

        Args:
            blocks: the model's blocks in order.
            ffn_output: path in a block of the module whose input is the intermediate output.
            norm: `mean` or `sum`, see above.
        """
        self.norm = norm
        self._layers = len(blocks)
        self._watch: Watch | None = None
        for layer, block in enumerate(blocks):
            module = block.get_submodule(ffn_output)
            module.register_forward_pre_hook(partial(self._see, layer))

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        """Yield what the forward pass inside the block shows."""
        self._watch = watch = Watch(self._layers)
        try:
            yield watch
        finally:
            self._watch = None

    def _see(self, layer: int, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        term, active = l1_term(args[0], self.norm), active_share(args[0])
        if self._watch is not None:
            self._watch.terms[layer] = term
            self._watch.active[layer] = active


def l1_term(intermediate: torch.Tensor, norm: str = "mean") -> torch.Tensor:
    """Return the L1 term of one layer, float32 whatever the type of its input.

    Args:
        intermediate: (..., d_ff) act(gate(x)) ⊙ up(x).
        norm: `sum`: mean over tokens of ‖x₁‖₁ (arXiv 2402.13516 equation 2); `mean`: that divided
            by d_ff.
    """
    count = intermediate.numel()
    if norm == "sum":
        count //= intermediate.shape[-1]
    return intermediate.abs().sum(dtype=torch.float32) / count


def active_share(intermediate: torch.Tensor) -> torch.Tensor:
    """Return the share of values of a tensor that are not zero, without gradients."""
    return torch.count_nonzero(intermediate.detach()) / intermediate.numel()
