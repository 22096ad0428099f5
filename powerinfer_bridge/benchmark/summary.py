"""From samples to what a document says of the arms and their texts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from powerinfer_bridge.benchmark.arms import ALL_NEURONS, PREDICTED, Arm
from powerinfer_bridge.benchmark.figures import round_speeds, speedup, spread
from powerinfer_bridge.benchmark.sample import Sample


def summarise_speeds(arms: Sequence[Arm], samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the arms with their figures, how they compare, and the samples."""
    measured = [{**arm.facts(), **_arm_figures(arm.name, samples)} for arm in arms]
    medians = {arm["name"]: arm["decode"]["tokens_per_second"] for arm in measured}
    others = [arm.name for arm in arms if arm.name != PREDICTED]
    return {
        "tokens_per_second": medians[PREDICTED],
        "tokens_per_second_dense": medians[ALL_NEURONS],
        "speedup": medians[PREDICTED] / medians[ALL_NEURONS],
        "arms": measured,
        "speedups": [speedup(samples, PREDICTED, other) for other in others],
        "samples": [sample.row() for sample in samples],
    }


def _arm_figures(name: str, samples: Sequence[Sample]) -> dict[str, Any]:
    own = [sample for sample in samples if sample.arm == name]
    prompt = list(round_speeds(own, name, "prompt").values())
    loads = [each.run.load_seconds for each in own if each.run.load_seconds is not None]
    over = None
    if name != ALL_NEURONS:
        ratio = speedup(samples, name, ALL_NEURONS)
        over = {key: ratio[key] for key in ("over", "ratio", "quartiles")}
    first = own[0].run
    return {
        "decode": spread(list(round_speeds(own, name, "decode").values())),
        "prompt": spread(prompt) if prompt else None,
        "speedup": over,
        "load_seconds": statistics.median(loads) if loads else None,
        "command": list(first.command),
        "environment": first.environment,
        "notes": list(dict.fromkeys(note for sample in own for note in sample.run.notes)),
        "device": first.device,
    }


def summarise_texts(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return both continuations of the first prompt, and whether all pairs are the same.

    Texts are those of the first round.
    """
    texts: dict[str, dict[int, str | None]] = {PREDICTED: {}, ALL_NEURONS: {}}
    for sample in samples:
        if sample.round == 1 and sample.arm in texts:
            texts[sample.arm][sample.prompt] = sample.run.text
    return {
        "continuations": {
            "sparse": texts[PREDICTED][0] or "",
            "dense": texts[ALL_NEURONS][0] or "",
        },
        "greedy_text_same": texts[PREDICTED] == texts[ALL_NEURONS],
    }
