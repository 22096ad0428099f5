"""Counts of a server's traffic: kept in PowerInfer's files, gone on with, never mixed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from processes import ending, forked, wait_for

from common.errors import PredictorError
from common.sealed import SEAL, read_sealed, write_sealed
from gguf_export.pwri.statistics import read_statistics, write_statistics
from vllm_plugin import statistics
from vllm_plugin.statistics import Statistics

MODEL = {"name": "m", "intermediate_size": 6}


def grown(tokens: int = 4, layers: int = 2) -> list[torch.Tensor]:
    return [torch.tensor([n, 0, 1, 2, 3, 4, tokens]) for n in range(layers)]


def made(directory: Path, layers: list[torch.Tensor], model: dict[str, Any] = MODEL) -> Statistics:
    return Statistics(directory, model, layers)


def facts(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "statistics.json").read_text())
    return found


def test_counts_are_written_as_powerinfers_files(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "counts"
    made(directory, grown()).close()
    first, second = read_statistics(directory, 2, 6)
    assert first.tolist() == [0, 0, 1, 2, 3, 4]
    assert second.tolist() == [1, 0, 1, 2, 3, 4]
    found = facts(directory)
    assert (found["tokens"], found["model"]) == (4, MODEL)
    assert found["activation_sparsity"] == pytest.approx(1 - 21 / (2 * 6 * 4))
    # nothing but counts
    assert set(found) == {"kind", "schema_version", "tokens", "activation_sparsity", "model", SEAL}


def test_a_server_that_saw_no_token_writes_nothing(tmp_path: Path) -> None:
    made(tmp_path, [torch.zeros(7, dtype=torch.int64)] * 2).close()
    assert not (tmp_path / "statistics.json").exists()


def test_the_next_server_goes_on(tmp_path: Path) -> None:
    made(tmp_path, grown()).close()
    made(tmp_path, grown(tokens=10)).close()
    assert facts(tmp_path)["tokens"] == 14
    assert read_statistics(tmp_path, 2, 6)[0].tolist() == [0, 0, 2, 4, 6, 8]


def test_counts_that_grow_are_written_once_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def write(directory: Path, counts: Any) -> None:
        written.append(1)
        write_statistics(directory, counts)

    monkeypatch.setattr(statistics, "write_statistics", write)
    layers = grown()
    kept = made(tmp_path, layers)
    kept.save()
    kept.save()
    assert len(written) == 1
    layers[0][-1] += 1
    kept.save()
    assert len(written) == 2
    assert facts(tmp_path)["tokens"] == 5
    kept.close()
    assert len(written) == 2


def test_it_is_time_after_a_pause_and_now_and_then_under_load(tmp_path: Path) -> None:
    kept = made(tmp_path, grown())
    kept._ended.set()
    kept._watcher.join()
    start = kept._wrote
    assert not kept.due(start + 100)  # nothing has run
    kept._stepped = start + 10
    assert not kept.due(start + 10.5)
    assert kept.due(start + 11)  # a pause
    kept._stepped = start + 30
    assert kept.due(start + 30.1)  # load
    kept._wrote = start + 40
    assert not kept.due(start + 100)
    kept.close()


def test_what_has_run_is_written_without_anyones_asking(tmp_path: Path) -> None:
    layers = grown()
    kept = made(tmp_path, layers)
    layers[0][-1] += 3
    kept.step()
    wait_for(lambda: (tmp_path / "statistics.json").exists())
    assert facts(tmp_path)["tokens"] == 7
    kept.close()


def test_two_servers_do_not_count_in_one_place(tmp_path: Path) -> None:
    kept = made(tmp_path, grown())
    with refused(
        PredictorError, str(tmp_path), f"another server counts there, process {os.getpid()}"
    ):
        made(tmp_path, grown())
    kept.close()
    made(tmp_path, grown()).close()


def test_counts_beyond_the_tokens_are_refused(tmp_path: Path) -> None:
    made(tmp_path, grown()).close()
    file = tmp_path / "statistics.json"
    write_sealed(file, read_sealed(file, PredictorError, "") | {"tokens": 3})
    with refused(PredictorError, "counts more tokens than statistics.json"):
        made(tmp_path, grown())


def test_a_lost_directory_is_made_again(tmp_path: Path) -> None:
    layers = grown()
    kept = made(tmp_path / "counts", layers)
    kept.save()
    shutil.rmtree(tmp_path / "counts")
    layers[0][-1] += 1
    kept.save()
    assert facts(tmp_path / "counts")["tokens"] == 5
    kept.close()


def test_a_file_in_the_way_is_a_line_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "activation").write_text("")
    kept = made(tmp_path, grown())
    kept.close()
    assert "activation statistics are not written" in caplog.text


def test_a_dead_servers_lock_is_none(tmp_path: Path) -> None:
    def work() -> None:
        made(tmp_path, [torch.ones(7, dtype=torch.int64)] * 2).save()
        os.kill(os.getpid(), signal.SIGKILL)

    assert ending(forked(work)) == -signal.SIGKILL
    made(tmp_path, grown()).close()
    assert facts(tmp_path)["tokens"] == 5


def test_another_models_counts_stay_as_they_are(tmp_path: Path) -> None:
    made(tmp_path, grown()).close()
    before = facts(tmp_path)
    with refused(PredictorError, str(tmp_path), "another model", "another directory"):
        made(tmp_path, grown(), MODEL | {"name": "other"})
    assert facts(tmp_path) == before


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"kind": "psp.doctor", "tokens": 1}', '{"tokens": "x"}']
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "statistics.json").write_text(text)
    with refused(PredictorError, "statistics.json"):
        made(tmp_path, grown())
    assert (tmp_path / "statistics.json").read_text() == text


def test_lost_files_are_refused(tmp_path: Path) -> None:
    made(tmp_path, grown()).close()
    (tmp_path / "activation" / "activation_1.pt").unlink()
    with refused(PredictorError, "no statistics of 2 layers"):
        made(tmp_path, grown())


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refused(PredictorError, "file", "another directory"):
        made(tmp_path / "file" / "counts", grown())


def test_a_failed_write_is_a_line_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(directory: Path, counts: Any) -> None:
        raise PredictorError("no space left", "free some")

    monkeypatch.setattr(statistics, "write_statistics", full)
    kept = made(tmp_path, grown())
    kept.save()
    assert "not written: no space left" in caplog.text
    monkeypatch.undo()
    kept.close()
    assert facts(tmp_path)["tokens"] == 4
