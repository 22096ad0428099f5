"""Standard streams that are full, closed or of another character set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = Path("/dev/full")
RUN = [sys.executable, "-c", "from cli import main; main()"]
SAID = "Error: cannot write standard output: No space left on device; print it somewhere else\n"

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


def psp(
    *arguments: str, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE, **variables: str
) -> subprocess.CompletedProcess[bytes]:
    command = [*RUN, *arguments]
    environment = os.environ | variables
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environment, timeout=60
    )


@pytest.fixture
def refused_file(tmp_path: Path) -> str:
    """Something that `inspect` refuses with a letter that latin-1 lacks, and a message with it."""
    path = tmp_path / "λ…é.json"
    path.write_text("{}")
    return str(path)


@pytest.mark.parametrize(
    "command",
    [["--help"], ["inspect", "--help"], ["estimate", "--help"], ["inspect", "MADE", "--json"]],
)
def test_a_full_device_costs_one_line(command: list[str], exact_dir: Path) -> None:
    command = [word.replace("MADE", str(exact_dir)) for word in command]
    with FULL.open("wb") as full:
        done = psp(*command, stdout=full.fileno())
    assert (done.returncode, done.stderr.decode()) == (1, SAID)


def test_a_full_standard_error_changes_no_exit_code(refused_file: str) -> None:
    with FULL.open("wb") as full:
        assert psp("inspect", refused_file, stderr=full.fileno()).returncode == 1
        assert psp("--version", stderr=full.fileno()).returncode == 0


@pytest.mark.parametrize("command", [["--help"], ["inspect", "MADE", "--json"]])
def test_a_reader_that_went_away_needs_no_line(command: list[str], exact_dir: Path) -> None:
    command = [word.replace("MADE", str(exact_dir)) for word in command]
    there, here = os.pipe()
    os.close(there)
    done = psp(*command, stdout=here)
    os.close(here)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_closed_standard_error_pipe_keeps_the_exit_code(refused_file: str) -> None:
    there, here = os.pipe()
    os.close(there)
    assert psp("inspect", refused_file, stderr=here).returncode == 1
    os.close(here)


def test_closed_streams_are_no_place_for_files() -> None:
    """Else the next file that is opened has the number to which libraries print."""
    code = (
        "import os; from commands.streams import make_ready; make_ready();"
        "raise SystemExit(os.open(os.devnull, os.O_RDONLY))"
    )
    done = subprocess.run(["sh", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, code])
    assert done.returncode > 2


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_letters_that_a_terminal_lacks_come_escaped(encoding: str) -> None:
    code = (
        "from commands.streams import make_ready; make_ready();"
        "from commands.printing import echo, print_json;"
        "print_json({'name': 'λ…é\\udcff'}) if {} else echo('λ…é\\udcff')"
    )
    for as_json in (True, False):
        command = [sys.executable, "-c", code.replace("if {}", f"if {as_json}")]
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run(command, env=environment, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
        if as_json:
            assert json.loads(done.stdout) == {"name": "λ…é\udcff"}
        else:
            assert b"\\udcff" in done.stdout
