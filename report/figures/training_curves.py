"""Curves of a training: sparsity against step, with the λ curve and held-out perplexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import DataError
from report.figures.style import GREY, INK, layer_key, line_styles, new_figure, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Log = Sequence[Mapping[str, Any]]

_FLOOR = 0.02
"""λ axis: linear up to this share of the largest λ, then logarithmic: the published λ begin at 0
and span two decades."""


def draw_training(out: Path, name: str, log: Log) -> list[Path]:
    """Write `training.png` and `training.svg`, the same bytes for the same log.

    Args:
        out: existing directory.
        name: of the run, for errors.
        log: lines, each with `step`, `stage`, `lambda`, the layers' `sparsity` and, where it was
            evaluated, `ppl`.

    Returns:
        The files.

    Raises:
        DataError: no line.
    """
    if not log:
        raise DataError(f"{name}: its log has no lines", "train at least one logged step")
    with style():
        return save(training_figure(log), out, "training")


def training_figure(log: Log) -> Figure:
    """Draw sparsity above, λ and perplexity below it, over the same steps."""
    figure = new_figure(7.2, 5.6)
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.2, 1.8))
    sparsity, factor, ppl = axes
    _sparsity(sparsity, log)
    factor.plot(*_points(log, "lambda"), color=INK)
    if evaluated := [entry for entry in log if "ppl" in entry]:
        ppl.plot(*_points(evaluated, "ppl"), marker="o", ms=3, color=INK)
    _factor_scale(factor, max(entry["lambda"] for entry in log))
    ppl.set_ylabel("Perplexity")
    ppl.set_xlabel("Step")
    _stages(axes, log)
    layer_key(figure, range(len(log[0]["sparsity"])))
    return figure


def _sparsity(axes: Axes, log: Log) -> None:
    """Draw each layer and their mean, from the training lines, from all if none trains."""
    lines = [entry for entry in log if "ppl" not in entry] or log
    steps, values = [e["step"] for e in lines], 100 * np.array([e["sparsity"] for e in lines])
    for column, line in zip(values.T, line_styles(values.shape[1]), strict=True):
        axes.plot(steps, column, **line)
    axes.plot(steps, values.mean(axis=1), color=INK, lw=2.2, label="mean")
    axes.set_ylabel("Activation sparsity, %")
    axes.legend(loc="lower right")


def _points(log: Log, key: str) -> tuple[list[int], list[float]]:
    return [entry["step"] for entry in log], [entry[key] for entry in log]


def _factor_scale(axes: Axes, largest: float) -> None:
    axes.set_ylabel("λ")
    if largest > 0:
        axes.set_yscale("symlog", linthresh=_FLOOR * largest)
    axes.set_ylim(bottom=0)


def _stages(axes: Sequence[Axes], log: Log) -> None:
    """Mark where a stage ends: between the last logged step of it and the first of the next."""
    for before, after in pairwise(log):
        if before["stage"] != after["stage"]:
            for panel in axes:
                panel.axvline((before["step"] + after["step"]) / 2, color=GREY, lw=0.7, ls=":")
