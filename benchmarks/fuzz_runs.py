"""Formats of runs, for `benchmarks.fuzz`: journals, tasks, prompts, what a training leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.fuzz_examples import example
from benchmarks.fuzz_formats import TEXT, Format

IDENTITY: dict[str, object] = {"inputs": [{"role": "model", "bytes": 7}], "settings": {"n": 1}}
KEYS = [f"{number:064x}" for number in range(4)]


def make_samples(path: Path) -> Path:
    """Write a benchmark's journal: two runs and a quality figure."""
    from common.typed_json import parse
    from powerinfer_bridge.benchmark.journal import Sample, open_journal

    journal = open_journal(path / "bench", IDENTITY, resume=False, force=False)
    for prompt in range(2):
        journal.add(parse(Sample, example(Sample, prompt=prompt)))
    journal.remember("ppl", float, lambda: 7.5)
    return path


def read_samples(path: Path) -> None:
    """Go on with it, as far as the table of its samples."""
    from powerinfer_bridge.benchmark.journal import open_journal
    from results.bench import round_speeds

    journal = open_journal(path / "bench", IDENTITY, resume=True, force=False)
    round_speeds([sample.row() for sample in journal.samples], "x", "decode")
    journal.remember("ppl", float, lambda: 7.5)


def make_answers(path: Path) -> Path:
    """Write an arm's answers."""
    from evaluation.answers import Batch, open_answers

    answers = open_answers(path, "dense", IDENTITY, resume=False)
    for keys in (KEYS[:2], KEYS[2:]):
        said = ("a text", (-1.5, True))
        answers.add(Batch(keys=tuple(keys), answers=said, tokens=9, seconds=0.5, size=2))
    return path


def read_answers(path: Path) -> object:
    """Go on with them."""
    from evaluation.answers import open_answers

    return open_answers(path, "dense", IDENTITY, resume=True)


def make_sparsified(path: Path) -> Path:
    """Write what `psp sparsify` marks its directory with, its log, and one without checksums."""
    from common.json_lines import line_of
    from common.sealed import write_sealed
    from prosparse.training import MARKER

    settings = {"model": "m", "seed": 0, "schedule": [["sft", 0.0, 20]]}
    write_sealed(path / MARKER, {"schema_version": 1, "settings": settings})
    step: dict[str, Any] = {"step": 1, "stage": 0, "kind": "sft", "lambda": 0.0, "lm_loss": 2.5}
    lines = [step | {"sparsity": [0.5, 0.5]}, step | {"ppl": 7.5, "sparsity": [0.5, 0.5]}]
    training = path / "training"
    (training / "log.jsonl").write_bytes(b"".join(map(line_of, lines)))
    (training / "older.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_sparsified(path: Path) -> None:
    """Describe it, and read its logs as a resumed training does."""
    from pipeline.artifacts import describe, described_table
    from prosparse.training_log import last_evaluation, read_log

    for name in ("log.jsonl", "older.jsonl"):
        last_evaluation(read_log(path / "training" / name))
    assert described_table(describe(path))


def make_tasks(path: Path) -> Path:
    """Write a task of questions that includes another file, with an alias."""
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}}
    filled = {"doc_to_text": "{{q}}", "doc_to_choice": ["a", "b"], "doc_to_target": "{{t}}"}
    shared = data | filled | {"test_split": "test", "output_type": "multiple_choice"}
    (path / "shared").write_text(json.dumps(shared))
    own = {"include": "shared", "task": "own", "tag": "ours", "metadata": {"version": 1.0}}
    (path / "own.yaml").write_text(json.dumps(own))
    (path / "alias.yaml").write_text("tag: &a [x, y]\ntask: other\ngroup: g\nmetadata: *a\n")
    (path / "rows.jsonl").write_text('{"q": "one", "t": 0}\n{"q": "two", "t": 1}\n')
    return path


def read_tasks(path: Path) -> None:
    """Open them, but for groups: those make lm-eval read all of its own 14,000 files."""
    from evaluation.tasks.files import read_raw, refuse_code
    from evaluation.tasks.loading import load_tasks

    read_raw(path / "alias.yaml")
    refuse_code(path / "alias.yaml")
    if isinstance(read_raw(path / "own.yaml").get("task"), str):
        load_tasks([str(path / "own.yaml")])


def make_prompts(path: Path) -> Path:
    """Write prompts in lines and in rows."""
    (path / "prompts.txt").write_text(f"{TEXT}\nonce upon a time\n")
    (path / "prompts.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    return path


def read_prompts(path: Path) -> None:
    """Read them as a benchmark does."""
    from powerinfer_bridge.benchmark import inputs
    from powerinfer_bridge.benchmark.settings import BenchConfig

    for name in ("prompts.txt", "prompts.jsonl"):
        file = path / "m.powerinfer.gguf"
        inputs.read_prompts(BenchConfig(file=file, powerinfer_bin=path, prompts=path / name))


RUNS = {
    "answers": Format(make_answers, ("answers/*.jsonl",), read_answers),
    "prompts": Format(make_prompts, ("prompts.*",), read_prompts),
    "samples.jsonl": Format(make_samples, ("bench/*.jsonl",), read_samples),
    "sparsified": Format(make_sparsified, ("training/*",), read_sparsified),
    "tasks": Format(make_tasks, ("own.yaml", "alias.yaml", "shared"), read_tasks),
}
