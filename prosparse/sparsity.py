"""How sparse a model is and what perplexity it has, with its own activation and with others.

The document that `psp sparsity --json` prints, and the table, with the columns of the ProSparse
models' card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from architectures.checkpoint import Checkpoint
from common.errors import SparsityError
from common.table import table
from common.text_sources.names import recorded, shown
from prosparse.activation import Opened, Setting, has_one_gate, open_any, shifted
from prosparse.held_out import held_out_windows
from prosparse.measurement import ExchangeableModel, Measurement
from prosparse.settings import SparsityConfig

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class SparsityResult:
    """Measurements of a model.

    Attributes:
        config: what was asked for.
        own: the activation in the model's config.
        measured: the first is what gaps are relative to.
        tried: every measurement of the search of FATReLU's threshold.
        found: the one of them with the thresholds found; None if no search was asked for.
    """

    config: SparsityConfig
    own: Setting
    measured: tuple[Measurement, ...]
    tried: tuple[Measurement, ...] = ()
    found: Measurement | None = None

    @property
    def tokens(self) -> int:
        """Tokens run, BOS included."""
        losses = self.measured[0].losses
        return int(losses[:, 1].sum()) + len(losses)

    def document(self) -> dict[str, Any]:
        """Return it ready for JSON; docs/sparsity.md names the keys."""
        base = self.measured[0]
        document: dict[str, Any] = {
            "model": self.config.model,
            "data": recorded(self.config.data),
            "tokens": self.tokens,
            "windows": len(base.losses),
            "hidden_act": self.own.activation,
            "settings": [_row(each, base) for each in self.measured],
        }
        if self.found is not None:
            tried = [_row(each, base) for each in self.tried]
            document["search"] = search_facts(self.config, self.found) | {"tried": tried}
            if self.config.out is not None:
                document["out"] = str(self.config.out)
        return document


def search_facts(config: SparsityConfig, found: Measurement) -> dict[str, object]:
    """Return bound and outcome of a search, ready for JSON."""
    return {
        "max_ppl_gap": config.max_ppl_gap,
        "per_layer": config.per_layer,
        "thresholds": list(found.setting.thresholds),
    }


def layer_rows(sparsity: Sequence[float]) -> list[dict[str, float]]:
    """Return each layer's sparsity with its number, ready for JSON."""
    return [{"layer": layer, "activation_sparsity": value} for layer, value in enumerate(sparsity)]


def _row(measured: Measurement, base: Measurement) -> dict[str, object]:
    return {
        "setting": measured.setting.name,
        "thresholds": list(measured.setting.thresholds),
        "activation_sparsity": measured.mean_sparsity,
        "ppl": measured.ppl,
        "ppl_gap": measured.gap(base),
        "standard_error": measured.standard_error(base),
        "layers": layer_rows(measured.sparsity),
    }


def sparsity(config: SparsityConfig, note: Note = lambda line: None) -> SparsityResult:
    """Measure a model with its own activation, with ReLU and with FATReLU's thresholds.

    Raises:
        SparsityError: thresholds for a model in which FATReLU cannot stand.
        PspError: the model or the text cannot be used.
    """
    opened = open_any(config.model)
    settings = list(_settings(opened, config.thresholds))
    model = load(opened, config, note)
    measured = tuple(model.measure(setting) for setting in settings)
    return SparsityResult(config=config, own=opened.own, measured=measured)


def load(opened: Opened, config: SparsityConfig, note: Note) -> ExchangeableModel:
    """Load the model and the text, and say what a reader of the figures must know."""
    checkpoint, own = opened.checkpoint, opened.own
    for line in checkpoint.notes:
        note(line)
    if own.activation not in ("relu", "fatrelu", "drelu"):
        note(
            f"{own.name} is never exactly zero: its sparsity is 0, and relu and fatrelu below are "
            "untrained substitutions (psp sparsify trains them)"
        )
    data = (config.data, config.field, config.tokens, config.context)
    return ExchangeableModel(checkpoint, held_out_windows(checkpoint, *data, note), config.device)


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


def sparsity_table(result: SparsityResult) -> str:
    """Return one row a setting, one row a layer, and what they were measured on."""
    base = result.measured[0]
    rows = [
        [
            each.setting.name,
            f"{100 * each.mean_sparsity:.2f}",
            f"{each.ppl:.4f}",
            f"{100 * each.gap(base):+.3f}",
            f"{100 * each.standard_error(base):.3f}",
        ]
        for each in result.measured
    ]
    header = ["setting", "average sparsity %", "perplexity", "gap %", "± %"]
    return "\n\n".join([table(header, rows), _layers(result.measured), _told(result)])


def _layers(measured: Sequence[Measurement]) -> str:
    rows = [
        [str(layer), *(f"{100 * value:.2f}" for value in values)]
        for layer, values in enumerate(zip(*(each.sparsity for each in measured), strict=True))
    ]
    return table(["layer, sparsity %", *(each.setting.name for each in measured)], rows)


def _told(result: SparsityResult) -> str:
    config, base, last = result.config, result.measured[0], result.measured[-1]
    lines = [
        f"{result.tokens} tokens of {shown(config.data)}; gaps are to {base.setting.name}, ± their "
        "standard error"
    ]
    if result.found is not None:
        lines.append(f"found within a gap of {config.max_ppl_gap:.3%}: {last.setting.name}")
        if config.per_layer:
            thresholds = result.found.setting.thresholds
            lines.append("thresholds by layer: " + ", ".join(f"{t:g}" for t in thresholds))
        if config.out is not None:
            lines.append(f"written to {config.out}; the last row is measured from its files")
    return "\n".join(lines)
