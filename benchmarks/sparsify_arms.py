"""Arms of `benchmarks/sparsify.py` compared: means over seeds, equal sparsity, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.plot_style import ACCENT, DARK, GREY, MIDDLE, new_figure, style
from prosparse.journal import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Groups = dict[tuple[str, float], list[Row]]

_COLOURS = {"silu": GREY, "relu": DARK, "fixed": ACCENT, "progressive": MIDDLE}
_MARKERS = {"silu": "x", "relu": "D", "fixed": "s", "progressive": "o"}
_DASHES: tuple[Any, ...] = (":", "--", "-", "-.")


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Return what arms come to over all seeds, ready for JSON.

    Args:
        rows: one an arm, λ and seed, with `arm`, `lambda`, `seed`, `activation_sparsity`, `ppl`.

    Returns:
        Under `arms` an entry an arm and λ, its perplexity gap to `silu` of the same seed; under
        `equal_sparsity` what `at_equal_sparsity` finds. `mean` is over seeds, `spread` the sample
        standard deviation, None for a single seed.
    """
    found: list[dict[str, Any]] = []
    for (arm, factor), runs in _groups(rows).items():
        entry: dict[str, Any] = {"arm": arm, "lambda": factor, "seeds": [r["seed"] for r in runs]}
        for key in ("activation_sparsity", "ppl"):
            entry[key] = _spread([run[key] for run in runs])
        gaps = [_gap(run, rows) for run in runs]
        entry["ppl_gap"] = None if None in gaps else _spread([g for g in gaps if g is not None])
        found.append(entry)
    return {"arms": found, "equal_sparsity": at_equal_sparsity(rows)}


def at_equal_sparsity(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Compare progressive λ with fixed λ where both are equally sparse.

    Of every seed and progressive run, the perplexity that fixed λ has at the run's sparsity is
    interpolated between fixed runs of that seed, the logarithm of perplexity over the logarithm of
    the share of active neurons. Nothing is extrapolated.

    Returns:
        For each λ of the progressive arm: mean sparsity, and the growth of perplexity over that of
        fixed λ (negative: progressive is better), of the seeds that could be compared.
    """
    entries = []
    for (arm, factor), runs in _groups(rows).items():
        growths = {r["seed"]: _growth(r, rows) for r in runs} if arm == "progressive" else {}
        known = {seed: growth for seed, growth in growths.items() if growth is not None}
        if known:
            sparsity = [r["activation_sparsity"] for r in runs if r["seed"] in known]
            entry: dict[str, Any] = {"lambda": factor, "seeds": list(known)}
            entry["activation_sparsity"] = _spread(sparsity)
            entries.append(entry | {"ppl_over_fixed": _spread(list(known.values()))})
    return entries


def _growth(run: Row, rows: Sequence[Row]) -> float | None:
    """Return by how much a run's perplexity exceeds that of fixed λ, None beyond its range."""
    fixed = sorted(
        (np.log1p(-r["activation_sparsity"]), np.log(r["ppl"]))
        for r in rows
        if r["arm"] == "fixed" and r["seed"] == run["seed"]
    )
    density = np.log1p(-run["activation_sparsity"])
    if not fixed or not fixed[0][0] <= density <= fixed[-1][0]:
        return None
    densities, losses = np.array(fixed).T
    return float(run["ppl"] / np.exp(np.interp(density, densities, losses)) - 1)


def _gap(run: Row, rows: Sequence[Row]) -> float | None:
    """Return the growth of perplexity over `silu` of the same seed, None if there is none."""
    base = [r["ppl"] for r in rows if r["arm"] == "silu" and r["seed"] == run["seed"]]
    return float(run["ppl"] / base[0] - 1) if base else None


def _groups(rows: Sequence[Row]) -> Groups:
    groups: Groups = {}
    for row in rows:
        groups.setdefault((row["arm"], row["lambda"]), []).append(row)
    return groups


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "spread": spread}


def draw_arms(out: Path, rows: Sequence[Row]) -> list[Path]:
    """Write `arms.png` and `arms.svg`.

    Args:
        out: existing directory.
        rows: as for `summary`, with `log`, the path of the run's journal.
    """
    with style():
        figure = arms_figure(rows)
        files = [out / "arms.png", out / "arms.svg"]
        figure.savefig(files[0])
        figure.savefig(files[1], metadata={"Date": None})
    return files


def arms_figure(rows: Sequence[Row]) -> Figure:
    """Draw sparsity against step, and perplexity against sparsity at the end.

    Bands and small marks are seeds; `silu`, which is never sparse, is the line at 0.
    """
    figure = new_figure(7.2, 3.9)
    course, end = figure.subplots(1, 2)
    groups = _groups(rows)
    factors = sorted({factor for _, factor in groups if factor})
    for (arm, factor), runs in groups.items():
        if arm == "silu":
            continue  # never zero
        label = f"{arm}, λ {factor:g}" if factor else arm
        dash = _DASHES[factors.index(factor) % len(_DASHES)] if factor else "-"
        _course(course, runs, color=_COLOURS[arm], ls=dash, label=label)
    course.set_xlabel("Step")
    course.set_ylabel("Activation sparsity, %")
    for arm in dict.fromkeys(arm for arm, _ in groups):
        _end(end, arm, groups, rows)
    end.axhline(0, color=GREY, lw=0.8)
    end.margins(x=0.12)
    end.set_xlabel("Activation sparsity at the end, %")
    end.set_ylabel("Perplexity over that of silu, %")
    if end.get_legend_handles_labels()[0]:
        end.legend(loc="upper left")
    figure.legend(*course.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _course(axes: Axes, runs: Sequence[Row], **line: Any) -> None:
    """Draw the mean of the seeds' sparsity, and between which values they lie."""
    logs = [[e for e in read_log(Path(run["log"])) if "loss" in e] for run in runs]
    steps = [entry["step"] for entry in logs[0]]
    values = 100 * np.array([[np.mean(entry["sparsity"]) for entry in log] for log in logs])
    axes.plot(steps, values.mean(axis=0), **line)
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=line["color"], alpha=0.2)


def _end(axes: Axes, arm: str, groups: Groups, rows: Sequence[Row]) -> None:
    """Draw an arm's mean for each λ, with a line between them, and its seeds as small marks."""
    colour, marker = _COLOURS[arm], _MARKERS[arm]
    means: list[npt.NDArray[np.float64]] = []
    for factor, runs in sorted((f, runs) for (name, f), runs in groups.items() if name == arm):
        gaps = [(100 * r["activation_sparsity"], _gap(r, rows)) for r in runs]
        points = np.array([(x, 100 * y) for x, y in gaps if y is not None and arm != "silu"])
        if not len(points):
            continue
        axes.plot(*points.T, marker, color=colour, ms=3, alpha=0.5, lw=0)
        means.append(points.mean(axis=0))
        if factor:
            place = (-6, 2, "right") if arm == "progressive" else (6, -7, "left")
            _name(axes, f"λ {factor:g}", means[-1], *place)
    if means:
        axes.plot(*np.array(means).T, marker=marker, color=colour, ms=6, lw=1, label=arm)


def _name(axes: Axes, name: str, point: Any, right: int, up: int, align: Any) -> None:
    axes.annotate(
        name,
        point,
        (right, up),
        textcoords="offset points",
        fontsize=7.5,
        horizontalalignment=align,
    )
