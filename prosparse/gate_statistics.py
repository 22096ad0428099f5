"""How large the gates of active neurons are, and what a threshold would take from the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from prosparse.activation import Setting
from prosparse.measurement import ExchangeableModel, Measurement

Floats = npt.NDArray[np.float64]

_PER_OCTAVE = 32
_LOWEST, _HIGHEST = -24, 12
"""Powers of two between which gates are told apart."""

_BISECTIONS = 60
_PRICES = 1e-30, 1e6


@dataclass(frozen=True)
class GateStatistics:
    """Histograms over gates, which become cumulative: entry k tells of gates below `edges[k]`.

    Attributes:
        edges: (bins,) rising thresholds.
        counts: (n_layers, bins), active neurons that the threshold turns off, over all tokens.
        errors: (n_layers, bins), squared FFN output that goes with them, relative to the square of
            the residual stream and summed over tokens, as if neurons were orthogonal.
        active: (n_layers,) active neurons in all.
    """

    edges: Floats
    counts: Floats
    errors: Floats
    active: Floats

    def common(self, share: float) -> tuple[float, ...]:
        """Return the same threshold for every layer, that turns off `share` of active neurons."""
        counts = self.counts.sum(axis=0)
        at = int(np.searchsorted(counts, share * self.active.sum()))
        return (_tidy(self.edges[min(at, len(self.edges) - 1)]),) * len(self.active)

    def each(self, share: float) -> tuple[float, ...]:
        """Return a threshold for each layer, so that `share` of all active neurons is turned off.

        One price of an active neuron serves all layers: each takes the threshold at which error +
        price x active neurons is least, so the last neuron turned off costs the same everywhere.
        """
        low, high = map(np.log, _PRICES)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            at = self._cheapest(float(np.exp(middle)))
            taken = np.take_along_axis(self.counts, at[:, None], axis=1).sum()
            low, high = (low, middle) if taken >= share * self.active.sum() else (middle, high)
        return tuple(_tidy(self.edges[k]) for k in self._cheapest(float(np.exp(high))))

    def _cheapest(self, price: float) -> npt.NDArray[np.int64]:
        cheapest: npt.NDArray[np.int64] = np.argmin(self.errors - price * self.counts, axis=1)
        return cheapest


def _tidy(threshold: float) -> float:
    """Round to four digits, for people who read configs."""
    return float(f"{threshold:.4g}")


def gate_statistics(model: ExchangeableModel) -> tuple[Measurement, GateStatistics]:
    """Run all windows with ReLU and watch the gates.

    Args:
        model: a gated model.

    Returns:
        What ReLU does, and the statistics.
    """
    recorder = _GateRecorder(model)
    measured = model.measure(Setting(activation="relu"))
    return measured, recorder.finish()


class _GateRecorder:
    def __init__(self, model: ExchangeableModel) -> None:
        checkpoint, blocks = model.checkpoint, model.model.blocks
        architecture = checkpoint.architecture
        bins = (_HIGHEST - _LOWEST) * _PER_OCTAVE + 1
        self._sums = torch.zeros(2, len(blocks), bins, dtype=torch.float64)
        self._scale = self._gate = torch.empty(0)
        self._handles = []
        for layer, block in enumerate(blocks):
            down = checkpoint.layer_tensor(layer, architecture.ffn_down).float()
            squares = down.square().sum(dim=0).to(model.model.device)
            tap, out, entry = (
                block.get_submodule(path)
                for path in (
                    architecture.activation_taps[0],
                    architecture.ffn_output,
                    architecture.predictor_input,
                )
            )
            self._handles += [
                entry.register_forward_pre_hook(self._keep_scale),
                tap.register_forward_hook(self._keep_gate),
                out.register_forward_pre_hook(partial(self._add, layer, squares)),
            ]

    def _keep_scale(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._scale = args[0][0].float().square().sum(dim=-1, keepdim=True)

    def _keep_gate(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._gate = output[0].float()

    def _add(
        self,
        layer: int,
        squares: torch.Tensor,
        module: nn.Module,
        args: tuple[torch.Tensor, ...],
    ) -> None:
        active = self._gate > 0
        errors = args[0][0].float().square() * squares / self._scale.clamp_min(1e-30)
        place = ((self._gate[active].log2() - _LOWEST) * _PER_OCTAVE).floor().long()
        place = place.clamp(0, self._sums.shape[2] - 1).cpu()
        for kind, values in enumerate((torch.ones_like(errors), errors)):
            weights = values[active].double().cpu()
            self._sums[kind, layer] += torch.bincount(place, weights, minlength=self._sums.shape[2])

    def finish(self) -> GateStatistics:
        """Take the hooks away and sum up."""
        for handle in self._handles:
            handle.remove()
        counts, errors = self._sums.cumsum(dim=2).numpy()
        powers = _LOWEST + (np.arange(counts.shape[1]) + 1) / _PER_OCTAVE
        return GateStatistics(2.0**powers, counts, errors, counts[:, -1])
