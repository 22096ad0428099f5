"""Standard streams that are closed, full or poor in characters; documents that never end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import refused

from common.errors import DataError, PredictorError
from common.files import MOST_BYTES, read_document_bytes, read_json
from gguf_export.bundle import Bundle
from gguf_export.predictor_kinds import open_predictors
from prosparse.schedule import ScheduleError, read_schedule

PSP = [sys.executable, "-c", "from cli import main; main()"]
ROOT = Path(__file__).resolve().parents[1]
FULL = Path("/dev/full")


def run(
    *words: object, out: str | None = None, encoding: str = "utf-8"
) -> subprocess.CompletedProcess[str]:
    """Run psp in a process of its own, its output kept or sent to a file."""
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    command = [*PSP, *map(str, words)]
    with Path(out or os.devnull).open("w") as stream:
        return subprocess.run(
            command,
            stdout=stream if out else subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding=encoding,
            cwd=ROOT,
            env=environment,
            check=False,
        )


@pytest.mark.skipif(not FULL.exists(), reason="this system has no full device")
@pytest.mark.parametrize("words", ["inspect FILE", "inspect FILE --json", "inspect --help"])
def test_a_full_device_is_one_line(exact_bundle: Bundle, words: str) -> None:
    named = [exact_bundle.model_file if word == "FILE" else word for word in words.split()]
    result = run(*named, out=str(FULL))
    assert result.returncode == 1
    assert result.stderr.strip() == "Error: cannot write the output: No space left on device"


def test_a_reader_that_leaves_early_is_no_error_message(exact_bundle: Bundle) -> None:
    command = [*PSP, "inspect", str(exact_bundle.model_file), "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


def test_characters_that_a_terminal_lacks_come_escaped(exact_bundle: Bundle) -> None:
    whole = run("inspect", exact_bundle.model_file, encoding="utf-8")
    poor = run("inspect", exact_bundle.model_file, encoding="latin-1")
    assert (whole.returncode, poor.returncode) == (0, 0)
    assert len(poor.stdout.splitlines()) == len(whole.stdout.splitlines())
    assert "\u2026/" in whole.stdout
    assert "\\u2026/" in poor.stdout
    assert poor.stderr == ""


def test_a_document_without_end_is_refused(tmp_path: Path) -> None:
    endless = Path("/dev/zero")
    if endless.exists():
        with refused(DataError, "/dev/zero", "is no regular file", "again"):
            read_json(endless, DataError, "again")
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with refused(DataError, str(large), "is larger than 128 MiB", "again"):
        read_json(large, DataError, "again")
    with refused(DataError, str(large), "is larger than 1 MiB"):
        read_document_bytes(large, DataError, "again", most=1 << 20)
    with refused(ScheduleError, str(large), "is larger than 1 MiB"):
        read_schedule(large)


def test_a_huge_config_of_foreign_predictors_is_one_line(
    exact_bundle: Bundle, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(exact_bundle.predictor_directory, tmp_path / "p"))
    with (copy / "config.json").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with refused(PredictorError, "config.json", "is larger than"):
        open_predictors(copy)


def test_a_schedule_nested_without_end_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("[" * 5000)
    with refused(ScheduleError, str(file), "not valid YAML"):
        read_schedule(file)
