"""Speed against the density of predictions, in one picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from common.plot_style import ACCENT, DARK, GREY, MIDDLE, new_figure

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "predicted": ("predicted neurons", {"color": DARK, "marker": "o", "linestyle": "-"}),
    "all_neurons": ("all neurons", {"color": MIDDLE, "marker": "s", "linestyle": "--"}),
    "dense": ("dense", {"color": GREY, "marker": "^", "linestyle": "-."}),
    "dense_llama_cpp": ("dense, llama.cpp", {"color": ACCENT, "marker": "D", "linestyle": ":"}),
}
"""Label and look of each arm; shape and dashes tell them apart without colour."""

_ESTIMATED: dict[str, Any] = {
    "linestyle": (0, (1, 2)),
    "linewidth": 1.0,
    "markerfacecolor": "none",
}

_HIDDEN = "_estimate: "
"""Begins the labels that are not for the legend, where matplotlib wants an underscore."""


def density_figure(document: Mapping[str, Any], width: float = 3.6) -> Figure:
    """Draw tokens per second against density: measured with quartiles, and estimated.

    All text in it is its own, none is the document's.

    Args:
        document: of kind `psp.density` with at least one point. Each has `density` (a share), and
            for every arm measured `tokens_per_second` and `quartiles`; `estimate`, if there is one,
            tokens per second by arm.
        width: inches.
    """
    figure = new_figure(width, 2.4 + 0.2 * width)
    axes = figure.subplots()
    for draw in (_measured, _estimated):
        for arm in _LINES:
            draw(axes, document["points"], arm)
    axes.set_xlim(0, 104)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Neurons predicted, %")
    axes.set_ylabel("Decoding, tokens/s")
    handles = [*axes.containers, *_estimate_key(axes)]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, handlelength=2.8)
    return figure


def _measured(axes: Axes, points: list[Mapping[str, Any]], arm: str) -> None:
    """Draw an arm's medians, and its quartiles as bars."""
    found = [(100 * point["density"], point[arm]) for point in points if point.get(arm)]
    if not found:
        return
    label, look = _LINES[arm]
    at = [density for density, _ in found]
    speeds = [speed["tokens_per_second"] for _, speed in found]
    below = [speed["tokens_per_second"] - speed["quartiles"][0] for _, speed in found]
    above = [speed["quartiles"][1] - speed["tokens_per_second"] for _, speed in found]
    axes.errorbar(at, speeds, [below, above], label=label, capsize=3, markersize=4.5, **look)


def _estimated(axes: Axes, points: list[Mapping[str, Any]], arm: str) -> None:
    """Draw what the bandwidths would allow: thin, with the arm's marks but hollow."""
    estimates = ((point["density"], (point.get("estimate") or {}).get(arm)) for point in points)
    found = [(100 * density, speed) for density, speed in estimates if speed is not None]
    if found:
        look = _LINES[arm][1] | _ESTIMATED
        axes.plot(*zip(*found, strict=True), label=f"{_HIDDEN}{arm}", markersize=4.5, **look)


def _estimate_key(axes: Axes) -> list[Artist]:
    """Return one entry for all estimates, if there are any."""
    from matplotlib.lines import Line2D

    if not any(str(line.get_label()).startswith(_HIDDEN) for line in axes.lines):
        return []
    look: dict[str, Any] = {"color": GREY, "marker": "o", "markersize": 4.5}
    return [Line2D([], [], label="estimate of each", **look | _ESTIMATED)]
