"""What the inputs of predictors look like in a model's traces: constant, massive, sparse or not.

Prints one JSON line a layer, and a last one with the worst of all layers; draws `residuals.png` if
`--out` is given. Psp's recipe spends a unit on a direction in which inputs are nearly constant
(`predictor/training/coordinates.py`): here one sees whether a model has it.

    python -m benchmarks.residuals --traces DIR [--out DIR]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from benchmarks.shared import print_line
from predictor.traces.rows import ShardedRows, normalise_rms
from predictor.traces.store import TraceStore
from predictor.training.coordinates import whitening_of
from predictor.training.start import moments_of
from report.figures.style import ACCENT, DARK, LIGHT, MIDDLE, new_figure, save, style

_PART = 4096
_MASSIVE = 100.0
"""A component this many times the median magnitude of its layer is massive, and at least this
large (arXiv 2402.17762 §2 has 1000 and 100 for models of 7B and more)."""


@dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """What was seen of a layer's inputs.

    Attributes:
        layer: its number.
        rows: inputs seen.
        sparsity: share of neurons that were not active.
        constant: whether psp's recipe finds a direction in which inputs are nearly constant.
        deviation: standard deviation of the input along that direction, whose mean is 1; None
            where there is none.
        closed: share of inputs along it that are not above 0, for which its unit says nothing.
        centre: squared length of the mean input relative to the mean squared length, inputs scaled
            to unit root mean square.
        largest: largest magnitude of a component, as stored.
        median: median magnitude.
        massive: share of inputs that hold a component of `_MASSIVE` times the median and more.
    """

    layer: int
    rows: int
    sparsity: float
    constant: bool
    deviation: float | None
    closed: float | None
    centre: float
    largest: float
    median: float
    massive: float


def look(layer: int, rows: ShardedRows, d_ff: int) -> LayerInputs:
    """Measure the inputs of one layer in two passes."""
    moments = moments_of(normalise_rms(part) for part in _parts(rows))
    whitening = whitening_of(moments)
    median = float(torch.cat([part.abs().median()[None] for part in _parts(rows)]).median())
    largest, massive = 0.0, 0
    along = []
    for part in _parts(rows):
        peaks = part.abs().amax(dim=1)
        largest = max(largest, float(peaks.max()))
        massive += int((peaks >= max(_MASSIVE * median, _MASSIVE)).sum())
        if whitening is not None:
            along.append(normalise_rms(part).double() @ whitening.direction)
    steady = torch.cat(along) if along else None
    return LayerInputs(
        layer=layer,
        rows=len(rows),
        sparsity=1 - float(rows.counts.sum()) / (len(rows) * d_ff),
        constant=whitening is not None,
        deviation=None if steady is None else float(steady.std()),
        closed=None if steady is None else float((steady <= 0).double().mean()),
        centre=float(moments.mean.square().sum() / moments.second.diagonal().sum()),
        largest=largest,
        median=median,
        massive=massive / len(rows),
    )


def _parts(rows: ShardedRows) -> Iterator[torch.Tensor]:
    for index in torch.split(torch.arange(len(rows)), _PART):
        yield rows.inputs_at(index)


def draw(layers: list[LayerInputs], out: Path) -> list[Path]:
    """Draw sparsity, the constant direction and the largest components by layer."""
    numbers = [each.layer for each in layers]
    with style():
        figure = new_figure(7.2, 5.4)
        sparsity, steady, largest = figure.subplots(3, sharex=True)
        sparsity.bar(numbers, [100 * each.sparsity for each in layers], color=MIDDLE)
        sparsity.set_ylabel("Activation\nsparsity, %")
        sparsity.set_ylim(0, 100)
        known = [each for each in layers if each.deviation is not None]
        deviations = [each.deviation or 0.0 for each in known]
        steady.bar([each.layer for each in known], deviations, color=DARK)
        steady.set_ylabel("Deviation along the\nconstant direction")
        for each in layers:
            if each.deviation is None:
                steady.annotate("none", (each.layer, 0), ha="center", color=ACCENT, rotation=90)
        largest.semilogy(numbers, [each.largest for each in layers], color=ACCENT, label="largest")
        largest.semilogy(numbers, [each.median for each in layers], color=LIGHT, label="median")
        largest.set_ylabel("Magnitude of\na component")
        largest.set_xlabel("Layer")
        largest.legend(loc="center right")
        out.mkdir(parents=True, exist_ok=True)
        return save(figure, out, "residuals")


@click.command()
@click.option("--traces", required=True, type=click.Path(path_type=Path), help="Trace store.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory for the picture.")
def main(traces: Path, out: Path | None) -> None:
    """Look at the inputs of every layer."""
    store = TraceStore.open(traces)
    store.require_complete()
    layers = []
    for layer in store.header.layers:
        layers.append(look(layer, store.layer(layer), store.header.d_ff))
        print_line(asdict(layers[-1]))
    known = [each.deviation for each in layers if each.deviation is not None]
    summary = {
        "layers": len(layers),
        "sparsity": sum(each.sparsity for each in layers) / len(layers),
        "without_constant": [each.layer for each in layers if not each.constant],
        "deviation": max(known, default=None),
        "closed": max((each.closed for each in layers if each.closed is not None), default=None),
        "largest": max(each.largest for each in layers),
        "massive_layers": [each.layer for each in layers if each.massive],
    }
    files = [] if out is None else [str(file) for file in draw(layers, out)]
    print_line({**summary, "files": files})


if __name__ == "__main__":
    main()
