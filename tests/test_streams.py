"""Standard streams that are full, closed or of another character set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FULL = Path("/dev/full")
RUN = "from cli import main; main()"
SAID = "Error: cannot write standard output: No space left on device; print it somewhere else\n"

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


Psp = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def psp(request: pytest.FixtureRequest) -> Psp:
    """Run the command line in a new interpreter, which has torch where it is needed anyway."""

    def run(
        *arguments: str, stdout: int | None = None, stderr: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        if not {"--help", "--version"} & {*arguments}:
            new_python = request.getfixturevalue("new_python")
            done: subprocess.CompletedProcess[str] = new_python(
                RUN, *arguments, stdout=stdout, stderr=stderr
            )
            return done
        pipe = subprocess.PIPE
        streams: dict[str, Any] = {"stdout": stdout or pipe, "stderr": stderr or pipe}
        command, none = [sys.executable, "-c", RUN, *arguments], subprocess.DEVNULL
        return subprocess.run(command, stdin=none, text=True, timeout=60, **streams)

    return run


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
def test_a_full_device_costs_one_line(psp: Psp, command: list[str], exact_dir: Path) -> None:
    command = [word.replace("MADE", str(exact_dir)) for word in command]
    with FULL.open("wb") as full:
        done = psp(*command, stdout=full.fileno())
    assert (done.returncode, done.stderr) == (1, SAID)


def test_a_full_standard_error_changes_no_exit_code(psp: Psp, refused_file: str) -> None:
    with FULL.open("wb") as full:
        assert psp("inspect", refused_file, stderr=full.fileno()).returncode == 1
        assert psp("--version", stderr=full.fileno()).returncode == 0


@pytest.mark.parametrize("command", [["--help"], ["inspect", "MADE", "--json"]])
def test_a_reader_that_went_away_needs_no_line(
    psp: Psp, command: list[str], exact_dir: Path
) -> None:
    command = [word.replace("MADE", str(exact_dir)) for word in command]
    there, here = os.pipe()
    os.close(there)
    done = psp(*command, stdout=here)
    os.close(here)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_closed_standard_error_pipe_keeps_the_exit_code(psp: Psp, refused_file: str) -> None:
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
