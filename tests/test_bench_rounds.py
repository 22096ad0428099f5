"""Order of the arms, and what becomes of their times."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import pytest

from common.typed_json import parse, plain
from powerinfer_bridge.benchmark.journal import Sample
from powerinfer_bridge.benchmark.rounds import arm_order, quartiles, speedup, spread
from powerinfer_bridge.programs.sample import Phase, RunSample
from results.bench import SampleRow, round_speeds


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_every_arm_stands_everywhere_and_follows_every_other_equally_often(count: int) -> None:
    orders = [arm_order(count, step) for step in range(2 * count if count % 2 else count)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    places = Counter((place, arm) for order in orders for place, arm in enumerate(order))
    assert len(set(places.values())) == 1
    assert len(places) == count * count
    pairs = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(pairs) == count * (count - 1)
    assert len(set(pairs.values())) <= 1


def test_two_arms_take_turns_at_being_first() -> None:
    assert [arm_order(2, step) for step in range(4)] == [[0, 1], [1, 0], [0, 1], [1, 0]]


def sample(
    arm: str, round_: int, prompt: int, decode: tuple[int, float], /, **changes: Any
) -> Sample:
    tokens, seconds = decode
    run: dict[str, Any] = {"text": "t", "load_seconds": 1.0, "wall_seconds": 2.0}
    run["prompt"] = Phase(seconds=0.5, tokens=4)
    run["decode"] = Phase(seconds=seconds, tokens=tokens)
    return Sample(arm=arm, round=round_, prompt=prompt, run=RunSample(**(run | changes)))


def row(*given: Any, **changes: Any) -> SampleRow:
    return sample(*given, **changes).row()


def test_a_round_s_speed_is_all_its_tokens_over_all_its_seconds() -> None:
    # Rates of 100 and 1: their mean, 50.5, is not what 20 tokens in 10.1 s are.
    samples = [row("predicted", 1, 0, (10, 0.1)), row("predicted", 1, 1, (10, 10.0))]
    speeds = round_speeds(samples, "predicted", "decode")
    assert speeds == {1: pytest.approx(20 / 10.1)}


def test_prompts_are_timed_apart_from_decoding() -> None:
    samples = [row("predicted", 1, 0, (10, 1.0)), row("predicted", 2, 0, (10, 1.0))]
    assert round_speeds(samples, "predicted", "prompt") == {1: 8.0, 2: 8.0}


def test_a_round_whose_prompt_time_is_not_known_is_left_out() -> None:
    samples = [
        row("predicted", 1, 0, (10, 1.0), prompt=None),
        row("predicted", 1, 1, (10, 1.0)),
        row("predicted", 2, 0, (10, 1.0)),
    ]
    assert round_speeds(samples, "predicted", "prompt") == {2: 8.0}
    assert set(round_speeds(samples, "predicted", "decode")) == {1, 2}


def test_the_spread_is_median_quartiles_and_range() -> None:
    assert plain(spread([5.0, 1.0, 2.0, 3.0, 100.0])) == {
        "tokens_per_second": 3.0,
        "quartiles": [2.0, 5.0],
        "range": [1.0, 100.0],
        "rounds": 5,
    }
    assert quartiles([7.0]) == (7.0, 7.0)


def test_a_speedup_is_a_ratio_of_medians_with_quartiles_of_ratios() -> None:
    samples = []
    for number, (ours, theirs) in enumerate([(10, 2), (20, 40), (90, 10)], 1):
        samples.append(row("predicted", number, 0, (ours, 1.0)))
        samples.append(row("all_neurons", number, 0, (theirs, 1.0)))
    found = speedup(samples, "predicted", "all_neurons")
    assert (found.arm, found.over) == ("predicted", "all_neurons")
    assert found.ratio == 20 / 10  # the median of the ratios is 5
    assert found.quartiles == (2.75, 7.0)  # of 0.5, 5 and 9


def test_a_sample_survives_the_journal() -> None:
    whole = sample(
        *("predicted", 3, 1, (10, 1.5)),
        text="Ü\udcff",
        notes=("GPU index rebuilt",),
        command=("main", "-n", "1"),
        environment={"A": "b"},
        device={"cuda": True, "gpus": ["x"]},
    )
    assert parse(Sample, json.loads(json.dumps(plain(whole)))) == whole
    assert whole.row().text_sha256 is not None
