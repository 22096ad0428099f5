"""What a training run tells: a progress bar, JSON lines and (by transformers) TensorBoard.

`log.jsonl` has one object a line:

- of training, averages since the line before: `step`, `stage` (number), `kind`, `lambda` (of that
  step), `loss` (what is minimised), `lm_loss` (next-token loss), `l1` (the L1 term without λ),
  `sparsity` (one number a layer), `learning_rate`, `grad_norm`;
- of an evaluation on held-out text: `step`, `stage`, `kind`, `lambda`, `lm_loss`, `ppl` and
  `sparsity`. Only these have `ppl`.

Each line has a checksum as a journal's has it, see `common.json_lines`. A log in which none has one
is of an older version and is read as it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from common.errors import OutputError
from common.files import read_whole, write_bytes
from common.json_lines import append, line_of, outlasts_its_object
from common.sealed import SEAL, unsealed
from prosparse.schedule import Schedule

Line = dict[str, Any]
"""A line, as above."""

_AGAIN = "use --force to train anew"
_LAYER = "sparsity_layer_"
_COPIED = ("loss", "lm_loss", "l1", "learning_rate", "grad_norm")


def read_log(path: Path) -> list[Line]:
    """Return the lines of a log; one that a killed process did not finish is left out.

    Raises:
        OutputError: unreadable, or a line is damaged.
    """
    log: list[Line] = []
    entries = _entries(path)
    sealed = any(isinstance(each, dict) and SEAL in each for each in entries)
    for number, entry in enumerate(entries, 1):
        line = _line(entry, sealed=sealed)
        if line is None or len(line["sparsity"]) != len((log or [line])[0]["sparsity"]):
            raise OutputError(f"{path}: line {number} is damaged", _AGAIN)
        log.append(line)
    return log


def _entries(path: Path) -> list[Any]:
    """Return what the finished lines hold, None of one that is no JSON."""
    if not path.exists():
        return []
    *lines, rest = read_whole(path, OutputError, _AGAIN).split(b"\n")
    return [_parsed(line) for line in ([*lines, rest] if outlasts_its_object(rest) else lines)]


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _line(entry: Any, *, sealed: bool) -> Line | None:
    """Return an entry without its checksum, None if it is damaged."""
    if not isinstance(entry, dict) or (sealed and SEAL not in entry):
        return None
    try:
        line = unsealed(entry)
    except (ValueError, RecursionError):
        return None
    return line if _is_line(line) else None


def _is_line(entry: Line) -> bool:
    """Whether an object has what others read of a line; a loss may be no finite number."""
    if not isinstance(entry.get("sparsity"), list):
        return False
    figures = [entry.get("lambda"), entry.get("ppl", 0.0), *entry["sparsity"]]
    steps = [entry.get("step"), entry.get("stage")]
    return (
        bool(entry["sparsity"])
        and all(type(each) is int and each >= 0 for each in steps)
        and all(type(each) in (int, float) for each in figures)
    )


def last_evaluation(log: Sequence[Line]) -> Line:
    """Return the last line of an evaluation on held-out text, an empty one if there is none."""
    return next((line for line in reversed(log) if "ppl" in line), {})


class Journal(TrainerCallback):  # type: ignore[misc]
    """Writes the log of a run as it goes."""

    def __init__(self, path: Path, schedule: Schedule) -> None:
        """Append to `path`."""
        self.path = path
        self.schedule = schedule
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget lines of steps that are about to be done again, and show the bar."""
        if state.is_world_process_zero:
            done = state.global_step
            kept = [line for line in read_log(self.path) if line["step"] <= done] if done else []
            write_bytes(self.path, b"".join(map(line_of, kept)))
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                desc="sparsify",
                disable=None,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a line."""
        if not state.is_world_process_zero or "sparsity" not in logs:
            return
        append(self.path, self.record(state.global_step, logs))
        if self._bar is not None:
            shown = {"lambda": f"{logs['lambda']:.3g}", "sparsity": f"{logs['sparsity']:.1%}"}
            shown |= {key: f"{logs[key]:.3f}" for key in ("lm_loss", "ppl") if key in logs}
            self._bar.set_postfix(shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def record(self, step: int, logs: dict[str, float]) -> Line:
        """Return what a line says of the Trainer's logs."""
        number = int(logs["stage"])
        record: Line = {
            "step": step,
            "stage": number,
            "kind": self.schedule.stages[number].kind,
            "lambda": logs["lambda"],
        }
        record |= {key: logs[key] for key in _COPIED if key in logs}
        if "ppl" in logs:
            record |= {"lm_loss": logs["eval_loss"], "ppl": logs["ppl"]}
        layers = sum(key.startswith(_LAYER) for key in logs)
        return record | {"sparsity": [logs[f"{_LAYER}{layer}"] for layer in range(layers)]}
