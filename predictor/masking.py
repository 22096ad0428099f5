"""Predictors in place in a runnable model: the neurons that they skip give zero.

As in PowerInfer@d3ebd7c llama.cpp:llm_build_ffn_sparse, which computes ReLU for FATReLU models:
their threshold rests while predictors mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from architectures.gated import FATReLU
from architectures.model import LoadedModel
from architectures.spec import Architecture
from predictor.module import Predictor, logits_of


class PredictorMasks:
    """The hooks by which predictors mask a model's neurons.

    Attributes:
        complete: while true, no active neuron is skipped: what remains is what ReLU in FATReLU's
            place changes, which is no fault of the predictors.
    """

    def __init__(self, model: LoadedModel, architecture: Architecture) -> None:
        """Hook a model; nothing is masked yet.

        Args:
            model: whose blocks are hooked; batches of any size may run through it.
            architecture: its family.
        """
        self.complete = False
        self._device = model.device
        self._predictors: Mapping[int, Predictor] = {}
        self._threshold = 0.0
        self._inputs: dict[int, torch.Tensor] = {}
        self._active: dict[int, torch.Tensor] = {}
        self._fatrelu: list[FATReLU] = []
        for layer, block in enumerate(model.blocks):
            tap = block.get_submodule(architecture.predictor_input)
            tap.register_forward_pre_hook(partial(self._keep, layer))
            output = block.get_submodule(architecture.ffn_output)
            output.register_forward_pre_hook(partial(self._mask, layer))
            for module in block.modules():
                if isinstance(module, FATReLU):
                    hook = partial(self._keep_active, layer, module.threshold)
                    module.register_forward_pre_hook(hook)
                    self._fatrelu.append(module)

    @property
    def fatrelu(self) -> bool:
        """Whether the model's own activation is FATReLU."""
        return bool(self._fatrelu)

    @contextmanager
    def placed(self, predictors: Mapping[int, Predictor], threshold: float) -> Iterator[None]:
        """Mask within the block.

        Args:
            predictors: layer number to predictor; other layers compute every neuron.
            threshold: neurons whose logit is below it are skipped.
        """
        device = torch.device(self._device)
        self._predictors = {n: each.on(device) for n, each in predictors.items()}
        self._threshold = threshold
        kept = [module.threshold for module in self._fatrelu]
        for module in self._fatrelu:
            module.threshold = 0.0
        try:
            yield
        finally:
            self._predictors, self._inputs, self._active = {}, {}, {}
            for module, own in zip(self._fatrelu, kept, strict=True):
                module.threshold = own

    def _keep(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        if layer in self._predictors:
            self._inputs[layer] = args[0]

    def _keep_active(
        self, layer: int, threshold: float, module: nn.Module, args: tuple[torch.Tensor, ...]
    ) -> None:
        if self.complete:
            self._active[layer] = args[0] >= threshold

    def _mask(
        self, layer: int, module: nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        if layer not in self._predictors:
            return None
        inputs = self._inputs.pop(layer).float()
        skipped = logits_of(self._predictors[layer], inputs) < self._threshold
        skipped = skipped.reshape(args[0].shape)
        if self.complete and layer in self._active:
            skipped &= ~self._active.pop(layer)
        return (args[0].masked_fill(skipped, 0),)
