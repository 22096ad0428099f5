"""`bench.json`, checked while it is read."""

from __future__ import annotations

from collections import defaultdict

from powerinfer_bridge.report.documents import (
    check_speed,
    read_estimate,
    read_hot_neurons,
    read_layers,
    read_metrics,
    read_quartiles,
)
from powerinfer_bridge.report.results import ARMS, Arm, Bench, HotNeurons, Ratio, Spread
from powerinfer_bridge.report.values import Value


def read_bench(result: Value) -> Bench:
    """Take what the page needs out of `bench.json`.

    Raises:
        ResultError: a key is missing or holds something else; the line names it.
    """
    perplexity = {"predicted": result["ppl_sparse"], "all_neurons": result["ppl_dense"]}
    if (of_transformers := result.get("ppl_transformers")) is not None:
        perplexity["transformers"] = of_transformers
    hot, estimate, same = (
        result.get(key) for key in ("hot_neurons", "estimate", "greedy_text_same")
    )
    return Bench(
        model=result["model"].text(),
        engine=result["engine"].text(),
        metrics=read_metrics(result),
        layers=read_layers(result["layers"]),
        perplexity={name: value.positive() for name, value in perplexity.items()},
        gap=result["ppl_gap"].number(),
        arms=_arms(result),
        speedups=tuple(_ratio(value) for value in result["speedups"].items()),
        same_text=None if same is None else same.truth(),
        hot=None if hot is None else _hot_neurons(hot),
        devices=_devices(result.get("placement")),
        estimate=None if estimate is None else read_estimate(estimate),
        warnings=tuple(value["text"].text() for value in result["warnings"].items()),
        facts=result.found,
    )


def _hot_neurons(value: Value) -> HotNeurons | None:
    neurons, activations = (value[key].items() for key in ("neuron_share", "activation_share"))
    places = [value.get(f"gpu_{key}_share") for key in ("neuron", "activation")]
    shares = [place.share() for place in places if place is not None]
    on_gpu = (shares[0], shares[1]) if len(shares) == 2 else None
    return read_hot_neurons(neurons, activations, on_gpu)


def _devices(placement: Value | None) -> dict[str, dict[str, float]]:
    if placement is None:
        return {}
    return {
        device["name"].text(): {
            name: size.number(0) for name, size in device["bytes"].entries().items()
        }
        for device in placement["devices"].items()
    }


def _arms(result: Value) -> tuple[Arm, ...]:
    samples = _samples(result["samples"])
    arms = []
    for value in result["arms"].items():
        name = value["name"].text()
        if name not in ARMS:
            raise value["name"].wrong(f"one of {', '.join(ARMS)}")
        prompt = value.get("prompt")
        arms.append(
            Arm(
                name=name,
                decode=_spread(value["decode"], samples[name, "decode"]),
                prompt=None if prompt is None else _spread(prompt, samples[name, "prompt"]),
                notes=tuple(note.text() for note in value["notes"].items()),
                facts=value.found,
            )
        )
    if not arms:
        raise result["arms"].wrong("at least one arm")
    return tuple(sorted(arms, key=lambda arm: ARMS.index(arm.name)))


def _samples(rows: Value) -> dict[tuple[str, str], tuple[float, ...]]:
    """Return each round's tokens over its seconds, all its prompts together."""
    sums: dict[tuple[str, str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in rows.items():
        for phase in ("decode", "prompt"):
            if (seconds := row.get(f"{phase}_seconds")) is None:
                continue
            each = sums[row["arm"].text(), phase, int(row["round"].number(0))]
            each[0] += row[f"{phase}_tokens"].number(0)
            each[1] += seconds.positive()
    speeds: dict[tuple[str, str], tuple[float, ...]] = defaultdict(tuple)
    for (arm, phase, _), (tokens, total) in sorted(sums.items()):
        speeds[arm, phase] += (tokens / total,)
    return speeds


def _spread(value: Value, samples: tuple[float, ...]) -> Spread:
    median, quartiles = check_speed(value)
    return Spread(
        median=median,
        quartiles=quartiles,
        samples=samples,
        rounds=int(value["rounds"].number(1)),
    )


def _ratio(value: Value) -> Ratio:
    return Ratio(
        arm=value["arm"].text(),
        over=value["over"].text(),
        ratio=value["ratio"].positive(),
        quartiles=read_quartiles(value["quartiles"]),
    )
