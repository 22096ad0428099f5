"""Curves of training: sparsity against step, with the λ curve and held-out perplexity.

The lines drawn are those of a training log, one run or several to compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import DataError
from report.figures.style import GREY, INK, Look, layer_key, line_styles, new_figure, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Log = Sequence[Mapping[str, Any]]

_FLOOR = 0.02
"""λ axis: linear up to this share of the largest λ, then logarithmic: the published λ begin at 0
and span two decades."""


def draw_training(out: Path, runs: Mapping[str, Log]) -> list[Path]:
    """Write `training.png` and `training.svg`, the same bytes for the same logs.

    Args:
        out: existing directory.
        runs: name to lines of a log, each with `step`, `stage`, `lambda`, the layers' `sparsity`
            and, where it was evaluated, `ppl`; a single run is drawn layer by layer.

    Returns:
        The files.

    Raises:
        DataError: no run, or one without a line.
    """
    for name, log in runs.items():
        if not log:
            raise DataError(f"{name}: its log has no lines", "train at least one logged step")
    if not runs:
        raise DataError("no training log to plot", "pass at least one")
    with style():
        return save(training_figure(runs), out, "training")


def training_figure(runs: Mapping[str, Log]) -> Figure:
    """Draw sparsity above, λ and perplexity below it, over the same steps."""
    figure = new_figure(7.2, 5.6)
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.2, 1.8))
    sparsity, factor, ppl = axes
    _sparsity(sparsity, runs)
    for line, log in zip(_run_styles(len(runs)), runs.values(), strict=True):
        factor.plot(*_points(log, "lambda"), **line)
        if evaluated := [entry for entry in log if "ppl" in entry]:
            ppl.plot(*_points(evaluated, "ppl"), marker="o", ms=3, **line)
    _factor_scale(factor)
    ppl.set_ylabel("Perplexity")
    ppl.set_xlabel("Step")
    _stages(axes, next(iter(runs.values())))
    if len(runs) == 1:
        layer_key(figure, range(len(next(iter(runs.values()))[0]["sparsity"])))
    return figure


def _run_styles(count: int) -> list[Look]:
    """Return a style for each run: black where colours stand for layers."""
    return line_styles(count) if count > 1 else [{"color": INK}]


def _sparsity(axes: Axes, runs: Mapping[str, Log]) -> None:
    """Draw the mean of each run; of a single one its layers too."""
    means = {name: _trained(log) for name, log in runs.items()}
    if len(runs) == 1:
        (steps, values) = next(iter(means.values()))
        for column, line in zip(values.T, line_styles(values.shape[1]), strict=True):
            axes.plot(steps, column, **line)
        axes.plot(steps, values.mean(axis=1), color=INK, lw=2.2, label="mean")
    else:
        for (name, (steps, values)), line in zip(
            means.items(), _run_styles(len(means)), strict=True
        ):
            axes.plot(steps, values.mean(axis=1), label=name, **line)
    axes.set_ylabel("Activation sparsity, %")
    axes.legend(loc="lower right")


def _trained(log: Log) -> tuple[Any, Any]:
    """Return steps and (steps, layers) per cent of the training lines, all lines if none trains."""
    lines = [entry for entry in log if "ppl" not in entry] or log
    return [e["step"] for e in lines], 100 * np.array([e["sparsity"] for e in lines])


def _points(log: Log, key: str) -> tuple[list[int], list[float]]:
    return [entry["step"] for entry in log], [entry[key] for entry in log]


def _factor_scale(axes: Axes) -> None:
    axes.set_ylabel("λ")
    values = [np.asarray(line.get_ydata(), float).max() for line in axes.get_lines()]
    largest = float(max(values, default=0.0))
    if largest > 0:
        axes.set_yscale("symlog", linthresh=_FLOOR * largest)
    axes.set_ylim(bottom=0)


def _stages(axes: Sequence[Axes], log: Log) -> None:
    """Mark where a stage ends: between the last logged step of it and the first of the next."""
    for before, after in pairwise(log):
        if before["stage"] != after["stage"]:
            for panel in axes:
                panel.axvline((before["step"] + after["step"]) / 2, color=GREY, lw=0.7, ls=":")
