"""Files are whole or absent, also when the system refuses a write half way."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from common.errors import DataError, OutputError, PspError
from common.files import (
    atomic_directory,
    atomic_path,
    read_json,
    refuse_existing,
    remove_output,
    sha256,
    write_bytes,
    write_error,
    write_json,
)

# Python ignores SIGXFSZ, so a write past the limit fails with EFBIG as one on a full disk does with
# ENOSPC: after part of the file has been written.
LIMITED = """
import resource, signal, sys
from cli import main

assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
main()
"""


@contextmanager
def refused(kind: type[PspError], *parts: str) -> Iterator[None]:
    """Expect an error of one line that holds all parts."""
    with pytest.raises(kind) as error:
        yield
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.fixture(scope="module", autouse=True)
def _fixed_threads() -> None:
    """One thread from the first fixture on: tiny matrices gain nothing from more."""
    torch.set_num_threads(1)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*") if path.is_file()}


def write_half(path: Path, failure: BaseException) -> None:
    with atomic_path(path) as part:
        part.write_bytes(b"half")
        raise failure


def psp_with_little_room(limit: int, *arguments: object) -> str:
    """Run psp so that no file may exceed `limit` bytes; return the one line it must end with."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_a_block_that_ends_gives_the_whole_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "directory" / "file"
    with atomic_path(target) as part:
        assert part.parent == target.parent
        part.write_bytes(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert names(tmp_path) == {"file"}


@pytest.mark.parametrize("kind", [RuntimeError, DataError, KeyboardInterrupt, SystemExit])
def test_a_block_that_raises_leaves_nothing_and_its_exception_passes(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    failure = kind("half way")
    with pytest.raises(kind) as error:
        write_half(tmp_path / "file", failure)
    assert error.value is failure
    assert names(tmp_path) == set()


def test_the_old_file_survives_a_failed_replacement(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half way"):
        write_half(tmp_path / "file", RuntimeError("half way"))
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == {"file"}


def test_the_old_file_survives_a_refused_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with refused(OutputError, str(tmp_path / "file"), "No space left", "free some space"):
        write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == {"file"}


def test_what_a_killed_process_left_is_overwritten(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "file") as part:
        part.write_bytes(b"x")
    part.write_bytes(b"left behind, and longer than what follows")
    write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert names(tmp_path) == {"file"}


def test_a_block_that_writes_nothing_is_an_error_not_an_empty_file(tmp_path: Path) -> None:
    with refused(OutputError, str(tmp_path / "file")), atomic_path(tmp_path / "file"):
        pass
    assert names(tmp_path) == set()


def test_a_file_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    target = tmp_path / "file" / "child"
    with refused(OutputError, f"cannot write {target}", "check the path"):
        write_bytes(target, b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_name_too_long_for_the_file_system_is_refused(tmp_path: Path) -> None:
    target = tmp_path / ("x" * 300)
    with refused(OutputError, f"cannot write {target}", "too long", "check the path"):
        write_bytes(target, b"new")


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "free some space or choose another --out"),
        (errno.EDQUOT, "free some space or choose another --out"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EACCES, "a directory that you may write to"),
        (errno.EROFS, "a directory that you may write to"),
        (errno.EIO, "check the path"),
    ],
)
def test_every_refusal_has_a_remedy(code: int, remedy: str) -> None:
    message = str(write_error(Path("out/file"), OSError(code, os.strerror(code))))
    assert message == f"cannot write out/file: {os.strerror(code)}; {message.split('; ')[-1]}"
    assert remedy in message


def test_json_is_written_as_readable_utf8_and_read_back(tmp_path: Path) -> None:
    document = {"name": "naïve", "rows": [1, 2.5], "none": None}
    write_json(tmp_path / "a.json", document)
    data = (tmp_path / "a.json").read_bytes()
    assert "naïve".encode() in data
    assert data.endswith(b"}\n")
    assert read_json(tmp_path / "a.json", DataError, "remedy") == document


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"{", "not valid JSON"), (b"\xff\xfe", "not valid JSON"), (b"[1]", "found list")],
)
def test_what_is_not_a_json_object_is_refused(
    tmp_path: Path, content: bytes, complaint: str
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with refused(DataError, str(tmp_path / "a.json"), complaint, "; do this"):
        read_json(tmp_path / "a.json", DataError, "do this")


def test_a_missing_json_file_is_refused(tmp_path: Path) -> None:
    with refused(DataError, str(tmp_path / "a.json"), "No such file", "; do this"):
        read_json(tmp_path / "a.json", DataError, "do this")


def test_sha256_is_the_standard_one() -> None:
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(b"abc") == digest


@pytest.mark.parametrize("force", [True, False])
def test_a_free_name_can_be_claimed(tmp_path: Path, force: bool) -> None:
    refuse_existing(tmp_path / "new", force=force)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["file", "directory", "link", "dangling link"])
def test_an_existing_output_is_refused_and_stays(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_bytes(b"old")
    elif kind == "directory":
        write_bytes(out / "file", b"old")
    else:
        out.symlink_to(tmp_path if kind == "link" else tmp_path / "gone")
    with refused(OutputError, f"{out} exists", "--force", "another --out"):
        refuse_existing(out, force=False)
    assert out.is_symlink() or out.exists()


def test_only_a_resumable_output_is_offered_resumption(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"old")
    for resumable in (True, False):
        with pytest.raises(OutputError) as error:
            refuse_existing(tmp_path, force=False, resumable=resumable)
        assert ("--resume" in str(error.value)) == resumable


def test_removal_takes_directories_files_and_nothing(tmp_path: Path) -> None:
    write_bytes(tmp_path / "directory" / "deep" / "file", b"old")
    write_bytes(tmp_path / "file", b"old")
    for name in ("directory", "file", "nothing"):
        refuse_existing(tmp_path / name, force=True)
        remove_output(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_removal_never_reaches_through_a_link(tmp_path: Path) -> None:
    write_bytes(tmp_path / "precious" / "file", b"old")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    remove_output(tmp_path / "link")
    assert (tmp_path / "precious" / "file").read_bytes() == b"old"
    assert not (tmp_path / "link").is_symlink()


def test_a_replaced_link_leaves_its_target_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "precious").read_bytes() == b"old"
    assert (tmp_path / "link").read_bytes() == b"new"
    assert not (tmp_path / "link").is_symlink()


def test_what_a_killed_run_left_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".manifest.json.part").write_bytes(b"{")
    refuse_existing(tmp_path / "out", force=False)
    (tmp_path / "out" / "manifest.json").write_bytes(b"{}")
    with pytest.raises(OutputError):
        refuse_existing(tmp_path / "out", force=False)


def test_a_directory_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_bytes(out / "old", b"old")

    def fail() -> None:
        with atomic_directory(out) as part:
            write_bytes(part / "new", b"new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["old"]
    with atomic_directory(out) as part:
        write_bytes(part / "new", b"new")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["new"]
