"""`psp run`: the steps of a plan, each committed as it ends, and what came of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from common.errors import OutputError
from common.sealed import read_sealed
from common.table import fact_table
from common.typed_json import plain
from common.units import parse_size
from gguf_export.pwri.memory_plan import vram_option
from pipeline.layout import Layout
from pipeline.plan import Plan, Prepared
from pipeline.progress import Progress
from pipeline.state import RunState, Step, claimed
from powerinfer_bridge.benchmark.table import bench_table
from results.bench import BENCH, Bench

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run.

    Attributes:
        plan: what was planned.
        layout: where everything lies.
        taken: seconds of each step, those of earlier runs included.
        bench: the benchmark.
        verified: what `psp verify` found.
        vram_budget: for which neurons were chosen; None where they were not.
    """

    plan: Plan
    layout: Layout
    taken: Mapping[str, float]
    bench: Bench
    verified: Mapping[str, Any]
    vram_budget: str | None

    @property
    def paths(self) -> dict[str, Path]:
        """Every path that is there, by what it holds."""
        layout, bundle = self.layout, self.layout.bundle
        named = {
            "sparse model": layout.sparse_model,
            "held-out text": layout.held_out,
            "traces": layout.traces,
            "predictors": layout.predictors,
            "PowerInfer model": bundle.model_file,
            "PowerInfer predictors": bundle.predictor_directory,
            "activation statistics": bundle.activation_directory,
            "dense model": bundle.dense_file,
            "benchmark": layout.result,
            "report": layout.page,
        }
        return {name: path for name, path in named.items() if path.exists()}

    def document(self) -> dict[str, Any]:
        """Return all of it, ready for JSON."""
        return {
            "plan": plain(self.plan),
            "seconds": dict(self.taken),
            "paths": {name: str(path) for name, path in self.paths.items()},
            "verified": dict(self.verified),
            "bench": plain(self.bench),
        }


def execute(prepared: Prepared, note: Note = lambda line: None) -> Outcome:
    """Do what is left of a plan.

    A step whose settings and inputs hold what they held when it was done is passed over.

    Args:
        prepared: from `pipeline.plan.prepare`.
        note: takes a line for each step where standard error is no terminal, and why a step that
            was done before is done again.

    Raises:
        PspError: a step failed; what was finished stays, and the same with `--resume` goes on.
    """
    config, state = prepared.config, prepared.state
    with (
        claimed(config.out, resume=config.resume, force=config.force),
        closing(Progress(prepared.plan.seconds, note)) as progress,
    ):
        for step in prepared.steps:
            if state.finished(step):
                progress.passed(step.name)
                continue
            if step.name in state.steps and state.steps[step.name].done:
                note(f"{step.name}: its settings, inputs or result have changed, done again")
            with progress.step(step.name):
                _do(step, state)
    return _outcome(prepared)


def _do(step: Step, state: RunState) -> None:
    begun = time.monotonic()
    step.work(state.begin(step))
    state.commit(step, time.monotonic() - begun)


def _outcome(prepared: Prepared) -> Outcome:
    layout = Layout.of(prepared.config)
    return Outcome(
        plan=prepared.plan,
        layout=layout,
        taken={step.name: prepared.state.steps[step.name].seconds for step in prepared.steps},
        bench=BENCH.read(layout.result),
        verified=read_sealed(layout.verified, OutputError, "pass --force to start over"),
        vram_budget=prepared.config.vram_budget,
    )


def outcome_table(outcome: Outcome) -> str:
    """Return the benchmark's table, the paths, and what to run next."""
    file = outcome.layout.bundle.model_file
    checks = len(outcome.verified["checks"])
    facts = {**outcome.paths, "verified": f"{checks} checks hold"}
    granted = outcome.vram_budget
    budget = "" if granted is None else f" --vram-budget {vram_option(parse_size(granted))[0]}"
    # More threads spoil the text: ProgramFacts.exact_threads.
    threads = 2 if budget else 1
    command = f"main -m {quote(str(file))} -n 128 -t {threads} -p 'Once upon a time'{budget}"
    return "\n\n".join(
        [bench_table(outcome.bench), fact_table(facts), f"run it with PowerInfer: {command}"]
    )
