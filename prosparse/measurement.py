"""A model whose activation can be exchanged, and what it does on text with each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from architectures.checkpoint import Checkpoint
from architectures.model import LoadedModel, choose_device, load_model
from architectures.windows import growth_error
from common.errors import CheckpointError
from prosparse.activation import Setting, exchange, has_one_gate


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a model does on text.

    Attributes:
        setting: its activation.
        sparsity: of each layer, 1 − mean share of active neurons, over all tokens.
        losses: (windows, 2) float64: sum of negative log-likelihoods, and how many.
    """

    setting: Setting
    sparsity: tuple[float, ...]
    losses: torch.Tensor

    @property
    def mean_sparsity(self) -> float:
        """Mean over layers."""
        return sum(self.sparsity) / len(self.sparsity)

    @property
    def ppl(self) -> float:
        """Perplexity: exp of the mean negative log-likelihood of all tokens but first ones."""
        return perplexity(self.losses)

    def gap(self, base: Measurement) -> float:
        """Growth of the perplexity over that of `base`, a fraction."""
        return self.ppl / base.ppl - 1

    def standard_error(self, base: Measurement) -> float:
        """Standard error of the logarithm of that growth, told by how windows differ."""
        growths, tokens = self.losses[:, 0] - base.losses[:, 0], self.losses[:, 1]
        return growth_error(growths, tokens, growths.sum() / tokens.sum())


def perplexity(losses: torch.Tensor) -> float:
    """Return exp of the mean negative log-likelihood of `window_losses`."""
    total, count = losses.sum(0).tolist()
    try:
        return math.exp(total / count)
    except OverflowError:
        return math.inf


def window_losses(
    checkpoint: Checkpoint, model: LoadedModel, windows: Sequence[Sequence[int]], name: str
) -> torch.Tensor:
    """Run windows and return (windows, 2) float64, as `Measurement.losses`.

    Args:
        checkpoint: what the model was loaded from.
        model: it.
        windows: token ids, each window by itself.
        name: what is measured, for the progress bar and messages.

    Raises:
        CheckpointError: the model's numbers overflow.
    """
    bar = tqdm(windows, unit="window", desc=name, disable=None)
    losses = torch.tensor([_loss(model, window) for window in bar], dtype=torch.float64)
    if not torch.isfinite(losses).all():
        checkpoint.check_numbers()  # the cause, if it is there
        raise CheckpointError(
            f"{checkpoint.path}: with {name} the loss is no finite number",
            "check the weights, or pass --device cpu, which computes in float32",
        )
    return losses


def _loss(model: LoadedModel, window: Sequence[int]) -> tuple[float, float]:
    tokens = torch.tensor([window])
    logits = model.logits(tokens)[0, :-1].float()
    loss = cross_entropy(logits, tokens[0, 1:].to(logits.device), reduction="none")
    return float(loss.double().sum()), float(len(loss))


class ExchangeableModel:
    """A loaded model that runs windows with one activation after another."""

    def __init__(
        self, checkpoint: Checkpoint, windows: Sequence[Sequence[int]], device: str
    ) -> None:
        """Load the model.

        Args:
            checkpoint: the model; one that is not sparse yet is opened by `open_with_relu`.
            windows: token ids, each window by itself.
            device: torch device; on the CPU the model runs in float32.

        Raises:
            CheckpointError: the device is not there or too small.
        """
        device = choose_device(device)
        dtype = torch.float32 if device == "cpu" else checkpoint.dtype
        self.checkpoint, self._windows = checkpoint, windows
        self.model = load_model(checkpoint, dtype=dtype, device=device)
        self._setting = Setting(activation=checkpoint.shape.activation)
        self._passing: torch.Tensor | None = None
        self._active = torch.zeros(checkpoint.shape.n_layers, dtype=torch.float64)
        architecture = checkpoint.architecture
        for layer, block in enumerate(self.model.blocks):
            for tap in architecture.activation_taps:
                block.get_submodule(tap).register_forward_hook(partial(self._tap, layer))
            output = block.get_submodule(architecture.ffn_output)
            output.register_forward_pre_hook(partial(self._count, layer))

    def measure(self, setting: Setting) -> Measurement:
        """Run all windows.

        Raises:
            CheckpointError: the model's numbers overflow.
        """
        self._exchange(setting)
        self._active.zero_()
        losses = window_losses(self.checkpoint, self.model, self._windows, setting.name)
        share = self._active / (sum(map(len, self._windows)) * self.checkpoint.shape.d_ff)
        return Measurement(setting=setting, sparsity=tuple((1 - share).tolist()), losses=losses)

    def _exchange(self, setting: Setting) -> None:
        self._setting = setting
        if has_one_gate(self.checkpoint):
            exchange(self.model.blocks, setting.activation, setting.thresholds)
        else:
            assert setting.activation == self.checkpoint.shape.activation

    def _tap(self, layer: int, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        passing = self._passes(layer, output)
        self._passing = passing if self._passing is None else self._passing & passing

    def _passes(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        """Return where the activation's output is not zero."""
        from transformers.activations import ACT2FN

        if self._setting.thresholds:
            return values >= self._setting.thresholds[layer]
        if self._setting.activation in ("relu", "drelu"):
            return values > 0
        output: torch.Tensor = ACT2FN[self._setting.activation](values)
        return output != 0

    def _count(self, layer: int, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert self._passing is not None
        self._active[layer] += int(self._passing.count_nonzero())
        self._passing = None
