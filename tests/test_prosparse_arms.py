"""Arms of the sparsification benchmark: schedules, means, equal sparsity, the picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import sparsify
from benchmarks.sparsify import (
    arms_figure,
    at_equal_sparsity,
    draw_arms,
    main,
    schedule_of,
    summary,
)
from prosparse.settings import SparsifyConfig
from report.figures.style import style

Row = dict[str, Any]


def row(arm: str, factor: float, seed: int, density: float, ppl: float) -> Row:
    sizes = {"activation_sparsity": 1 - density, "ppl": ppl}
    return {"arm": arm, "lambda": factor, "seed": seed, **sizes}


def rows_of(seed: int, worse: float) -> list[Row]:
    """Fixed λ follows ppl = 10 · density^-0.1; progressive is worse by a factor."""
    fixed = [row("fixed", f, seed, d, 10 * d**-0.1) for f, d in ((1, 0.2), (2, 0.1), (4, 0.05))]
    curve = [row("progressive", 4, seed, 0.07, 10 * 0.07**-0.1 * worse)]
    beyond = [row("progressive", 1, seed, 0.3, 99), row("progressive", 9, seed, 0.04, 99)]
    return [row("silu", 0, seed, 1, 8 + seed), *fixed, *curve, *beyond]


def test_progressive_is_compared_where_fixed_is_as_sparse() -> None:
    rows = rows_of(0, 1.02) + rows_of(1, 0.96)
    (entry,) = at_equal_sparsity(rows)  # nothing is said beyond the range of fixed λ
    assert entry["lambda"] == 4
    assert entry["seeds"] == [0, 1]
    assert entry["activation_sparsity"] == {"mean": pytest.approx(0.93), "spread": 0}
    assert entry["ppl_over_fixed"]["mean"] == pytest.approx(-0.01)
    assert entry["ppl_over_fixed"]["spread"] == pytest.approx(0.06 / math.sqrt(2))
    assert at_equal_sparsity([r for r in rows if r["arm"] != "fixed"]) == []


def test_gaps_are_to_the_same_seed() -> None:
    rows = [row("silu", 0, seed, 1, 8 + seed) for seed in (0, 1)]
    rows += [row("relu", 0, seed, 0.4, (8 + seed) * (1.1 + seed / 10)) for seed in (0, 1)]
    silu, relu = summary(rows)["arms"]
    assert silu["ppl_gap"] == {"mean": 0, "spread": 0}
    assert relu["ppl_gap"]["mean"] == pytest.approx(0.15)
    assert relu["ppl_gap"]["spread"] == pytest.approx(0.1 / math.sqrt(2))
    (alone,) = summary(rows[2:3])["arms"]
    assert alone["ppl_gap"] is None
    assert alone["ppl"] == {"mean": pytest.approx(8.8), "spread": None}


@pytest.mark.parametrize(
    ("arm", "factors"),
    [
        ("relu", [0, 0, 0]),
        ("fixed", [0, 5, 5]),
        ("progressive", [0, 0.1, 5]),
    ],
)
def test_schedules_of_the_arms(arm: str, factors: list[float]) -> None:
    schedule = schedule_of(arm, 100, 5)
    assert schedule.steps == 100
    assert [schedule.factor(step) for step in (10, 15, 100)] == pytest.approx(factors)


def write_logs(rows: list[Row], out: Path) -> list[Row]:
    """Give every row a log in which sparsity rises to where the row ends."""
    for number, entry in enumerate(rows):
        path = out / f"{number}.jsonl"
        shares = [entry["activation_sparsity"] * share for share in (0.5, 1)]
        every = {"stage": 0, "lambda": 0.0}
        lines = [{"step": 0, **every, "ppl": 9.0, "sparsity": [0.5, 0.5]}]
        lines += [
            {"step": n, **every, "loss": 1.0, "sparsity": [s, s]} for n, s in enumerate(shares, 1)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        entry["log"] = str(path)
    return rows


def test_the_picture_shows_the_numbers(tmp_path: Path) -> None:
    rows = write_logs(rows_of(0, 1.02) + rows_of(1, 0.96), tmp_path)
    with style():
        course, end = arms_figure(rows).axes
    lines = {str(line.get_label()): line for line in course.get_lines()}
    assert set(lines) == {
        *(f"fixed, λ {f}" for f in (1, 2, 4)),
        *(f"progressive, λ {f}" for f in (4, 1, 9)),
    }
    assert np.array(lines["fixed, λ 2"].get_ydata()).tolist() == pytest.approx([45, 90])
    ends = {str(line.get_label()): line for line in end.get_lines()}
    found = np.array(ends["progressive"].get_data()).T.tolist()
    entry = next(e for e in summary(rows)["arms"] if (e["arm"], e["lambda"]) == ("progressive", 4))
    means = [100 * entry[key]["mean"] for key in ("activation_sparsity", "ppl_gap")]
    assert found[1] == pytest.approx(means)
    for file in draw_arms(tmp_path, rows):
        assert file.stat().st_size


class Nothing:
    """Stands for a model that is never trained."""

    def save_pretrained(self, path: Path) -> None:
        path.mkdir(parents=True)


def test_arms_of_a_seed_share_the_dense_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[SparsifyConfig] = []

    def pretend(config: SparsifyConfig) -> Row:
        ran.append(config)
        config.training.mkdir(parents=True)
        sparsity = [0.5 + len(ran) / 100]
        line = {"step": 1, "stage": 0, "lambda": 0.0, "loss": 1.0, "sparsity": sparsity}
        config.log.write_text(json.dumps(line) + "\n")
        return {"activation_sparsity": 0.5 + len(ran) / 100, "ppl": 9.0, "log": str(config.log)}

    monkeypatch.setattr(sparsify, "sparsify", pretend)
    monkeypatch.setattr(sparsify, "build_model", lambda size, activation: Nothing())
    monkeypatch.setattr(sparsify, "train_tokenizer", lambda corpus, path, size: path.touch())
    sizes = ["--size", "tiny", "--characters", "60000", "--lambdas", "1", "4", "--seeds", "3", "5"]
    main(["--out", str(tmp_path), *sizes])
    *arms, last = map(json.loads, capsys.readouterr().out.splitlines())
    runs = [arm for arm in arms if arm["arm"] != "dense"]
    assert [run["seed"] for run in runs] == 6 * [3] + 6 * [5]
    assert len({config.out for config in ran}) == 2 * 7
    assert {c.model for c in ran if c.out.name != "dense"} == {
        str(tmp_path / f"seed-{seed}" / "dense") for seed in (3, 5)
    }
    assert len({config.data for config in ran}) == 2
    assert [entry["lambda"] for entry in last["arms"]] == [0, 0, 1, 4, 1, 4]
    assert all(entry["seeds"] == [3, 5] for entry in last["arms"])
    assert (tmp_path / "arms.png").exists()
