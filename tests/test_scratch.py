"""Temporary directories: gone with their process, or with the next, and nobody else's ever."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.scratch import PREFIX, Scratch

HOLD = """
import sys
from pathlib import Path
from common.scratch import Scratch
scratch = Scratch(Path(sys.argv[1]))
(scratch.path / "kept").write_text("")
print(scratch.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process, and its directory."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_it_is_removed_when_its_block_ends(tmp_path: Path) -> None:
    with Scratch(tmp_path) as path:
        assert path.parent == tmp_path
        (path / "file").write_text("")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_goes_at_the_next_start_and_no_sooner(
    tmp_path: Path, other: tuple[subprocess.Popen[str], Path]
) -> None:
    process, path = other
    with Scratch(tmp_path):
        assert (path / "kept").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (path / "kept").exists()
    with Scratch(tmp_path) as own:
        assert list(tmp_path.iterdir()) == [own]


def test_only_abandoned_directories_of_its_own_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precious = tmp_path / "precious"
    (precious / "file").mkdir(parents=True)
    for name in ("psp-notes", f"{PREFIX}notes", f"x{PREFIX}12345678", f"{PREFIX}123456789"):
        (tmp_path / name).mkdir()
    (tmp_path / f"{PREFIX}abcdefgh").symlink_to(precious)
    (tmp_path / f"{PREFIX}bcdefghi").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with Scratch(tmp_path):
        pass
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / f"{PREFIX}12345678").mkdir()
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with Scratch(tmp_path):
        assert (tmp_path / f"{PREFIX}12345678").exists()
    monkeypatch.undo()
    with Scratch(tmp_path) as own:
        assert {*tmp_path.rglob("*")} - {*before} == {own}


def test_a_disk_without_locks_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Scratch(tmp_path) as first, Scratch(tmp_path):
        assert first.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("removed", [False, True])
def test_a_directory_that_another_process_took_for_abandoned_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: bool
) -> None:
    lock, tried = fcntl.flock, list[int]()

    def late(descriptor: int, how: int) -> None:
        tried.append(descriptor)
        if len(tried) == 1 and removed:
            next(tmp_path.iterdir()).rmdir()
        elif len(tried) == 1:
            raise BlockingIOError
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with Scratch(tmp_path) as path:
        assert path.exists()
    assert len(tried) == 2
