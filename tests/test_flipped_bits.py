"""One bit of a file is another one: whoever uses the byte next says so."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import made_up_evaluation
import made_up_results
import pytest
from conftest import refused

from common.errors import OutputError, PredictorError, PspError, TraceError
from common.json_lines import append
from common.sealed import SEAL, read_sealed, write_sealed
from predictor.artifact import PredictorArtifact
from predictor.traces.store import TraceStore
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig
from prosparse.training_log import read_log
from report.runs import load_runs
from results.bench import BENCH
from results.evaluation import EVALUATION
from results.parts import ResultFile

PLACES = 60
"""Of each file, at most, chosen by chance."""


def flipped(file: Path) -> Iterator[tuple[int, int]]:
    """Flip single bits of a file, one after the other; yield where, and mend it again."""
    whole, chance = file.read_bytes(), random.Random(file.name)
    for place in sorted(chance.sample(range(len(whole)), min(PLACES, len(whole)))):
        bit = chance.randrange(8)
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        file.write_bytes(damaged)
        yield place, bit
    file.write_bytes(whole)


def unnoticed(directory: Path, use: Callable[[], object]) -> list[str]:
    """Return where a flipped bit changed nothing that `use` would see."""
    found = []
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        for place, bit in flipped(file):
            try:
                use()
            except PspError:
                continue
            found.append(f"{file.relative_to(directory)}: bit {bit} of byte {place}")
    use()
    return found


def test_of_traces_before_they_are_trained_on(traces: TraceStore, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(traces.path, tmp_path / "traces"))

    def use() -> None:
        store = TraceStore.open(copy)
        store.require_complete()
        for layer in store.header.layers:
            store.layer(layer)
            store.weights(layer)

    found = unnoticed(copy, use)
    assert not [place for place in found if not harmless(place, copy)], found


def test_of_predictors_before_they_are_exported(ranked_traces: TraceStore, tmp_path: Path) -> None:
    copy = tmp_path / "predictors"
    settings = TrainConfig(
        traces=ranked_traces.path, out=copy, rank=32, recipe="svd", ffn_bytes=0.45
    )
    train_predictors(settings)

    def use() -> None:
        artifact = PredictorArtifact.open(copy)
        artifact.require_complete()
        for layer in range(artifact.header.n_layers):
            artifact.layer(layer)
            artifact.curves(layer)

    found = unnoticed(copy, use)
    assert not [place for place in found if not harmless(place, copy)], found


def test_of_results_before_they_are_shown(tmp_path: Path) -> None:
    kinds: tuple[tuple[ResultFile[Any], Callable[[], object]], ...] = (
        (BENCH, made_up_results.bench),
        (EVALUATION, made_up_evaluation.evaluation),
    )
    for kind, made in kinds:
        (tmp_path / kind.name).write_text(json.dumps(made()))
        kind.write(tmp_path, kind.read(tmp_path))
    found = unnoticed(tmp_path, lambda: load_runs([tmp_path]))
    assert not [place for place in found if not harmless(place, tmp_path)], found


@pytest.mark.parametrize("lines", [1, 2])
def test_of_a_trainings_log_every_single_one(tmp_path: Path, lines: int) -> None:
    line = {"step": 10, "stage": 0, "kind": "sft", "lambda": 1e-5, "loss": math.inf}
    written = [line | {"lm_loss": 2.5 + step, "sparsity": [0.5, -0.0]} for step in range(lines)]
    file = tmp_path / "log.jsonl"
    for each in written:
        append(file, each)
    whole, found = file.read_bytes(), set[int]()
    for place, bit in itertools.product(range(len(whole)), range(8)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        with suppress(OutputError):  # 1E-05 is 1e-05
            if read_log(file) != written:
                found.add(place)
    name = range(whole.index(SEAL.encode()), whole.index(SEAL.encode()) + len(SEAL))
    assert found == set(name if lines == 1 else ()), "only an only line's seal is not missed"
    file.write_bytes(whole[:-9])
    assert read_log(file) == written[:-1], "a process that was killed as it wrote"


def harmless(place: str, directory: Path) -> bool:
    """Whether a byte is none that anybody uses: white space of a document, or its seal's name."""
    name, _, at = place.partition(": ")
    text = (directory / name).read_bytes()
    byte = int(at.split()[-1])
    line = text[text.rfind(b"\n", 0, byte) + 1 : byte + 1]
    return name.endswith(".json") and (
        not line.strip() or SEAL.encode() in text[byte - 12 : byte + 12]
    )


def test_a_sealed_document_is_what_was_written(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    document = {"text": "ä", "number": 0.1, "list": [1, {"a": None}], "nan": float("inf")}
    write_sealed(file, document)
    assert read_sealed(file, TraceError, "again") == document
    file.write_text(file.read_text().replace("0.1", "0.2"))
    with refused(TraceError, str(file), "its checksum differs", "again"):
        read_sealed(file, TraceError, "again")
    file.write_text('{"old": 1}')
    assert read_sealed(file, PredictorError, "again") == {"old": 1}


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_the_seal_is_of_the_values_not_of_the_text(tmp_path: Path, order: tuple[str, str]) -> None:
    file = tmp_path / "a.json"
    write_sealed(file, dict.fromkeys(order, 1))
    file.write_text(file.read_text().replace("\n", " "))
    assert list(read_sealed(file, TraceError, "again")) == list(order)
