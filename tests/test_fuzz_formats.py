"""The short form of `benchmarks.fuzz`: a few inputs of every quick format, and what was found."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random

import pytest
from conftest import refused
from damages import little_memory

from architectures import piece_tokenizer
from architectures.piece_tokenizer import open_pieces
from benchmarks.fuzz import FORMATS, one, outcome
from benchmarks.fuzz_mutations import STAND_INS, mutated
from common.errors import CheckpointError, DataError, PredictorError, TraceError
from common.hashing import hash_file
from predictor.traces.shard_file import read_tensors

QUICK = [
    "answers",
    "foreign predictors",
    "foreign safetensors",
    "gpu index",
    "head.json",
    "provenance.json",
    "samples.jsonl",
    "settings",
    "sparsified",
    "texts",
]


@pytest.mark.parametrize("name", QUICK)
def test_damaged_files_cost_a_line(name: str, tmp_path: Path) -> None:
    each = FORMATS[name]
    each.read(each.make(tmp_path))
    with little_memory():
        first = len(STAND_INS) * len(each.files(tmp_path))
        found = [one(each, tmp_path, 0, first + number) for number in range(60)]
    others = [pair for pair in found if pair[0] not in ("accepted", "refused")]
    assert not others
    assert sum(kind == "refused" for kind, _ in found) > 20
    each.read(tmp_path)  # all files are as they were


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["head.json", "samples.jsonl"])
def test_what_is_no_such_file_costs_a_line(name: str, tmp_path: Path) -> None:
    """A pipe, an endless or a huge file, a directory, a dead link or nothing in a file's place."""
    each = FORMATS[name]
    each.read(each.make(tmp_path))
    with little_memory():
        count = len(STAND_INS) * len(each.files(tmp_path))
        found = [one(each, tmp_path, 0, number) for number in range(count)]
    assert {kind for kind, _ in found} <= {"accepted", "refused"}
    assert sum(kind == "refused" for kind, _ in found) >= count - 1  # a journal begins anew
    each.read(tmp_path)


def test_inputs_are_the_same_every_time_and_others_than_the_file() -> None:
    data = b'{"a": [1, 2, {"b": null}], "c": "text"}'
    made = [[mutated(data, ".json", Random(number)) for number in range(50)] for _ in range(2)]
    assert made[0] == made[1]
    assert sum(each == data for each in made[0]) < 10


def test_the_oracle_tells_what_happened() -> None:
    def raising(error: BaseException) -> tuple[str, str]:
        def read() -> None:
            raise error

        return outcome(read)

    assert outcome(lambda: 1) == ("accepted", "")
    assert raising(DataError("x: bad", "mend it")) == ("refused", "x: bad; mend it")
    assert raising(DataError("x: bad"))[0] == "tracebacks"
    assert raising(KeyError("x"))[0] == "tracebacks"
    assert raising(MemoryError())[0] == "allocations"


def test_a_library_that_cannot_say_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SentencePiece quotes a piece that is no UTF-8, which Python then cannot decode."""

    def quoting(proto: bytes) -> None:
        proto.decode()

    monkeypatch.setattr(piece_tokenizer, "_processor", quoting)
    (tmp_path / "tokenizer.model").write_bytes(b"\xf4x")
    with refused(CheckpointError, "not a SentencePiece model"):
        open_pieces(tmp_path / "tokenizer.model")


def test_a_perplexity_of_zero_is_no_measurement(tmp_path: Path) -> None:
    """Its growth was a division by zero in `psp inspect HEAD`."""
    each = FORMATS["head.json"]
    index = each.make(tmp_path) / "head" / "head.json"
    document = json.loads(index.read_text())
    del document["xxh3_128"]
    document["points"][0]["ppl_levelled"] = 0
    index.write_text(json.dumps(document))
    with refused(PredictorError, "ppl_levelled"):
        each.read(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_nobody_waits_for_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with refused(TraceError, "pipe: no plain file"):
        read_tensors(pipe)
    with refused(DataError, "pipe: no plain file"):
        hash_file(pipe)
