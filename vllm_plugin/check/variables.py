"""The variables by which a served model's FFNs and statistics are set."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from common.errors import SettingsError, printable
from common.finding import Finding, from_error, note, ok, problem
from vllm_plugin.switches import SPARSE, STATISTICS, read_switches


def variable_findings(
    environment: Mapping[str, str], *, served: bool, parts: int
) -> Iterator[Finding]:
    """Judge those that are set.

    Args:
        environment: variables by name.
        served: whether the plugin serves the model.
        parts: tensor-parallel size.
    """
    for name, judge in ((SPARSE, _sparse), (STATISTICS, _statistics)):
        if value := environment.get(name, "").strip():
            if served:
                yield from judge(value, parts)
            else:
                yield note(name, "without effect: vLLM runs this model by itself")


def _sparse(value: str, parts: int) -> Iterator[Finding]:
    try:
        sparse = read_switches({SPARSE: value}).sparse
    except SettingsError as error:
        yield from_error(SPARSE, error)
        return
    if sparse:
        yield ok(SPARSE, "1: steps of few tokens leave out neurons that are zero, where that pays")
    else:
        yield ok(SPARSE, "0: FFNs compute every neuron")


def _statistics(value: str, parts: int) -> Iterator[Finding]:
    shown, directory = printable(value), Path(value)
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not nearest.is_dir():
        yield problem(STATISTICS, f"{nearest} is a file", "name a directory")
    elif not os.access(nearest, os.W_OK | os.X_OK):
        yield problem(STATISTICS, f"{shown}: may not be written to", "name one of your own")
    elif parts > 1:
        found = f"counts are of whole FFNs, --tensor-parallel-size {parts} cuts them: none are kept"
        yield problem(STATISTICS, found, f"unset {STATISTICS}, or pass --tensor-parallel-size 1")
    else:
        yield ok(STATISTICS, f"counts of active neurons go to {shown}")
