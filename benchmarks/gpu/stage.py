"""A stage in a process of its own, which neither memory nor a hang of it outlives."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.kit import Absent, Kit, Step
from common.errors import PspError, printable
from results.card import StepEnd


def run_stage(kit: Kit, stage: str, steps: Sequence[Step], seconds: float) -> None:
    """Run steps until they end or the time is over; whatever happens is in the journal.

    Args:
        kit: what the steps work with.
        stage: its name.
        steps: of it, made of functions that a new process can import.
        seconds: after which the process is killed, with all that it has started.
    """
    journal = Journal(kit.out)
    before = len(journal.ends())
    process = get_context("spawn").Process(target=run_steps, args=(kit, stage, steps))
    start = time.monotonic()
    process.start()
    try:
        process.join(seconds)
    finally:
        _end(process)
    ended = {end.step for end in journal.ends()[before:]}
    missing = [step.name for step in steps if step.name not in ended]
    late = time.monotonic() - start >= seconds
    for number, step in enumerate(missing):
        if number:
            end, line = "left out", "the stage ended before it"
        elif late:
            end, line = "stopped", f"the stage ran into its limit of {seconds:.0f} s"
        else:
            end, line = "failed", f"its process ended with code {process.exitcode}"
        took = time.monotonic() - start if not number else 0.0
        journal.end(
            StepEnd(stage=stage, step=step, end=end, line=line, seconds=took)  # type: ignore[arg-type]
        )


def run_steps(kit: Kit, stage: str, steps: Sequence[Step]) -> None:
    """Run steps one after the other in this process, the first of a session of its own."""
    os.setsid()
    _end_with_parent()
    journal = Journal(kit.out)
    for step in steps:
        _run_step(kit, journal, stage, step)


def _run_step(kit: Kit, journal: Journal, stage: str, step: Step) -> None:
    start, end, line = time.monotonic(), "done", ""
    try:
        for figure in step.run(kit):
            # A dry run's figures tell that the code runs, not how well.
            told = replace(figure, most=None, least=None) if kit.dry else figure
            journal.figure(stage, step.name, told)
    except Absent as absent:
        end, line = "absent", str(absent)
    except PspError as error:
        end, line = "failed", str(error)
    except Exception as error:  # one step's end, whatever it is, is not the others'
        end, line = "failed", printable(f"{type(error).__name__}: {error}", 600)
        _show(error)
    seconds = time.monotonic() - start
    journal.end(
        StepEnd(stage=stage, step=step.name, end=end, line=line, seconds=seconds)  # type: ignore[arg-type]
    )


def _end_with_parent() -> None:
    """Let no stage go on, with the card, that nobody waits for: its parent may be killed."""
    parent = parent_process()
    if parent is None:
        return

    def follow() -> None:
        parent.join()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()


def _show(error: Exception) -> None:
    import traceback

    traceback.print_exception(error)


def _end(process: BaseProcess) -> None:
    if process.pid is not None:
        # Its session is named after it, unless it has not come so far.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
