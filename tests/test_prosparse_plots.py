"""Plots of training show the log's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused

from common.errors import DataError
from prosparse.schedule import CARD_1B
from report.figures.style import style
from report.figures.training_curves import draw_training, training_figure

SCHEDULE = CARD_1B.scaled(0.002)


def log_of(layers: int) -> list[dict[str, Any]]:
    """Make a log of the card's schedule, evaluated every fiftieth step."""
    lines: list[dict[str, Any]] = []
    for step in range(0, SCHEDULE.steps, 10):
        stage = SCHEDULE.stage_at(step)
        line: dict[str, Any] = {"step": step, "stage": stage, "kind": SCHEDULE.stages[stage].kind}
        line["lambda"] = SCHEDULE.factor(step)
        sparsity = [step / 250 + 0.01 * layer for layer in range(layers)]
        if step % 50 == 0:
            lines.append(line | {"ppl": 20 - step / 20, "sparsity": [9.0] * layers})
        if step:
            lines.append(line | {"loss": 2.0, "sparsity": sparsity})
    return lines


def curve(axes: Any, number: int) -> tuple[list[float], list[float]]:
    line = axes.get_lines()[number]
    return list(line.get_xdata()), list(line.get_ydata())


def test_a_run_is_drawn_layer_by_layer() -> None:
    log = log_of(3)
    with style():
        figure = training_figure(log)
        sparsity, factor, ppl = figure.axes
    trained = [line for line in log if "ppl" not in line]
    steps = [line["step"] for line in trained]
    for layer in range(3):
        x, y = curve(sparsity, layer)
        assert x == steps
        assert y == pytest.approx([100 * line["sparsity"][layer] for line in trained])
    assert curve(sparsity, 3)[1] == pytest.approx([100 * (s / 250 + 0.01) for s in steps])
    assert curve(factor, 0) == ([e["step"] for e in log], [e["lambda"] for e in log])
    evaluated = [line for line in log if "ppl" in line]
    assert curve(ppl, 0) == ([e["step"] for e in evaluated], [e["ppl"] for e in evaluated])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0", "1", "2"]
    # The stages' ends are marked between the logged steps about them.
    marks = [curve(factor, n)[0][0] for n in range(1, len(factor.get_lines()))]
    ends = [stage.until_step for stage in SCHEDULE.stages[:-1]]
    assert np.abs(np.array(marks) - np.array(ends)).max() <= 5


@pytest.mark.parametrize("layers", [1, 12])
def test_files_are_the_same_for_the_same_log(layers: int, tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files = draw_training(tmp_path / name, "run", log_of(layers))
        assert [file.name for file in files] == ["training.png", "training.svg"]
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]
    assert contents[0][0].startswith(b"\x89PNG")


def test_a_log_of_evaluations_alone_is_drawn(tmp_path: Path) -> None:
    log = [line | {"lambda": 0} for line in log_of(2) if "ppl" in line]
    assert all(file.stat().st_size for file in draw_training(tmp_path, "run", log))


def test_nothing_to_plot_is_refused(tmp_path: Path) -> None:
    with refused(DataError, "fixed", "no lines"):
        draw_training(tmp_path, "fixed", [])
