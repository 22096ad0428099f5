"""How sparse a model is and what perplexity it has, with its own activation and with others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from architectures.checkpoint import Checkpoint, locate
from architectures.registry import resolve
from common.errors import CheckpointError
from common.files import read_json
from prosparse.activation import open_as
from prosparse.held_out import held_out_windows
from prosparse.measurement import ExchangeableModel, Measurement, Setting, has_one_gate, shifted
from prosparse.settings import SparsityConfig, SparsityError

Note = Callable[[str], None]


@dataclass(frozen=True)
class Opened:
    """A checkpoint that may have any activation.

    Attributes:
        checkpoint: opened with ReLU where the FFN has one gate.
        own: the activation that its config names.
    """

    checkpoint: Checkpoint
    own: Setting

    @property
    def base(self) -> Setting:
        """What perplexity gaps are relative to: its own activation, without a threshold."""
        return shifted((0.0,)) if self.own.activation == "fatrelu" else self.own


def open_any(model: str) -> Opened:
    """Open a checkpoint of any supported family, SiLU ones included.

    Raises:
        CheckpointError: an unsupported family or a damaged checkpoint.
    """
    path = locate(model)
    config = read_json(path / "config.json", CheckpointError, "pass a Hugging Face model directory")
    name = config.get("hidden_act")
    if name in ("relu", "fatrelu", "drelu") or resolve(config).ffn_matrices != 3:
        shape = (checkpoint := Checkpoint.open(path)).shape
        if not has_one_gate(checkpoint):
            return Opened(checkpoint, Setting(activation=shape.activation))
        own = shifted((shape.activation_threshold,) * shape.n_layers)
    else:
        own = Setting(activation=str(name))
    return Opened(open_as(str(path), "relu"), own)


def sparsity(config: SparsityConfig, note: Note = lambda line: None) -> dict[str, Any]:
    """Measure a model with its own activation, with ReLU and with FATReLU's thresholds.

    Returns:
        The document that `psp sparsity --json` prints: docs/sparsity.md names its keys.

    Raises:
        SparsityError: thresholds for a model in which FATReLU cannot stand.
        PspError: the model or the text cannot be used.
    """
    opened = open_any(config.model)
    settings = list(_settings(opened, config.thresholds))
    model = load(opened, config, note)
    measured = [model.measure(setting) for setting in settings]
    return document(config, opened, measured)


def load(opened: Opened, config: SparsityConfig, note: Note) -> ExchangeableModel:
    """Load the model and the text, and say what a reader of the figures must know."""
    checkpoint, own = opened.checkpoint, opened.own
    if own.activation not in ("relu", "fatrelu", "drelu"):
        note(
            f"{own.name} is never exactly zero: its sparsity is 0, and relu and fatrelu below are "
            "untrained substitutions (psp sparsify trains them)"
        )
    data = (config.data, config.field, config.tokens, config.context)
    return ExchangeableModel(checkpoint, held_out_windows(checkpoint, *data), config.device)


def _settings(opened: Opened, thresholds: Sequence[float]) -> Iterator[Setting]:
    """Yield what to measure, each once: the base, the model's own, ReLU, then thresholds."""
    wanted = [opened.base, opened.own]
    if has_one_gate(opened.checkpoint):
        layers = opened.checkpoint.shape.n_layers
        wanted += [shifted((threshold,) * layers) for threshold in (0.0, *sorted(thresholds))]
    elif thresholds:
        refuse_fatrelu(opened.checkpoint)
    yield from dict.fromkeys(wanted)


def refuse_fatrelu(checkpoint: Checkpoint) -> None:
    """Refuse thresholds for a model without an FFN of the form down(act(gate) * up).

    Raises:
        SparsityError: always.
    """
    raise SparsityError(
        f"{checkpoint.path}: FATReLU needs an FFN with one gated activation, family "
        f"{checkpoint.architecture.name} computes {checkpoint.shape.activation} "
        "without one",
        "measure it without thresholds",
    )


def document(
    config: SparsityConfig, opened: Opened, measured: Sequence[Measurement]
) -> dict[str, Any]:
    """Return measurements ready for JSON; the first is what gaps are relative to."""
    base = measured[0]
    return {
        "model": config.model,
        "data": config.data,
        "tokens": int(base.losses[:, 1].sum()) + len(base.losses),
        "windows": len(base.losses),
        "hidden_act": opened.own.activation,
        "settings": [row(measurement, base) for measurement in measured],
    }


def row(measured: Measurement, base: Measurement) -> dict[str, Any]:
    """Return what one setting does, ready for JSON."""
    return {
        "setting": measured.setting.name,
        "thresholds": list(measured.setting.thresholds),
        "activation_sparsity": measured.mean_sparsity,
        "ppl": measured.ppl,
        "ppl_gap": measured.gap(base),
        "standard_error": measured.standard_error(base),
        "layers": [
            {"layer": layer, "activation_sparsity": value}
            for layer, value in enumerate(measured.sparsity)
        ],
    }
