"""Arms, each an engine with a file behind one face, and the rounds in which they are timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gguf_export.pwri.schema import DENSE_THRESHOLD
from powerinfer_bridge.benchmark.beside import DenseFile, element_type
from powerinfer_bridge.benchmark.journal import Journal, Sample
from powerinfer_bridge.benchmark.setup import Setup
from powerinfer_bridge.engine.engine import Engine, generate
from powerinfer_bridge.programs.sample import Phase, RunSample
from results.bench import (
    ALL_NEURONS,
    DENSE_LLAMA_CPP_SILU,
    DENSE_POWERINFER,
    EMBEDDED,
    LLAMA_CPP,
    POWERINFER,
    PREDICTED,
    SECOND,
    SECOND_ENGINE,
    Arm,
    ArmFacts,
    ArmName,
    Continuations,
    RoundSpeeds,
    SampleRow,
    round_speeds,
)
from results.parts import Ratio, RatioOver

Run = Callable[[str], RunSample]


@dataclass(frozen=True, kw_only=True)
class TimedArm:
    """One thing to time.

    Attributes:
        facts: what it is.
        run: continues a prompt once.
    """

    facts: ArmFacts
    run: Run

    @property
    def name(self) -> ArmName:
        """Its name."""
        return self.facts.name


def make_arms(setup: Setup) -> list[TimedArm]:
    """Return the arms in the tables' order."""
    sparse = [_sparse_arm(setup, threshold) for threshold in (DENSE_THRESHOLD, None)]
    return [*sparse, *_second_arms(setup), *_dense_arms(setup)]


def _sparse_arm(setup: Setup, threshold: float | None) -> TimedArm:
    """Return the sparse file in PowerInfer, or else in the embedded engine."""
    config, real = setup.config, setup.programs.powerinfer
    engine = EMBEDDED if real is None else POWERINFER
    predicted, budget = threshold is None, config.vram_budget_bytes
    facts = ArmFacts(
        name=PREDICTED if predicted else ALL_NEURONS,
        title=f"{engine}, {'predicted neurons' if predicted else 'all neurons'}",
        engine=engine,
        file=str(config.file),
        element_type=element_type(setup.file),
        threads=torch.get_num_threads() if real is None else config.threads,
        vram_budget_bytes=budget,
        threshold=threshold,
    )
    if real is None:
        return TimedArm(facts=facts, run=_embedded(setup.engine, config.generate, threshold))
    run = partial(_powerinfer(setup, config.file), threshold=threshold, vram_budget=budget)
    return TimedArm(facts=facts, run=run)


def _second_arms(setup: Setup) -> Iterator[TimedArm]:
    """Yield the model in PowerInfer's second engine, if it is given."""
    second, config = setup.programs.second, setup.config
    if second is None:
        return
    facts = ArmFacts(
        name=SECOND,
        title=SECOND_ENGINE,
        engine=SECOND_ENGINE,
        file=str(second.file.path),
        element_type=second.file.element_type,
        threads=config.threads,
    )
    run = partial(
        second.engine.generate,
        second.file.path,
        count=config.generate,
        threads=config.threads,
        context=setup.room,
        seed=config.seed,
    )
    yield TimedArm(facts=facts, run=run)


def _dense_arms(setup: Setup) -> Iterator[TimedArm]:
    programs = setup.programs
    if programs.powerinfer_dense is not None:
        # A build without CUDA does not know the option.
        layers = setup.config.n_gpu_layers or None
        facts = _dense_facts(setup, DENSE_POWERINFER, POWERINFER, programs.powerinfer_dense)
        run = partial(_powerinfer(setup, programs.powerinfer_dense.path), n_gpu_layers=layers)
        yield TimedArm(facts=facts, run=run)
    for name, file in programs.llama_cpp_files.items():
        facts = _dense_facts(setup, name, LLAMA_CPP, file)
        yield TimedArm(facts=facts, run=_llama_cpp(setup, file))


def _dense_facts(setup: Setup, name: ArmName, engine: str, file: DenseFile) -> ArmFacts:
    return ArmFacts(
        name=name,
        title=f"{engine}, dense file" + (", SiLU" if name == DENSE_LLAMA_CPP_SILU else ""),
        engine=engine,
        file=str(file.path),
        element_type=file.element_type,
        threads=setup.config.threads,
        n_gpu_layers=setup.config.n_gpu_layers,
    )


def _embedded(engine: Engine, count: int, threshold: float | None) -> Run:
    own = engine if threshold is None else engine.with_threshold(threshold)

    def run(prompt: str) -> RunSample:
        start = time.perf_counter()
        made = generate(own, prompt, count)
        wall = time.perf_counter() - start
        tokens = len(own.vocabulary.prompt_ids(prompt))
        return RunSample(
            text=made.text,
            load_seconds=None,
            # Tokenising is in it; it is microseconds.
            prompt=Phase(seconds=max(wall - made.seconds, 1e-9), tokens=tokens),
            decode=Phase(seconds=made.seconds, tokens=count - 1),
            wall_seconds=wall,
        )

    return run


def _powerinfer(setup: Setup, file: Path) -> Callable[..., RunSample]:
    """Return runs of PowerInfer with what all its arms share."""
    config, program = setup.config, setup.programs.powerinfer
    assert program is not None
    return partial(
        program.generate,
        file,
        count=config.generate,
        threads=config.threads,
        context=setup.room,
        seed=config.seed,
    )


def _llama_cpp(setup: Setup, file: DenseFile) -> Run:
    """Return runs of the same sizes; llama.cpp is timed on tokens of its own choice."""
    config, program = setup.config, setup.programs.llama_cpp
    assert program is not None

    def run(prompt: str) -> RunSample:
        return program.bench(
            file.path,
            len(setup.engine.vocabulary.prompt_ids(prompt)),
            config.generate,
            threads=config.threads,
            n_gpu_layers=config.n_gpu_layers,
        )

    return run


def arm_order(count: int, step: int) -> list[int]:
    """Return the order of `count` arms at a step.

    What ran before warms or cools the next run: caches, clocks, heat. Rotation alone would leave
    an arm after the same neighbour in nearly all rounds, and reversal the middle one in the middle.
    Over `count` steps, twice that if odd, every arm stands in every place and follows every other
    equally often (E. J. Williams, Experimental designs balanced for the estimation of residual
    effects of treatments, Aust. J. Sci. Res. A 2, 1949).
    """
    # 0, 1, n-1, 2, n-2, ...: the differences of neighbours are all different.
    base = [(place + 1) // 2 if place % 2 else count - place // 2 for place in range(count)]
    shift, backwards = divmod(step, 2) if count % 2 else (step, 0)
    order = [(number + shift) % count for number in base]
    return order[::-1] if backwards else order


def run_rounds(setup: Setup, arms: Sequence[TimedArm], journal: Journal) -> list[Sample]:
    """Return the samples of all rounds; those that the journal has are not run again.

    Rounds up to 0 warm up and are not kept. After an interruption they are run again, because the
    machine may have cooled; where nothing is left to measure they are not.
    """
    config, prompts, heartbeat = setup.config, setup.prompts, setup.programs.heartbeat
    kept = {(sample.round, sample.prompt, sample.arm) for sample in journal.samples}
    planned = [
        (number, prompt, arms[index])
        for number in range(1 - config.warm_up, config.repeats + 1)
        for prompt in range(len(prompts))
        for index in arm_order(len(arms), number - 1 + config.warm_up + prompt)
    ]
    left = [step for step in planned if step[0] < 1 or (step[0], step[1], step[2].name) not in kept]
    if all(number < 1 for number, _, _ in left):
        return journal.samples
    for number, prompt, arm in (bar := tqdm(left, unit="run", disable=None)):
        heartbeat.bar = bar
        bar.set_description(f"{arm.name}, {f'round {number}' if number > 0 else 'warm-up'}")
        run = arm.run(prompts[prompt])
        bar.set_postfix_str(f"{run.decode.tokens_per_second:.2f} tokens/s")
        if number > 0:
            journal.add(Sample(arm=arm.name, round=number, prompt=prompt, run=run))
    return journal.samples


def spread(speeds: Sequence[float]) -> RoundSpeeds:
    """Return median, quartiles (linear between ranks) and range of the rounds' speeds."""
    return RoundSpeeds(
        tokens_per_second=statistics.median(speeds),
        quartiles=quartiles(speeds),
        range=(min(speeds), max(speeds)),
        rounds=len(speeds),
    )


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the lower and the upper quartile."""
    low, high = np.quantile(values, (0.25, 0.75)).tolist()
    return low, high


def speedup(rows: Sequence[SampleRow], arm: str, over: str) -> Ratio:
    """Return how much faster one arm decodes than another.

    The ratio is that of the medians; the quartiles are those of the ratios within a round, whose
    runs are neighbours in time and so share what else the machine did.
    """
    ours, theirs = (round_speeds(rows, name, "decode") for name in (arm, over))
    return Ratio(
        arm=arm,
        over=over,
        ratio=statistics.median(ours.values()) / statistics.median(theirs.values()),
        quartiles=quartiles([ours[number] / theirs[number] for number in ours if number in theirs]),
    )


def summarise(arm: TimedArm, samples: Sequence[Sample], rows: Sequence[SampleRow]) -> Arm:
    """Return an arm with its figures.

    Args:
        arm: the arm.
        samples: of all arms.
        rows: their figures.
    """
    runs = [sample.run for sample in samples if sample.arm == arm.name]
    prompt = list(round_speeds(rows, arm.name, "prompt").values())
    loads = [run.load_seconds for run in runs if run.load_seconds is not None]
    over = None
    if arm.name != ALL_NEURONS:
        ratio = speedup(rows, arm.name, ALL_NEURONS)
        over = RatioOver(over=ratio.over, ratio=ratio.ratio, quartiles=ratio.quartiles)
    return Arm(
        **vars(arm.facts),
        decode=spread(list(round_speeds(rows, arm.name, "decode").values())),
        prompt=spread(prompt) if prompt else None,
        speedup=over,
        load_seconds=statistics.median(loads) if loads else None,
        command=runs[0].command,
        environment=dict(runs[0].environment),
        notes=tuple(dict.fromkeys(note for run in runs for note in run.notes)),
        device=runs[0].device,
    )


def compare_texts(samples: Sequence[Sample]) -> tuple[Continuations, bool]:
    """Return both continuations of the first prompt, and whether all pairs are the same.

    Texts are those of the first round.
    """
    texts: dict[str, dict[int, str | None]] = {PREDICTED: {}, ALL_NEURONS: {}}
    for sample in samples:
        if sample.round == 1 and sample.arm in texts:
            texts[sample.arm][sample.prompt] = sample.run.text
    sparse, dense = texts[PREDICTED], texts[ALL_NEURONS]
    return Continuations(sparse=sparse[0] or "", dense=dense[0] or ""), sparse == dense
