"""The arms of a benchmark: each an engine with a file, behind one face."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from gguf_export.pwri.schema import DENSE_THRESHOLD
from powerinfer_bridge.benchmark.setup import DenseFile, Setup, element_type
from powerinfer_bridge.engine.engine import Engine, generate
from powerinfer_bridge.programs.sample import Phase, RunSample
from results.bench import (
    ALL_NEURONS,
    DENSE_LLAMA_CPP,
    DENSE_POWERINFER,
    EMBEDDED,
    LLAMA_CPP,
    POWERINFER,
    PREDICTED,
    ArmFacts,
    ArmName,
)

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
    return [*sparse, *_dense_arms(setup)]


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


def _dense_arms(setup: Setup) -> Iterator[TimedArm]:
    programs = setup.programs
    if programs.powerinfer_dense is not None:
        # A build without CUDA does not know the option.
        layers = setup.config.n_gpu_layers or None
        facts = _dense_facts(setup, DENSE_POWERINFER, POWERINFER, programs.powerinfer_dense)
        run = partial(_powerinfer(setup, programs.powerinfer_dense.path), n_gpu_layers=layers)
        yield TimedArm(facts=facts, run=run)
    if programs.llama_cpp_dense is not None:
        facts = _dense_facts(setup, DENSE_LLAMA_CPP, LLAMA_CPP, programs.llama_cpp_dense)
        yield TimedArm(facts=facts, run=_llama_cpp(setup, programs.llama_cpp_dense))


def _dense_facts(setup: Setup, name: ArmName, engine: str, file: DenseFile) -> ArmFacts:
    return ArmFacts(
        name=name,
        title=f"{engine}, dense file",
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
