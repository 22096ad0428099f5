"""What the vLLM plugin costs and saves, measured in vLLM's engine on this machine's CPU.

Run it with the Python of an environment that has vLLM and psp. It makes random models in `--out`,
keeps an engine for each arm, in processes of their own whose logs go there too, and lets the arms
take turns. Prints one JSON line for each comparison:

    throughput  tokens/s at batch 16: the plugin against `model_impl="transformers"`, also with
                PSP_VLLM_SPARSE=1, whose weights are not packed
    ffn         time in the FFNs of a decode step, 7B widths, 12 % of the neurons active: vLLM's
                dense products against PSP_VLLM_SPARSE=1, for batches 1, 4, 8 and 16; and
                prefilling, where both go dense, but only the former's weights are packed
    statistics  tokens/s with PSP_VLLM_STATS and without, decoding and prefilling, in one engine

Engines wait for their slowest thread, so other work on the machine shows many times over: `best`
is what hangs on it least. Two engines of the same kind may differ by 20 % from start to start; run
a part again before believing less. OMP_NUM_THREADS sets the engines' threads.

    python benchmarks/serving.py --tokenizer tokenizer.model --out DIR [--part ffn]
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from benchmarks.engines import (
    Arm,
    Load,
    Served,
    Setup,
    active_shares,
    count,
    serve,
    sparse_limits,
    started,
)
from benchmarks.exact_density import FixtureShape
from benchmarks.shared import print_line
from benchmarks.speed_fixture import FILE, FixtureConfig, write_model
from common.errors import PspError
from vllm_plugin.switches import SPARSE, STATISTICS

Numbers = dict[str, Any]

_SMALL = FixtureShape(density=0.5, d_model=1024, d_ff=4096, n_heads=16, n_layers=8)
_WIDE = FixtureShape(density=0.12, n_layers=2)
_BATCH, _BATCHES = 16, (1, 4, 8, 16)
_PROMPT, _LONG_PROMPT = 32, 256


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all parts share.

    Attributes:
        tokenizer: its pieces are the random models' vocabulary.
        out: directory for models and logs.
        dtypes: element types.
        rounds: that count.
        tokens: generated for each request.
        model: checkpoint for `throughput` instead of a random one.
    """

    tokenizer: Path
    out: Path
    dtypes: tuple[str, ...]
    rounds: int
    tokens: int
    model: Path | None

    def made(self, shape: FixtureShape) -> Path:
        """Return a random model of a shape, made when first asked for."""
        path = self.out / f"reglu-{shape.d_model}-{shape.d_ff}-{shape.n_layers}"
        if not path.exists():
            with TemporaryDirectory(dir=self.out, prefix=".model-") as work:
                config = FixtureConfig(shape=shape, tokenizer=self.tokenizer, out=self.out)
                write_model(Path(work) / path.name, config).rename(path)
        return path

    def arms(
        self, part: str, base: Setup, changes: Mapping[str, Numbers]
    ) -> AbstractContextManager[dict[str, Arm]]:
        """Start engines that differ from a base in the given fields."""
        how = f"{part}-{base.dtype}-{'eager' if base.eager else 'compiled'}"
        logs = {arm: self.out / f"{how}-{arm}.log" for arm in changes}
        return started({arm: replace(base, log=logs[arm], **changes[arm]) for arm in changes})

    def rounds_of(self, arms: Mapping[str, Arm], load: Load) -> dict[str, list[Served]]:
        """Serve a load in turn, first a round that does not count; every other one backwards."""
        served: dict[str, list[Served]] = {name: [] for name in arms}
        for turn in range(self.rounds + 1):
            for name in list(arms)[:: -1 if turn % 2 else 1]:
                served[name].append(arms[name].call(serve, load))
        return {name: runs[1:] for name, runs in served.items()}


def throughput(bench: Bench, dtype: str) -> None:
    """Compare the plugin with vLLM's own way to run any model of transformers."""
    model = bench.model or bench.made(_SMALL)
    load = Load(requests=_BATCH, prompt=_PROMPT, tokens=bench.tokens)
    for eager, variables in product((False, True), ({}, {SPARSE: "1"})):
        base = Setup(model=model, dtype=dtype, eager=eager, log=bench.out)
        changes: dict[str, Numbers] = {
            "transformers": {"options": {"model_impl": "transformers"}},
            "plugin": {"variables": variables},
        }
        with bench.arms("throughput", base, changes) as arms:
            speeds = _whole_speeds(bench.rounds_of(arms, load), load)
            _tell("throughput", base, load, arms, {"variables": variables, **speeds})


def ffn(bench: Bench, dtype: str) -> None:
    """Compare vLLM's dense products with the sparse operators."""
    base = Setup(model=bench.made(_WIDE), dtype=dtype, eager=True, log=bench.out, timed=True)
    with TemporaryDirectory() as place:
        counted = {"counted": {"variables": {STATISTICS: place}}}
        with bench.arms("ffn", base, counted) as arms:
            arms["counted"].call(serve, Load(requests=4, prompt=_PROMPT, tokens=bench.tokens))
            shares = arms["counted"].call(active_shares)
    with bench.arms("ffn", base, {"dense": {}, "sparse": {"variables": {SPARSE: "1"}}}) as arms:
        for batch in _BATCHES:
            load = Load(requests=batch, prompt=_PROMPT, tokens=bench.tokens)
            served = bench.rounds_of(arms, load)
            limit = arms["sparse"].call(sparse_limits, _BATCHES)[batch]
            taken = sum((each.taken for each in served["sparse"]), Counter[str]())
            numbers = {"active_shares": shares, "limit": limit, "taken": taken}
            numbers |= {"ffn_ms": _compared(_times(served), 2, min)}
            numbers |= {"decode_tokens_per_second": _compared(_decode_speeds(served, load), 2, max)}
            _tell("ffn", base, load, arms, {**numbers, **_same_ids(served)})
        load = Load(requests=_BATCH, prompt=_LONG_PROMPT, tokens=1)
        _tell("ffn", base, load, arms, _whole_speeds(bench.rounds_of(arms, load), load))


def counting(bench: Bench, dtype: str) -> None:
    """Compare counting active neurons with not counting them, by turns in one engine."""
    decode = Load(requests=_BATCH, prompt=_PROMPT, tokens=bench.tokens)
    prefill = Load(requests=_BATCH, prompt=_LONG_PROMPT, tokens=1)
    for shape in (_SMALL, _WIDE):
        base = Setup(model=bench.made(shape), dtype=dtype, eager=True, log=bench.out)
        with TemporaryDirectory() as place:
            counted = {"counted": {"variables": {STATISTICS: place}}}
            with bench.arms(f"statistics-{shape.d_model}", base, counted) as arms:
                for load in (decode, prefill):
                    served: dict[str, list[Served]] = {"plain": [], "counted": []}
                    for turn in range(2 * bench.rounds + 2):
                        how = list(served)[(turn + turn // 2) % 2]
                        arms["counted"].call(count, how == "counted")
                        served[how].append(arms["counted"].call(serve, load))
                    rounds = {how: runs[1:] for how, runs in served.items()}
                    _tell("statistics", base, load, arms, _whole_speeds(rounds, load))


def _times(served: Mapping[str, list[Served]]) -> dict[str, list[float]]:
    return {name: [1000 * each.ffn for each in runs] for name, runs in served.items()}


def _decode_speeds(served: Mapping[str, list[Served]], load: Load) -> dict[str, list[float]]:
    return {name: [load.requests / each.step for each in runs] for name, runs in served.items()}


def _whole_speeds(served: Mapping[str, list[Served]], load: Load) -> Numbers:
    """Return tokens/s from the first request to the last token; of the prompts if that is one."""
    size = load.requests * (load.tokens if load.tokens > 1 else load.prompt)
    speeds = {name: [size / each.seconds for each in runs] for name, runs in served.items()}
    return {"tokens_per_second": _compared(speeds, 1, max), **_same_ids(served)}


def _compared(values: Mapping[str, list[float]], digits: int, best: Any) -> Numbers:
    """Return two arms' samples, and the second's over the first's, round by round and at best."""
    one, other = values.values()
    ratios = [right / left for left, right in zip(one, other, strict=True)]
    arms = {
        name: {
            "median": round(statistics.median(each), digits),
            "best": round(best(each), digits),
            "samples": [round(value, digits) for value in each],
        }
        for name, each in values.items()
    }
    summary = {"median": statistics.median(ratios), "best": best(other) / best(one)}
    return {**arms, "ratio": {name: round(value, 3) for name, value in summary.items()}}


def _same_ids(served: Mapping[str, list[Served]]) -> Numbers:
    """Say for how many requests the first round's greedy ids are equal, else where they part."""
    one, other = (runs[0].ids for runs in served.values())
    pairs = [list(zip(*each, strict=True)) for each in zip(one, other, strict=True)]
    parts = [next((at for at, (a, b) in enumerate(each) if a != b), None) for each in pairs]
    return {"equal_ids": parts.count(None), "parting_at": [at for at in parts if at is not None]}


def _tell(part: str, setup: Setup, load: Load, arms: Mapping[str, Arm], numbers: Numbers) -> None:
    what = {"part": part, "model": setup.model.name, "dtype": setup.dtype, "eager": setup.eager}
    asked = {"requests": load.requests, "prompt": load.prompt, "tokens": load.tokens}
    print_line({**what, **asked, **numbers, **next(iter(arms.values())).facts})


PARTS = {"throughput": throughput, "ffn": ffn, "statistics": counting}


@click.command()
@click.option("--tokenizer", type=FILE, required=True, help="A LLaMA's tokenizer.model.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory.")
@click.option("--part", "parts", type=click.Choice(list(PARTS)), multiple=True, default=PARTS)
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="For throughput.")
@click.option("--dtype", "dtypes", multiple=True, default=("bfloat16", "float32"))
@click.option("--rounds", default=5, show_default=True)
@click.option("--tokens", default=64, show_default=True, help="Generated for each request.")
def main(parts: tuple[str, ...], out: Path, **settings: Any) -> None:
    """Run the comparisons."""
    bench = Bench(out=out, **settings)
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        for dtype in bench.dtypes:
            try:
                PARTS[part](bench, dtype)
            except PspError as error:
                print_line({"part": part, "dtype": dtype, "failed": str(error)})


if __name__ == "__main__":
    main()
