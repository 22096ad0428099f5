"""PowerInfer and llama.cpp as the hybrid steps run them: rounds in which a failure stays alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from benchmarks.gpu.hybrid_vram import CONTEXT
from benchmarks.gpu.kit import Absent, Figure, Kit
from common.errors import EngineError
from common.machine import usable_threads
from powerinfer_bridge.benchmark.rounds import arm_order
from powerinfer_bridge.programs.llama_cpp import LlamaCpp
from powerinfer_bridge.programs.powerinfer import PowerInfer
from powerinfer_bridge.programs.sample import RunSample

PROMPT = "The first thing to know about"
TOKENS, _DRY_TOKENS = 64, 8
_TIMEOUT = 30.0
THREADS = 8
"""Of every run, if there are as many."""

_PATIENCE = 3
"""Runs of a step that may fail before it is given up: each may have hung until the timeout."""

_NO_CUDA = "skipped: this PowerInfer was built without CUDA, which has no VRAM"

Run = Callable[[], RunSample]
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Programs:
    """What runs the files.

    Attributes:
        powerinfer: PowerInfer's programs.
        llama_cpp: llama.cpp's, or None.
        cuda: whether PowerInfer has a card; only a dry run goes on without.
        threads: CPU threads of every run.
        tokens: decoded in a run, the first one included.
        failures: of runs, the others of a step go on.
    """

    powerinfer: PowerInfer
    llama_cpp: LlamaCpp | None
    cuda: bool
    threads: int
    tokens: int
    failures: list[EngineError] = field(default_factory=list)

    @property
    def exact_threads(self) -> int:
        """Most threads that do not overwrite each other's sums (docs/powerinfer.md, Threads)."""
        return 2 if self.cuda else 1

    def sparse(self, file: Path, budget: int | None, threads: int | None = None) -> RunSample:
        """Run a sparse file under a budget, with all threads unless told."""
        return self._generate(file, budget, None, threads)

    def dense(self, file: Path, layers: int) -> RunSample:
        """Run a dense file in PowerInfer's dense mode."""
        return self._generate(file, None, layers)

    def _generate(
        self, file: Path, budget: int | None, layers: int | None, threads: int | None = None
    ) -> RunSample:
        return self.powerinfer.generate(
            file,
            PROMPT,
            self.tokens,
            threads=threads or self.threads,
            context=CONTEXT,
            vram_budget=budget if self.cuda else None,
            n_gpu_layers=layers if self.cuda else None,
        )

    def llama_cpp_dense(self, file: Path, layers: int) -> RunSample:
        """Run a dense file in llama.cpp, which there must be."""
        assert self.llama_cpp is not None
        return self.llama_cpp.bench(file, 0, self.tokens, threads=self.threads, n_gpu_layers=layers)

    def perplexity(
        self, file: Path, text: str, chunks: int, budget: int, threads: int | None = None
    ) -> float | None:
        """Return a sparse file's perplexity; None if the run failed, which is kept.

        Args:
            file: to run.
            text: to score.
            chunks: windows of it, at most.
            budget: VRAM, bytes.
            threads: None for as many as add up exactly.
        """
        return self.attempt(
            lambda: self.powerinfer.perplexity(
                file,
                text,
                CONTEXT,
                chunks,
                threads=threads or self.exact_threads,
                vram_budget=budget if self.cuda else None,
            )
        )

    @property
    def skipped(self) -> dict[str, object]:
        """What figures must say where there is no card; nothing with one."""
        return {} if self.cuda else {"vram_budgets": _NO_CUDA}

    def attempt(self, run: Callable[[], Value]) -> Value | None:
        """Return what a run measured; None if it failed, which is kept.

        Raises:
            EngineError: it is one failure too many.
        """
        try:
            return run()
        except EngineError as error:
            self.failures.append(error)
            if len(self.failures) >= _PATIENCE:
                raise
            return None

    def rounds(self, arms: Mapping[str, Run], rounds: int) -> dict[str, list[RunSample]]:
        """Run every arm in every round, in turn; one that failed is not run again.

        Returns:
            Runs by their arm's title, without arms that failed at once.
        """
        titles, failed = list(arms), set[str]()
        runs: dict[str, list[RunSample]] = {title: [] for title in titles}
        for number in range(rounds):
            for title in (titles[index] for index in arm_order(len(titles), number)):
                run = None if title in failed else self.attempt(arms[title])
                if run is None:
                    failed.add(title)
                else:
                    runs[title].append(run)
        return {title: found for title, found in runs.items() if found}

    def tell_failures(self) -> None:
        """Do nothing if every run went well.

        Raises:
            EngineError: the first that did not.
        """
        if self.failures:
            raise self.failures[0]


def open_programs(kit: Kit) -> Programs:
    """Find the programs and start each once.

    Raises:
        Absent: no PowerInfer, or one without CUDA where a card is to be measured.
        EngineError: a program does not start.
    """
    if kit.powerinfer is None:
        raise Absent("no PowerInfer: pass --powerinfer-bin")
    powerinfer = PowerInfer(kit.powerinfer, timeout=_TIMEOUT)
    facts = powerinfer.check()
    if not facts.cuda and not kit.dry:
        raise Absent(f"{facts.path}: was built without CUDA")
    llama_cpp = None
    if kit.llama_cpp is not None:
        llama_cpp = LlamaCpp(kit.llama_cpp, timeout=_TIMEOUT)
        told = llama_cpp.check()
        if told.cuda is False and not kit.dry:
            raise Absent(f"{told.path}: was built without CUDA")
    return Programs(
        powerinfer=powerinfer,
        llama_cpp=llama_cpp,
        cuda=bool(facts.cuda),
        # With CUDA one of them drives the card.
        threads=max(2 if facts.cuda else 1, min(THREADS, usable_threads())),
        tokens=_DRY_TOKENS if kit.dry else TOKENS,
    )


def median(runs: Sequence[RunSample]) -> float:
    """Return the median of the runs' tokens per second."""
    return statistics.median(run.decode.tokens_per_second for run in runs)


def speed_figure(name: str, runs: Sequence[RunSample], **details: object) -> Figure:
    """Return how fast runs of one arm were, and what the first one said of itself."""
    return Figure(
        name=f"speed, {name}",
        value=median(runs),
        unit="tokens/s",
        details={
            "rounds": [run.decode.tokens_per_second for run in runs],
            "said": dict(runs[0].device),
            "notes": list(runs[0].notes),
            "command": list(runs[0].command),
            **details,
        },
    )
