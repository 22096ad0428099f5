"""The arms of a benchmark: each an engine with a file, behind one face."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gguf_export.pwri.reader import GGUFFile
from gguf_export.pwri.schema import DENSE_THRESHOLD
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.benchmark.subject import Subject, element_type
from powerinfer_bridge.engine.engine import Engine, generate
from powerinfer_bridge.programs.powerinfer import PowerInfer
from powerinfer_bridge.programs.sample import Phase, RunSample

PREDICTED, ALL_NEURONS = "predicted", "all_neurons"
DENSE_POWERINFER, DENSE_LLAMA_CPP = "dense_powerinfer", "dense_llama_cpp"
ARM_NAMES = (ALL_NEURONS, PREDICTED, DENSE_POWERINFER, DENSE_LLAMA_CPP)
"""In the tables' order."""

EMBEDDED = "embedded engine"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One thing measured.

    Attributes:
        name: one of `ARM_NAMES`.
        title: for readers.
        engine: `PowerInfer`, `llama.cpp` or `EMBEDDED`.
        file: what it runs.
        element_type: type of most of the file's bytes.
        threads: CPU threads.
        n_gpu_layers: layers offloaded, None where neurons are placed instead.
        vram_budget_bytes: VRAM that PowerInfer may take, None for its own choice.
        threshold: replaces the file's; None keeps it.
        run: continues a prompt once.
    """

    name: str
    title: str
    engine: str
    file: Path
    element_type: str
    threads: int
    n_gpu_layers: int | None = None
    vram_budget_bytes: int | None = None
    threshold: float | None = None
    run: Callable[[str], RunSample]

    def facts(self) -> dict[str, Any]:
        """Return what does not change from run to run, ready for JSON."""
        return {
            "name": self.name,
            "title": self.title,
            "engine": self.engine,
            "file": str(self.file),
            "element_type": self.element_type,
            "threads": self.threads,
            "n_gpu_layers": self.n_gpu_layers,
            "vram_budget_bytes": self.vram_budget_bytes,
            "threshold": self.threshold,
        }


def make_arms(config: BenchConfig, subject: Subject, room: int) -> list[Arm]:
    """Return the arms in the tables' order.

    Args:
        config: settings.
        subject: files and programs.
        room: tokens that the longest prompt and its continuation take; PowerInfer's context.
    """
    arms = [_sparse_arm(config, subject, room, DENSE_THRESHOLD)]
    arms.append(_sparse_arm(config, subject, room, None))
    arms += _dense_arms(config, subject, room)
    return arms


def _sparse_arm(config: BenchConfig, subject: Subject, room: int, threshold: float | None) -> Arm:
    """Return the sparse file in PowerInfer, or else in the embedded engine."""
    real = subject.powerinfer
    engine = EMBEDDED if real is None else "PowerInfer"
    predicted, budget = threshold is None, config.vram_budget_bytes
    return Arm(
        name=PREDICTED if predicted else ALL_NEURONS,
        title=f"{engine}, {'predicted neurons' if predicted else 'all neurons'}",
        engine=engine,
        file=config.file,
        element_type=element_type(subject.file),
        threads=torch.get_num_threads() if real is None else config.threads,
        vram_budget_bytes=budget,
        threshold=threshold,
        run=_embedded(subject.engine, config.generate, threshold)
        if real is None
        else _powerinfer(real, config, config.file, room, threshold=threshold, vram_budget=budget),
    )


def _dense_arms(config: BenchConfig, subject: Subject, room: int) -> Iterator[Arm]:
    real = subject.powerinfer
    if real is not None and subject.dense is not None:
        # A build without CUDA does not know the option.
        layers = config.n_gpu_layers or None
        run = _powerinfer(real, config, subject.dense.path, room, n_gpu_layers=layers)
        yield _dense_arm(DENSE_POWERINFER, "PowerInfer", subject.dense, config, run)
    if subject.llama_cpp_file is not None:
        run = _llama_cpp(config, subject)
        yield _dense_arm(DENSE_LLAMA_CPP, "llama.cpp", subject.llama_cpp_file, config, run)


def _dense_arm(
    name: str, engine: str, file: GGUFFile, config: BenchConfig, run: Callable[[str], RunSample]
) -> Arm:
    return Arm(
        name=name,
        title=f"{engine}, dense file",
        engine=engine,
        file=file.path,
        element_type=element_type(file),
        threads=config.threads,
        n_gpu_layers=config.n_gpu_layers,
        run=run,
    )


def _embedded(engine: Engine, count: int, threshold: float | None) -> Callable[[str], RunSample]:
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


def _powerinfer(
    real: PowerInfer, config: BenchConfig, file: Path, room: int, **own: Any
) -> Callable[[str], RunSample]:
    """Return runs of PowerInfer; `own` is what the arm has for itself."""

    def run(prompt: str) -> RunSample:
        return real.generate(
            file,
            prompt,
            config.generate,
            threads=config.threads,
            context=room,
            seed=config.seed,
            **own,
        )

    return run


def _llama_cpp(config: BenchConfig, subject: Subject) -> Callable[[str], RunSample]:
    """Return runs of the same sizes; llama.cpp is timed on tokens of its own choice."""
    program, file = subject.llama_cpp, subject.llama_cpp_file
    assert program is not None
    assert file is not None

    def run(prompt: str) -> RunSample:
        return program.bench(
            file.path,
            len(subject.engine.vocabulary.prompt_ids(prompt)),
            config.generate,
            threads=config.threads,
            n_gpu_layers=config.n_gpu_layers,
        )

    return run
