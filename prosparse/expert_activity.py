"""How active the gates of a mixture's experts are, and how a router spreads tokens over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from architectures.checkpoint import Checkpoint, open_source
from architectures.model import LoadedModel, choose_device, load_model
from architectures.registry import mixture_of
from common.errors import SparsityError
from common.table import table
from common.text_sources.names import recorded, shown
from prosparse.held_out import held_out_windows
from prosparse.measurement import perplexity, window_losses
from prosparse.settings import SparsityConfig

_COLUMNS = 16
"""More experts than this are not told one by one in a table."""


@dataclass(frozen=True, kw_only=True)
class ExpertActivity:
    """What the experts of a model did on text.

    Attributes:
        config: what was asked for.
        d_ff: neurons of an expert.
        active: (n_layers, n_experts) float64, neurons whose gate is above zero, over all tokens
            that the expert got.
        tokens: (n_layers, n_experts) float64, tokens that it got.
        losses: see `measurement.Measurement`.
    """

    config: SparsityConfig
    d_ff: int
    active: torch.Tensor
    tokens: torch.Tensor
    losses: torch.Tensor

    @property
    def ppl(self) -> float:
        """Perplexity, as of any other model."""
        return perplexity(self.losses)

    @property
    def run(self) -> int:
        """Tokens run, BOS included."""
        return int(self.losses[:, 1].sum()) + len(self.losses)

    @property
    def layers(self) -> torch.Tensor:
        """Sparsity of each layer, among the neurons of the experts that tokens got, (n_layers,)."""
        return 1 - self.active.sum(1) / (self.tokens.sum(1) * self.d_ff)

    @property
    def experts(self) -> torch.Tensor:
        """Sparsity of each expert, (n_layers, n_experts); NaN for one that got no token."""
        return 1 - self.active / (self.tokens * self.d_ff)

    @property
    def mean(self) -> float:
        """Mean sparsity over layers."""
        return float(self.layers.mean())

    def document(self) -> dict[str, Any]:
        """Return it ready for JSON; docs/sparsity.md names the keys."""
        measured = {
            "setting": "relu",
            "thresholds": [],
            "activation_sparsity": self.mean,
            "ppl": self.ppl,
            "ppl_gap": 0.0,
            "standard_error": 0.0,
            "layers": [self._layer(number) for number in range(len(self.active))],
        }
        return {
            "model": self.config.model,
            "data": recorded(self.config.data),
            "tokens": self.run,
            "windows": len(self.losses),
            "hidden_act": "relu",
            "settings": [measured],
        }

    def _layer(self, layer: int) -> dict[str, Any]:
        rows = zip(self.tokens[layer].tolist(), self.experts[layer].tolist(), strict=True)
        experts = [
            {
                "expert": number,
                "tokens": int(tokens),
                "activation_sparsity": sparsity if tokens else None,
            }
            for number, (tokens, sparsity) in enumerate(rows)
        ]
        sparsity = float(self.layers[layer])
        return {"layer": layer, "activation_sparsity": sparsity, "experts": experts}


def is_mixture(model: str) -> bool:
    """Tell whether a model is a mixture of experts.

    Raises:
        CheckpointError: it is not there or has no config.
    """
    return mixture_of(open_source(model).config) is not None


def expert_activity(
    config: SparsityConfig, note: Callable[[str], None] = lambda line: None
) -> ExpertActivity:
    """Run text and count, of every expert, tokens and active neurons.

    Raises:
        SparsityError: thresholds were asked for.
        PspError: the model or the text cannot be used.
    """
    if config.thresholds or config.max_ppl_gap is not None or config.out is not None:
        raise SparsityError(
            f"{config.model}: is a mixture of experts, whose engines know no threshold",
            "measure it without --thresholds, --max-ppl-gap and --out",
        )
    checkpoint = Checkpoint.open(config.model, experts=True)
    for line in checkpoint.notes:
        note(line)
    data = (config.data, config.field, config.tokens, config.context)
    windows = held_out_windows(checkpoint, *data, note)
    device = choose_device(config.device)
    dtype = torch.float32 if device == "cpu" else checkpoint.dtype
    model = load_model(checkpoint, dtype=dtype, device=device)
    counts = _Counts(checkpoint, model)
    losses = window_losses(checkpoint, model, windows, "experts")
    active, tokens = counts.sums
    return ExpertActivity(
        config=config, d_ff=checkpoint.shape.d_ff, active=active, tokens=tokens, losses=losses
    )


class _Counts:
    """Hooks on every expert's gate: active neurons and tokens, (2, n_layers, n_experts)."""

    def __init__(self, checkpoint: Checkpoint, model: LoadedModel) -> None:
        assert checkpoint.shape.experts is not None
        count, (tap,) = checkpoint.shape.experts.count, checkpoint.architecture.activation_taps
        self.sums = torch.zeros(2, len(model.blocks), count, dtype=torch.float64)
        for layer, block in enumerate(model.blocks):
            for expert in range(count):
                gate = block.get_submodule(tap.format(expert=expert))
                gate.register_forward_hook(partial(self._add, layer, expert))

    def _add(
        self, layer: int, expert: int, module: nn.Module, args: Any, output: torch.Tensor
    ) -> None:
        self.sums[0, layer, expert] += int((output > 0).count_nonzero())
        self.sums[1, layer, expert] += len(output)


def activity_table(found: ExpertActivity) -> str:
    """Return one row a layer, one column an expert where there are few, and what was measured."""
    parts = [_layer_table(found)]
    if found.tokens.shape[1] <= _COLUMNS:
        parts += [_expert_table(found)]
    return "\n\n".join([*parts, _told(found)])


def _layer_table(found: ExpertActivity) -> str:
    header = ["layer", "sparsity %", "least %", "most %", "tokens, least", "most", "experts unused"]
    rows = []
    for layer, (tokens, experts) in enumerate(zip(found.tokens, found.experts, strict=True)):
        used = experts[tokens > 0]
        rows.append(
            [
                str(layer),
                f"{100 * float(found.layers[layer]):.2f}",
                *(f"{100 * float(value):.2f}" for value in (used.min(), used.max())),
                *(f"{float(value / tokens.sum()):.1%}" for value in (tokens.min(), tokens.max())),
                str(int((tokens == 0).sum())),
            ]
        )
    return table(header, rows)


def _expert_table(found: ExpertActivity) -> str:
    rows = [
        [str(layer), *("–" if value != value else f"{100 * value:.2f}" for value in row)]
        for layer, row in enumerate(found.experts.tolist())
    ]
    count = found.tokens.shape[1]
    return table(["layer, sparsity % by expert", *map(str, range(count))], rows)


def _told(found: ExpertActivity) -> str:
    lines = [
        f"{found.run} tokens of {shown(found.config.data)}: perplexity {found.ppl:.4f}, average "
        f"sparsity {found.mean:.2%}",
        "sparsity is among the neurons of the experts that a token got; least and most are those "
        "of one expert, tokens its share of all that a layer gave away",
    ]
    if found.tokens.shape[1] > _COLUMNS:
        lines.append("--json tells of every expert")
    return "\n".join(lines)
