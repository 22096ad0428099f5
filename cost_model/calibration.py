"""Bandwidths and overhead of a CPU, fitted to measured runs of PowerInfer.

A run's seconds for each token are a sum, linear in what is not known:

    seconds = matrix bytes · x₀ + row bytes · x₁ + column bytes · x₂ + layers · x₃ + token

with x₀ to x₂ the inverse of bandwidth · efficiency and x₃ `layer_seconds`; the token's time
stays as it is. Relative residuals are minimised over x ≥ 0 (Lawson and Hanson's NNLS, in
scikit-learn).

Runs of one model alone cannot tell all four apart: bytes of attention and the number of layers are
the same in each. So every unknown is drawn weakly to its value before the fit, all of these scaled
to the runs' median first, in relative units: that decides only what the measurements leave open
(Tikhonov regularisation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from common.typed_json import Positive
from cost_model.hardware import Efficiency, Hardware, HardwareError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PRIOR_WEIGHT = 0.01
"""Assumed: an unknown that is off by all of its value counts as much as a run off by 1 %."""

FEWEST = 3
"""Runs that a fit needs, so that each can be left out and told from the others."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A measured run, on the CPU alone.

    Attributes:
        name: what it was.
        group: what it was measured together with; left out together.
        seconds: of a token.
        matrix: bytes that a token reads in dense products.
        rows: bytes of chosen rows of gate and up.
        columns: bytes of chosen columns of down.
        layers: layers.
    """

    name: str
    group: str
    seconds: float
    matrix: float
    rows: float
    columns: float
    layers: int


def run_seconds(run: Run, hardware: Hardware) -> float:
    """Return the model's seconds of a run."""
    cpu = hardware.cpu
    read = cpu.seconds(matrix=run.matrix, rows=run.rows, columns=run.columns)
    return read + run.layers * cpu.layer_seconds + hardware.token_seconds


def calibrate(hardware: Hardware, runs: Sequence[Run]) -> Hardware:
    """Return the hardware with its CPU's efficiencies and overhead fitted to runs.

    Args:
        hardware: with the values before the fit.
        runs: at least `FEWEST`.

    Raises:
        HardwareError: too few runs.
    """
    if len(runs) < FEWEST:
        raise HardwareError(
            f"{len(runs)} measured runs, expected at least {FEWEST}", "measure more"
        )
    cpu = hardware.cpu
    share, bandwidth = cpu.efficiency, cpu.bandwidth
    reads = [1 / (bandwidth * each) for each in (share.matrix, share.rows, share.columns)]
    found = _solve([*reads, cpu.layer_seconds], runs, hardware.token_seconds)
    matrix, rows, columns, layer = found.tolist()
    fitted = replace(
        cpu,
        efficiency=Efficiency(
            matrix=1 / (matrix * bandwidth),
            rows=1 / (rows * bandwidth),
            columns=1 / (columns * bandwidth),
        ),
        layer_seconds=layer,
        source=f"{cpu.source}; efficiency and layer time fitted to {len(runs)} runs",
    )
    return replace(hardware, cpu=fitted)


def _solve(
    prior: Sequence[float], runs: Sequence[Run], token_seconds: float
) -> npt.NDArray[np.float64]:
    """Return x.

    Solved is for z = x / prior, so that all unknowns are near 1. One that the fit would set to 0,
    an endless bandwidth, is kept at a thousandth.
    """
    import numpy as np
    from sklearn.linear_model import LinearRegression

    measured = np.array([run.seconds for run in runs])
    reads = [(run.matrix, run.rows, run.columns, run.layers) for run in runs]
    features = np.array(reads) / measured[:, None]
    scale = np.array([value or 1e-6 for value in prior])
    rest = 1 - token_seconds / measured
    scale *= max(np.median(rest), 1e-3) / np.median(features @ scale)
    system = np.concatenate([features * scale, PRIOR_WEIGHT * np.eye(len(scale))])
    target = np.concatenate([rest, np.full(len(scale), PRIOR_WEIGHT)])
    fit = LinearRegression(positive=True, fit_intercept=False).fit(system, target)
    found: npt.NDArray[np.float64] = np.maximum(fit.coef_, 1e-3) * scale
    return found


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A run as a fit predicts it.

    Attributes:
        run: its name.
        seconds: measured.
        estimated_seconds: predicted.
        relative_error: (predicted − measured) / measured.
        left_out: the fit has seen no run of its group; else it has seen all, and its error says
            little.
    """

    run: str
    seconds: Positive
    estimated_seconds: Positive
    relative_error: float
    left_out: bool


def predictions(hardware: Hardware, runs: Sequence[Run]) -> list[Prediction]:
    """Predict each run by a fit to the runs of other groups, where these are enough.

    Args:
        hardware: with the values before any fit.
        runs: at least `FEWEST`.
    """
    found = []
    for run in runs:
        others = [other for other in runs if other.group != run.group]
        left_out = len(others) >= FEWEST
        fitted = calibrate(hardware, others if left_out else runs)
        seconds = run_seconds(run, fitted)
        found.append(
            Prediction(
                run=run.name,
                seconds=run.seconds,
                estimated_seconds=seconds,
                relative_error=seconds / run.seconds - 1,
                left_out=left_out,
            )
        )
    return found
