"""Reading the log of a training run, whose lines `prosparse.journal` describes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; one that a killed process did not finish is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_evaluation(log: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the last line of an evaluation on held-out text, an empty one if there is none."""
    return next((line for line in reversed(log) if "ppl" in line), {})
