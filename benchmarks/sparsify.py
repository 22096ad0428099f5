"""ProSparse on a small SiLU LLaMA: progressive L1 against a fixed λ and substitution alone.

With every seed a dense model is trained on the standard library's source. All arms start from it
and take the same number of further steps on the same windows in the same order:

- `silu`: no change, what perplexities are relative to;
- `relu`: ReLU, no L1;
- `fixed`: ReLU, then the last λ at once;
- `progressive`: ReLU, then λ in the card's stages.

Prints one JSON line an arm, and a last one with means over seeds and with what progressive λ gives
at equal sparsity. `arms.png` shows the same. `psp collect`, `train-predictor`, `export-gguf` and
`bench-powerinfer` take the directories from there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from benchmarks.shared import print_line
from prosparse.schedule import Schedule
from prosparse.settings import SparsifyConfig
from prosparse.training import sparsify
from prosparse.training_log import read_log
from quickstart.model import Corpus, build_model, train_tokenizer, write_corpus
from quickstart.settings import SIZES, Size
from report.figures.style import ACCENT, DARK, GREY, MIDDLE, new_figure, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Groups = dict[tuple[str, float], list[Row]]

SHAPE = (
    ("substitution", 0.0, 0.1),
    ("warmup", 0.02, 0.15),
    ("progressive", 0.1, 0.2),
    ("progressive", 0.1, 0.25),
    ("progressive", 1.0, 0.35),
    ("decay", 1.0, 1.0),
)
"""Kinds, λ as a share of the last one, and ends as a share of all steps: the card's 1B schedule
without SFT, whose steps end at 95 000; ends rounded."""
WITHOUT_L1 = ("silu", "relu")

_COLOURS = {"silu": GREY, "relu": DARK, "fixed": ACCENT, "progressive": MIDDLE}
_MARKERS = {"silu": "x", "relu": "D", "fixed": "s", "progressive": "o"}
_DASHES: tuple[Any, ...] = (":", "--", "-", "-.")


def schedule_of(arm: str, steps: int, factor: float) -> Schedule:
    """Return an arm's schedule, `factor` its last λ."""
    if arm in WITHOUT_L1:
        return Schedule.of(("substitution", 0, steps))
    kinds = [(kind, factor * share, round(steps * end)) for kind, share, end in SHAPE]
    if arm == "fixed":
        kinds = [kinds[0], ("warmup", factor, steps)]
    return Schedule.of(*kinds)


def run_seed(settings: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Train the dense model of a seed and its arms; what is finished is not trained again."""
    out, size = settings.out / f"seed-{seed}", SIZES[settings.size]
    corpus = Corpus(out / "corpus")
    if not corpus.valid.exists():
        characters = settings.characters or size.characters
        write_corpus(corpus.directory, characters=characters, seed=seed)
    shared: dict[str, Any] = {
        "data": str(corpus.train),
        "eval_data": str(corpus.valid),
        "eval_windows": settings.eval_windows,
        "context": size.context,
        "batch": size.batch,
        "warmup": 0.05,
        "save_every": 10**9,
        "eval_every": settings.eval_every,
        "seed": seed,
        "device": "cpu",
        "resume": True,
    }
    start, dense = write_random(size, seed, corpus, out / "random"), out / "dense"
    config = SparsifyConfig(
        model=str(start),
        out=dense,
        schedule=schedule_of("silu", settings.dense_steps, 0),
        activation="keep",
        learning_rate=size.learning_rate,
        **shared,
    )
    train("dense", config)
    rows = []
    for arm in settings.arms:
        for factor in [0.0] if arm in WITHOUT_L1 else settings.factors:
            config = SparsifyConfig(
                model=str(dense),
                out=out / f"{arm}-{settings.norm}-{factor:g}-{settings.steps}",
                schedule=schedule_of(arm, settings.steps, factor),
                activation="keep" if arm == "silu" else "relu",
                learning_rate=settings.learning_rate,
                norm=settings.norm,
                **shared,
            )
            rows.append(train(arm, config))
    return rows


def write_random(size: Size, seed: int, corpus: Corpus, out: Path) -> Path:
    """Write the random SiLU model that a seed's dense one is trained from, and its tokenizer."""
    import torch

    if not (out / "tokenizer.model").exists():
        torch.manual_seed(seed)
        build_model(size, "silu").save_pretrained(out)
        train_tokenizer(corpus, out / "tokenizer.model", size.vocab_size)
    return out


def train(arm: str, config: SparsifyConfig) -> dict[str, Any]:
    """Train an arm, print its line and return it."""
    began = time.perf_counter()
    result = sparsify(config)
    row = {
        "arm": arm,
        "seed": config.seed,
        "norm": config.norm,
        "lambda": config.schedule.stages[-1].factor,
        "learning_rate": config.learning_rate,
        **result,
    }
    print_line(row | {"seconds": time.perf_counter() - began})
    return row


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
        return save(arms_figure(rows), out, "arms")


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
            left = arm == "progressive"
            axes.annotate(
                f"λ {factor:g}",
                tuple(means[-1]),
                (-6, 2) if left else (6, -7),
                textcoords="offset points",
                fontsize=7.5,
                horizontalalignment="right" if left else "left",
            )
    if means:
        axes.plot(*np.array(means).T, marker=marker, color=colour, ms=6, lw=1, label=arm)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", default="small", choices=tuple(SIZES))
    parser.add_argument("--characters", type=int, help="of the corpus, instead of the size's")
    parser.add_argument("--dense-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--lambdas", dest="factors", type=float, nargs="+", default=[0.05])
    parser.add_argument("--norm", choices=("mean", "sum"), default="mean")
    parser.add_argument("--arms", nargs="+", default=[*WITHOUT_L1, "fixed", "progressive"])
    parser.add_argument("--eval-windows", type=int, default=64)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Run the arms asked for, compare and draw them."""
    settings = arguments(given)

    import torch

    torch.set_num_threads(settings.threads)
    rows = [row for seed in settings.seeds for row in run_seed(settings, seed)]
    print_line(summary(rows))
    draw_arms(settings.out, rows)


if __name__ == "__main__":
    main()
