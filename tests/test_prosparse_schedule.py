"""λ at every boundary, and schedules that nobody can follow."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from conftest import refused

from prosparse.schedule import (
    CARD_1B,
    CARD_7B,
    CARD_13B,
    PRESETS,
    Schedule,
    ScheduleError,
    find_schedule,
    read_schedule,
)


@pytest.mark.parametrize(
    ("step", "stage", "factor"),
    [
        (1, 0, 0),
        (10_000, 0, 0),
        (10_001, 1, 1e-3),
        (15_000, 1, 1e-3),
        # A half-sine from 1e-3 to 5e-3 over 5000 steps: its quarter, its middle, its end.
        (15_001, 2, 1e-3 + 4e-3 * 0.5 * (1 - math.cos(math.pi / 5000))),
        (16_250, 2, 1e-3 + 4e-3 * 0.5 * (1 - math.sqrt(0.5))),
        (17_500, 2, 3e-3),
        (20_000, 2, 5e-3),
        (20_001, 3, 5e-3),
        (22_500, 3, 5e-3),
        (25_000, 3, 5e-3),
        (30_000, 4, 0.0275),
        (35_000, 4, 5e-2),
        (35_001, 5, 5e-2),
        (95_000, 5, 5e-2),
        (95_001, 6, 1e-2),
        (101_000, 6, 1e-2),
        (101_001, 6, 1e-2),
    ],
)
def test_the_cards_schedule_for_1b(step: int, stage: int, factor: float) -> None:
    assert CARD_1B.stage_at(step) == stage
    assert CARD_1B.factor(step) == pytest.approx(factor, rel=1e-9, abs=1e-15)


def test_the_published_ends() -> None:
    assert (CARD_1B.steps, CARD_7B.steps, CARD_13B.steps) == (101_000, 16_500, 16_000)
    assert [CARD_7B.factor(step) for step in (5_000, 6_000, 10_000, 12_000, 16_000, 16_500)] == [
        *(0, 5e-3, 5e-2, 5e-2, 2e-1, 2e-1)
    ]
    assert CARD_7B.factor(14_000) == pytest.approx((5e-2 + 2e-1) / 2)
    assert [CARD_13B.factor(step) for step in (5_500, 6_750, 10_750, 15_000)] == [
        0,
        5e-3,
        1e-2,
        2e-2,
    ]


def test_lambda_never_jumps_within_the_progressive_stages() -> None:
    steepest = math.pi / 2 * 4.5e-2 / 10_000  # of the largest half-sine
    for step in range(15_000, 35_000):
        rise = CARD_1B.factor(step + 1) - CARD_1B.factor(step)
        assert 0 <= rise <= steepest * 1.001


def test_a_schedule_may_begin_progressive() -> None:
    schedule = Schedule.of(("progressive", 0.4, 4), ("decay", 0.4, 6))
    assert [schedule.factor(step) for step in (2, 4, 5)] == pytest.approx([0.2, 0.4, 0.4])


def test_scaling_keeps_lambda_and_shrinks_steps() -> None:
    small = CARD_1B.scaled(0.001)
    assert [stage.until_step for stage in small.stages] == [10, 15, 20, 25, 35, 95, 101]
    assert [small.factor(step) for step in (10, 11, 20, 35, 95, 96)] == [
        *(0, 1e-3, 5e-3, 5e-2, 5e-2, 1e-2)
    ]
    assert CARD_1B.scaled(1) == CARD_1B


@pytest.mark.parametrize(
    ("scale", "part"), [(1e-4, "without a step"), (0, "above 0"), (math.nan, "above 0")]
)
def test_scales_that_leave_nothing(scale: float, part: str) -> None:
    with refused(ScheduleError, "--scale", part):
        CARD_1B.scaled(scale)


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([], ("no stages",)),
        ([("warmup", 0.1, 0)], ("stage 0", "until_step is 0")),
        ([("warmup", 0.1, 9), ("decay", 0.1, 9)], ("stage 1", "until_step is 9", "more than 9")),
        ([("warmup", -0.1, 9)], ("stage 0", "lambda is -0.1")),
        ([("warmup", math.nan, 9)], ("stage 0", "lambda is nan")),
        ([("linear", 0.1, 9)], ("stage 0", "'linear'", "progressive")),
        ([("warmup", 0.2, 9), ("progressive", 0.1, 12)], ("stage 1", "falls from 0.2 to 0.1")),
    ],
)
def test_impossible_schedules(rows: list[tuple[str, float, int]], parts: tuple[str, ...]) -> None:
    with refused(ScheduleError, *parts):
        Schedule.of(*rows)


def test_yaml_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "stages:\n"
        "- {kind: substitution, lambda: 0, until_step: 10}\n"
        "- {kind: warmup, lambda: 1e-3, until_step: 20}\n"  # a string to YAML 1.1
        "- {kind: progressive, lambda: 5.0e-2, until_step: 40}\n"
    )
    found = find_schedule(str(file))
    assert found == Schedule.of(
        ("substitution", 0, 10), ("warmup", 1e-3, 20), ("progressive", 5e-2, 40)
    )
    assert [find_schedule(name) for name in PRESETS] == list(PRESETS.values())


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("stages: [", "not valid YAML"),
        ("[]", "holds no stages"),
        ("stages: 3", "holds no stages"),
        ("stages: []", "no stages"),
        ("stages: [{kind: warmup, lambda: 1}]", "expected exactly the keys"),
        ("stages: [{kind: warmup, lambda: much, until_step: 3}]", "lambda is 'much'"),
        ("stages: [{kind: warmup, lambda: 1, until_step: 2.5}]", "until_step is 2.5"),
        ("stages: [{kind: warmup, lambda: 1, until_step: true}]", "until_step is True"),
    ],
)
def test_yaml_that_is_no_schedule(tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with refused(ScheduleError, part):
        read_schedule(file)


def test_names_that_are_no_schedule(tmp_path: Path) -> None:
    with refused(ScheduleError, "'2b'", "1b, 7b, 13b"):
        find_schedule("2b")
    with refused(ScheduleError, "none.yaml", "--schedule"):
        find_schedule(str(tmp_path / "none.yaml"))


def test_a_factor_of_more_digits_than_a_float_has(tmp_path: Path) -> None:
    path = tmp_path / "schedule.yaml"
    stage = f"{{kind: substitution, lambda: 1{'0' * 400}, until_step: 10}}"
    path.write_text(f"stages: [{stage}]")
    with refused(ScheduleError, "lambda is 1", "expected a number of 0 or more"):
        read_schedule(path)
