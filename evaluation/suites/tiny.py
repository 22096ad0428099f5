"""A small suite that needs no network: questions made from a held-out text by code.

Its text is the user's (`--data FILE`; the quickstart hands its own held-out text), or by default
the longest source files of this Python's library. The quickstart trains on files below 100,000
bytes alone (`quickstart.model.library_files`), so that these are held out from its models, and
every machine has them.
"""

from __future__ import annotations

import json
import random
import re
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.documents import read_text
from common.errors import DataError
from common.files import write_bytes

NAMES = ("tiny_next_line", "tiny_cloze", "tiny_finish", "tiny_rolling")
"""The suite's tasks."""

LEAST_QUESTIONS = 10
"""With fewer a share tells nothing."""

HELD_OUT_BYTES = 100_000
"""Library files above this size are in no quickstart's training text."""

_CONTEXT_LINES = 3
_CHOICES = 4
_EXAMPLES = 20
_CHUNK = 600  # characters of a rolling question
_SHORTEST, _LONGEST = 12, 72  # characters of a line that is asked for or shown
_WORD = re.compile(r"[A-Za-z_]{3,}")
_END = re.compile(r"(.*[ (.\[,=])(\w{3,}[):\]]{1,3})")

Row = dict[str, Any]


def library_text() -> str:
    """Return the source files of this Python's library that no quickstart trains on.

    Raises:
        DataError: this Python ships no source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.glob("*.py")) if path.stat().st_size > HELD_OUT_BYTES]
    if not files:
        raise DataError(f"{root}: no source files", "name a text with --data")
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)


def write_tiny(corpus_valid: Path | None, out: Path, *, seed: int, questions: int = 150) -> None:
    """Write lm-eval task files and their questions, the same ones for the same text and seed.

    Args:
        corpus_valid: text file that models under test were not trained on; None is the library.
        out: directory for them, made if need be.
        seed: of what is chosen.
        questions: of each task, at most.

    Raises:
        DataError: the file cannot be read, or gives fewer than `LEAST_QUESTIONS`.
        OutputError: the directory cannot be written.
    """
    shown = "this Python's library" if corpus_valid is None else str(corpus_valid)
    text = library_text() if corpus_valid is None else read_text(str(corpus_valid))
    for name, (make, settings) in _TASKS.items():
        shots = settings.get("num_fewshot", 0)
        rows = make(text, random.Random(f"{seed} {name}"), questions + (_EXAMPLES if shots else 0))
        examples = rows[:_EXAMPLES] if shots else []
        asked = rows[len(examples) :]
        if len(asked) < LEAST_QUESTIONS:
            problem = f"{shown}: gives {len(asked)} questions for {name}, of {questions}"
            raise DataError(problem, "name a longer text with --data")
        _write_rows(out / f"{name}.jsonl", asked)
        files = {"test": f"{name}.jsonl"}
        if examples:
            _write_rows(out / f"{name}.examples.jsonl", examples)
            files["train"] = f"{name}.examples.jsonl"
        _write_task(out / f"{name}.yaml", name, settings, files)


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_bytes(path, "".join(lines).encode())


def _write_task(
    path: Path, name: str, settings: Mapping[str, Any], files: Mapping[str, str]
) -> None:
    task = {
        "task": name,
        "tag": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": dict(files)},
        "test_split": "test",
        **settings,
        "metadata": {"version": 1.0},
    }
    write_bytes(path, yaml.safe_dump(task, sort_keys=False, allow_unicode=True).encode())


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


def _good(line: str) -> bool:
    return len(line.strip()) >= _SHORTEST and len(line) <= _LONGEST


def _places(lines: Sequence[str], rng: random.Random) -> list[int]:
    """Return numbers of lines that follow enough lines that can be shown, in a random order."""
    numbers = [
        number
        for number in range(_CONTEXT_LINES, len(lines))
        if all(map(_good, lines[number - _CONTEXT_LINES : number + 1]))
    ]
    rng.shuffle(numbers)
    return numbers


def _next_lines(text: str, rng: random.Random, count: int) -> list[Row]:
    """Which line follows: the next one, and three from elsewhere in the text."""
    lines = _lines(text)
    places, rows = _places(lines, rng), list[Row]()
    elsewhere = sorted({lines[number] for number in places})
    if len(elsewhere) < 2 * _CHOICES:
        return rows
    for number in places[:count]:
        wrong = [line for line in rng.sample(elsewhere, 2 * _CHOICES) if line != lines[number]]
        choices = [lines[number], *wrong[: _CHOICES - 1]]
        rng.shuffle(choices)
        context = "\n".join(lines[number - _CONTEXT_LINES : number])
        rows.append({"context": context, "choices": choices, "label": choices.index(lines[number])})
    return rows


def _cloze(text: str, rng: random.Random, count: int) -> list[Row]:
    """The last word of a line, one that was there before, as LAMBADA's mostly are."""
    lines, rows = _lines(text), list[Row]()
    for number in _places(lines, rng):
        begin, space, word = lines[number].rpartition(" ")
        context = "\n".join([*lines[number - _CONTEXT_LINES : number], begin])
        before = set(_WORD.findall(context))
        if space and begin.strip() and _WORD.fullmatch(word) and word in before:
            rows.append({"context": context, "target": f" {word}"})
        if len(rows) == count:
            break
    return rows


def _ends(text: str, rng: random.Random, count: int) -> list[Row]:
    """The end of a line: its last word and the brackets or colons after it."""
    lines, rows = _lines(text), list[Row]()
    for number in _places(lines, rng):
        found = _END.fullmatch(lines[number])
        if found and found.group(1).strip():
            shown = [*lines[number - _CONTEXT_LINES : number], found.group(1).rstrip()]
            rows.append({"prompt": "\n".join(shown), "answer": found.group(2)})
        if len(rows) == count:
            break
    return rows


def _chunks(text: str, rng: random.Random, count: int) -> list[Row]:
    """Pieces of the text, none of which overlap."""
    begins = list(range(0, len(text) - _CHUNK, _CHUNK))
    rng.shuffle(begins)
    pieces = (text[begin : begin + _CHUNK] for begin in begins)
    return [{"text": piece} for piece in pieces if piece.strip()][:count]


def _mean(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def _aggregated(name: str, aggregation: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": False}


_TASKS: dict[str, tuple[Callable[[str, random.Random, int], list[Row]], dict[str, Any]]] = {
    "tiny_next_line": (
        _next_lines,
        {
            "output_type": "multiple_choice",
            "training_split": "train",
            "fewshot_split": "train",
            "num_fewshot": 2,
            "doc_to_text": "{{context}}",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "target_delimiter": "\n",
            "metric_list": _mean("acc", "acc_norm"),
        },
    ),
    "tiny_cloze": (
        _cloze,
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{target}}",
            "target_delimiter": "",
            "metric_list": [*_mean("acc"), _aggregated("perplexity", "perplexity")],
        },
    ),
    "tiny_finish": (
        _ends,
        {
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {
                "until": ["\n"],
                "max_gen_toks": 16,
                "do_sample": False,
                "temperature": 0.0,
            },
            "filter_list": [
                {
                    "name": "stripped",
                    "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
                }
            ],
            "metric_list": _mean("exact_match"),
        },
    ),
    "tiny_rolling": (
        _chunks,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [
                _aggregated("word_perplexity", "weighted_perplexity"),
                _aggregated("byte_perplexity", "weighted_perplexity"),
                _aggregated("bits_per_byte", "bits_per_byte"),
            ],
        },
    ),
}
"""What makes the questions of a task, and lm-eval's settings of it."""
