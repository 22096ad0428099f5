"""The simulated scheduler: cases by hand, and constants that come back from its own spans."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.cluster_scaling import simulate as scaling
from cost_model.scheduling import TERMS, Constants, makespan, simulate, without
from cost_model.span_fit import Fitted, check, fit, scale, stops, workers_of

NOTHING = Constants()
BACK = {
    "item": 0,
    "worker": "a",
    "node": "a",
    "sent": 0,
    "begun": 2,
    "ended": 1,
    "received": 3,
    "committed": 4,
}
SHORT = Constants(late=0.5, dispatch=0.1, returning=0.05, driver=0.2, in_order=True)


def seconds(durations: list[float], workers: int, **waits: object) -> float:
    return makespan(simulate(durations, workers, replace(NOTHING, **waits)))  # type: ignore[arg-type]


def test_two_workers_three_items() -> None:
    spans = simulate([3.0, 2.0, 2.0], 2, NOTHING)
    assert [(span.item, span.worker, span.begun, span.ended) for span in spans] == [
        (1, "1", 0, 2),
        (0, "0", 0, 3),
        (2, "1", 2, 4),
    ]
    # Alone one worker takes the sum, three take the longest, a fourth finds nothing.
    assert [seconds([3.0, 2.0, 2.0], each) for each in (1, 3, 4)] == [7, 3, 3]
    assert seconds([], 2) == 0


@pytest.mark.parametrize(
    ("waits", "expected"),
    [
        ({"start_up": 1.0}, 4.0),  # from the first item on
        ({"late": 1.0}, 5.0),  # both are free at 3, the third item goes to the first
        ({"dispatch": 0.25}, 4.5),  # of two items, one after the other
        ({"returning": 0.5}, 5.0),  # the second is known at 2.5, the third at 5
        ({"driver": 0.5}, 4.5),  # 2.5, 3.5, 4.5: each is there before the next
        ({"driver": 2.0}, 8.0),  # from 2 on without a pause
        ({"driver": 2.0, "in_order": True}, 9.0),  # from 3 on
        ({"shared": 2.0}, 8.0),  # items 1, 0 and 2, from 2 on without a pause
        # In order the third item waits for the first two, which are put away at 4.
        ({"ahead": 1, "driver": 0.5, "in_order": True}, 6.5),
        ({"ahead": 1, "driver": 0.5}, 4.5),
        ({"ahead": 2, "driver": 0.5, "in_order": True}, 4.5),
    ],
)
def test_what_two_workers_wait_for(waits: dict[str, float], expected: float) -> None:
    assert seconds([3.0, 2.0, 2.0], 2, **waits) == pytest.approx(expected)


def test_a_worker_waits_while_the_driver_commits() -> None:
    spans = simulate([1.0, 1.5, 1.0, 1.0], 2, replace(NOTHING, driver=1.0))
    # The second is made at 1.5 and the third, handed out before the commit, at 2, where it ends.
    assert [(span.item, span.sent, span.received, span.committed) for span in spans] == [
        (0, 0, 1, 2),
        (1, 0, 2, 3),
        (2, 1, 2, 4),
        (3, 2, 4, 5),
    ]
    assert spans[1].ended == 1.5


def test_a_straggler_is_done_twice_once_nothing_is_left() -> None:
    slow = [1.0, 10.0]
    assert makespan(simulate([1.0] * 3, 2, replace(NOTHING, slow=None), slow)) == 10
    twice = simulate([1.0] * 3, 2, NOTHING, slow)
    # The first worker has done the other two by 2, when the second is at it twice the median.
    assert [(span.item, span.worker, span.committed) for span in twice] == [
        (0, "0", 1),
        (2, "0", 2),
        (1, "0", 3),
    ]
    # At 1 that would be too early; the driver looks again after a second.
    assert makespan(simulate([1.0] * 2, 2, NOTHING, slow)) == 3
    assert makespan(simulate([1.0] * 2, 2, replace(NOTHING, look=0.25), slow)) == 2.75
    # The last of three starts what is out longest, and no third attempt is made.
    spans = simulate([4.0, 1.0, 4.0], 3, NOTHING, [5.0, 1.0, 1.0])
    assert {span.item: (span.worker, span.committed) for span in spans} == {
        1: ("1", 1),
        2: ("2", 4),
        0: ("1", 6),
    }


def test_every_item_is_committed_once_and_in_order() -> None:
    chosen = random.Random(1)
    durations = [chosen.uniform(0.1, 3) for _ in range(200)]
    spans = simulate(durations, 7, replace(SHORT, shared=0.05, start_up=2.0))
    assert [span.item for span in spans] == list(range(200))
    for span in spans:
        assert span.sent <= span.begun < span.ended <= span.received < span.committed
    assert {span.item for span in simulate(durations, 7, NOTHING)} == set(range(200))


def test_a_term_that_is_taken_away_never_costs_time() -> None:
    chosen = random.Random(2)
    durations = [chosen.uniform(0.1, 3) for _ in range(40)]
    constants = replace(SHORT, shared=0.1)
    whole = makespan(simulate(durations, 8, constants))
    for term in TERMS:
        cut, fewer = without(term, durations, 8, constants)
        assert sum(cut) == pytest.approx(sum(durations))
        assert makespan(simulate(cut, 8, fewer)) < whole + 1e-9


def test_spans_tell_the_constants_they_were_made_with() -> None:
    chosen = random.Random(3)
    durations = [chosen.uniform(1, 3) for _ in range(60)]
    for constants in (SHORT, replace(SHORT, in_order=False, shared=0.01)):
        runs = [simulate(durations, workers, constants) for workers in (1, 3)]
        found = fit(runs, replace(constants, late=0, dispatch=0, returning=0, driver=0))
        for name in ("late", "dispatch", "driver", "returning"):
            expected = getattr(constants, name)
            assert getattr(found.constants, name) == pytest.approx(expected, abs=1e-9), name
        if constants.shared == 0:
            assert found.durations[5] == pytest.approx((durations[5],) * 2)


def test_runs_are_foretold_by_the_others() -> None:
    chosen = random.Random(4)
    base = [chosen.uniform(1, 2) for _ in range(64)]
    runs = []
    for workers in (1, 2, 4, 8):
        noisy = [each * chosen.uniform(0.95, 1.05) for each in base]
        runs.append(simulate(noisy, workers, SHORT))
    known = Constants(in_order=True)
    found = check(runs, known)
    assert [each.workers for each in found] == [1, 2, 4, 8]
    assert max(abs(each.error) for each in found) < 0.03
    # A run twice as slow as the others foretell is told.
    slow = simulate([2 * each for each in base], 2, SHORT)
    assert check([*runs, slow], known)[-1].error == pytest.approx(-0.5, abs=0.05)


@pytest.mark.parametrize(
    ("constants", "items", "cause"),
    [
        (Constants(driver=0.2, in_order=True), 128, "driver"),
        (Constants(shared=0.2), 128, "shared bandwidth"),
        (Constants(start_up=30.0), 128, "start-up"),
        (Constants(late=8.0), 128, "start-up"),
        (Constants(dispatch=3.0), 128, "dispatch"),
        (NOTHING, 12, "whole items"),
    ],
)
def test_what_stops_scaling_is_named(constants: Constants, items: int, cause: str) -> None:
    fitted = Fitted(constants=constants, durations=dict.fromkeys(range(items), (2.0,)))
    one, many = scale(fitted, range(items), (1, 64))
    assert one.efficiency == 1
    stop = stops(fitted, range(items), 64)
    if cause == "dispatch":  # which every worker waits for alike
        assert stop is None
        assert many.cause == cause
        return
    assert stop is not None
    assert stop.cause == cause
    before, at = scale(fitted, range(items), (stop.workers - 1, stop.workers))
    assert before.efficiency >= 0.5 > at.efficiency > many.efficiency


def write_runs(place: Path, nodes: tuple[int, ...]) -> list[str]:
    """Write the spans of made-up runs."""
    paths = []
    for number in nodes:
        run = simulate([1.0 + 0.1 * (item % 3) for item in range(24)], number, SHORT)
        paths.append(place / f"{number}.jsonl")
        paths[-1].write_text("".join(json.dumps(asdict(span)) + "\n" for span in run))
    return list(map(str, paths))


def test_the_program_checks_and_goes_on(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, (1, 2, 4))
    result = CliRunner().invoke(scaling, [*runs, "--in-order", "--start-up", "3", "--to", "64"])
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["workers"] for line in lines[:3]] == [1, 2, 4]
    assert all(abs(line["error"]) < 1e-9 for line in lines[1:3])
    assert abs(lines[0]["error"]) < 0.01
    assert lines[3]["constants"]["late"] == pytest.approx(0.5)
    assert [(line["workers"], line["measured"]) for line in lines[4:-1]] == [
        *((number, True) for number in (1, 2, 4)),
        (64, False),
    ]
    # 3 s to start, and 24 items of 1.25 s, of each of which the driver takes 0.2 in order.
    assert lines[4]["seconds"] == pytest.approx(3 + 24 * 1.25 + 0.2, abs=0.1)
    assert 4 < lines[-1]["workers"] < 12
    assert lines[-1]["cause"] == "start-up"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], "no spans"),
        (["{"], "line 1"),
        (['{"item": 1}'], "line 1"),
        ([json.dumps(BACK)], "its clock goes back"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path: Path, lines: list[str], told: str) -> None:
    runs = write_runs(tmp_path, (1,))
    odd = tmp_path / "odd.jsonl"
    odd.write_text("\n".join(lines))
    result = CliRunner().invoke(scaling, [*runs, str(odd)])
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert told in result.stderr


def test_workers_are_counted_by_node() -> None:
    run = simulate([1.0] * 4, 2, NOTHING)
    same = [replace(span, worker="a") for span in run]
    assert workers_of(run) == workers_of(same) == 2
