"""The fit of a CPU to measured runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_model.calibration import Run, calibrate, predictions, run_seconds
from cost_model.hardware import Device, Efficiency, Hardware, HardwareError

GB = 1e9
STREAMED = Hardware(
    name="measured",
    cpu=Device(
        name="measured",
        bandwidth=10 * GB,
        memory=1 << 34,
        efficiency=Efficiency(matrix=1.0, rows=0.7, columns=0.7),
        layer_seconds=50e-6,
    ),
    threads=6,
    thread_seconds=100e-6,
)
TRUE = replace(
    STREAMED,
    cpu=replace(
        STREAMED.cpu,
        efficiency=Efficiency(matrix=0.8, rows=0.6, columns=0.4),
        layer_seconds=100e-6,
    ),
)


def run(group: str, matrix: float, rows: float, columns: float, layers: int) -> Run:
    empty = Run(
        name=f"{group} {rows:g}",
        group=group,
        seconds=1.0,
        matrix=matrix,
        rows=rows,
        columns=columns,
        layers=layers,
    )
    return replace(empty, seconds=run_seconds(empty, TRUE))


DIFFERENT = [
    run("a", 0.5 * GB, 0.0, 0.0, 3),
    run("b", 0.2 * GB, 0.8 * GB, 0.1 * GB, 8),
    run("c", 0.1 * GB, 0.1 * GB, 0.5 * GB, 3),
    run("d", 0.01 * GB, 0.01 * GB, 0.01 * GB, 32),
    run("e", 1.0 * GB, 0.5 * GB, 0.2 * GB, 4),
]
SWEEP = [
    run(f"density {density}", 0.3 * GB, density * 0.5 * GB, density * 0.25 * GB, 3)
    for density in (0.05, 0.1, 0.25, 0.5, 1.0)
]
"""One shape: bytes of attention and layers are always the same, columns always half of rows."""


def errors_of(runs: list[Run]) -> list[float]:
    found = predictions(STREAMED, runs)
    assert all(each.left_out for each in found)
    return [each.relative_error for each in found]


def test_the_seconds_of_a_run_are_a_sum() -> None:
    expected = 0.2 / 8 + 0.8 / 6 + 0.1 / 4 + 8 * 100e-6 + 5 * 100e-6
    assert DIFFERENT[1].seconds == pytest.approx(expected)


def test_runs_that_tell_all_apart_give_the_true_figures() -> None:
    found = calibrate(STREAMED, DIFFERENT)
    assert replace(found, cpu=STREAMED.cpu) == STREAMED
    fitted = found.cpu
    assert fitted.efficiency.matrix == pytest.approx(0.8, rel=0.02)
    assert fitted.efficiency.rows == pytest.approx(0.6, rel=0.02)
    assert fitted.efficiency.columns == pytest.approx(0.4, rel=0.02)
    assert fitted.layer_seconds == pytest.approx(100e-6, rel=0.02)
    assert "fitted to 5 runs" in fitted.source


def test_a_sweep_of_one_shape_predicts_densities_it_has_not_seen() -> None:
    errors = errors_of(SWEEP)
    assert max(map(abs, errors)) < 0.01
    unseen = run("unseen", 0.3 * GB, 0.35 * GB, 0.175 * GB, 3)
    assert run_seconds(unseen, calibrate(STREAMED, SWEEP)) == pytest.approx(
        unseen.seconds, rel=0.01
    )
    # The figures before the fit are far off.
    assert run_seconds(unseen, STREAMED) / unseen.seconds < 0.8


def test_a_run_is_not_in_the_fit_that_predicts_it() -> None:
    wrong = [*DIFFERENT, replace(DIFFERENT[4], group="f", seconds=2 * DIFFERENT[4].seconds)]
    errors = errors_of(wrong)
    assert errors[-1] == pytest.approx(-0.5, abs=0.02)
    # With its twin in the same group neither has been seen.
    together = [replace(each, group="e") if each.group == "f" else each for each in wrong]
    assert errors_of(together)[4] == pytest.approx(0.0, abs=0.02)


def test_what_cannot_be_left_out_is_said() -> None:
    found = predictions(STREAMED, [replace(each, group="all") for each in DIFFERENT])
    assert not any(each.left_out for each in found)
    assert [each.run for each in found] == [each.name for each in DIFFERENT]


def test_too_few_runs_are_refused() -> None:
    with refused(HardwareError, "2 measured runs, expected at least 3"):
        calibrate(STREAMED, DIFFERENT[:2])


@settings(deadline=None)  # the first fit imports scikit-learn
@given(st.lists(st.floats(1e-4, 10), min_size=5, max_size=5))
def test_no_measurement_gives_an_impossible_device(seconds: list[float]) -> None:
    runs = [replace(each, seconds=time) for each, time in zip(DIFFERENT, seconds, strict=True)]
    fitted = calibrate(STREAMED, runs)
    assert all(run_seconds(each, fitted) > 0 for each in runs)
    assert fitted.cpu.layer_seconds > 0
