"""Files are whole or absent, also when the system refuses a write half way."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from conftest import refused

from common.errors import DataError, OutputError
from common.files import (
    LARGEST_DOCUMENT,
    atomic_directory,
    atomic_path,
    read_json,
    read_whole,
    refuse_existing,
    refused_writes,
    remove_output,
    sha256,
    write_bytes,
    write_error,
    write_json,
)
from common.yaml_text import parse_yaml, read_yaml_text
from gguf_export.bundle import Bundle
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.traces.store import TraceStore

Psp = Callable[..., Result]


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*") if path.is_file()}


def write_half(path: Path, failure: BaseException) -> None:
    with atomic_path(path) as part:
        part.write_bytes(b"half")
        raise failure


@contextmanager
def little_room(limit: int) -> Iterator[None]:
    """Let no file exceed `limit` bytes.

    Python ignores SIGXFSZ, so a write past the limit fails with EFBIG as one on a full disk does
    with ENOSPC: after part of the file has been written.
    """
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refused_for_room(psp: Psp, limit: int, *arguments: object) -> str:
    """Run psp so that no file may exceed `limit` bytes; return the one line it must end with."""
    with little_room(limit):
        done = psp(*arguments)
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    always = ("disk: needs ", "tokens: ")
    (line,) = (said for said in done.stderr.splitlines() if not said.startswith(always))
    return line


def test_json_nested_beyond_reason_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "deep.json"
    file.write_text("[" * 100_000)
    with refused(DataError, str(file), "not valid JSON", "fetch it again"):
        read_json(file, DataError, "fetch it again")


@pytest.mark.parametrize("kind", ["directory", "link"])
def test_what_a_killed_removal_left_goes_with_the_next(tmp_path: Path, kind: str) -> None:
    out, left = tmp_path / "out", tmp_path / ".out.old" / "deep"
    left.mkdir(parents=True)
    (tmp_path / "target").mkdir()
    out.mkdir() if kind == "directory" else out.symlink_to(tmp_path / "target")
    remove_output(out)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


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


@pytest.mark.parametrize("make", [atomic_path, atomic_directory])
def test_directories_made_for_what_failed_go_unless_something_else_is_in_them(
    tmp_path: Path, make: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    there, new = tmp_path / "there", tmp_path / "there" / "new"
    there.mkdir()

    def fail(*meanwhile: Path) -> None:
        with make(new / "deep" / "out"):
            for path in meanwhile:
                path.mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.rglob("*")) == [there]
    with pytest.raises(KeyboardInterrupt):
        fail(new / "theirs")
    assert sorted(there.rglob("*")) == [new, new / "theirs"]


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
def test_a_free_name_may_be_written(tmp_path: Path, force: bool) -> None:
    refuse_existing(tmp_path / "new", force=force)
    remove_output(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "directory", "link", "link to nothing", "dangling link"])
def test_an_existing_output_is_refused_unless_forced_and_stays(tmp_path: Path, kind: str) -> None:
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    if kind == "file":
        out.write_bytes(b"old")
    elif kind == "directory":
        write_bytes(out / "file", b"old")
    else:
        targets = {"link": tmp_path, "link to nothing": empty, "dangling link": tmp_path / "gone"}
        out.symlink_to(targets[kind])
    with refused(OutputError, f"{out} exists", "--force", "another --out"):
        refuse_existing(out, force=False)
    refuse_existing(out, force=True)
    assert os.path.lexists(out)


def test_what_a_killed_run_left_is_no_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_path(out / "manifest.json") as part:
        part.write_bytes(b"{}")
    (out / "manifest.json").rename(part)
    refuse_existing(out, force=False)
    write_bytes(out / "file", b"whole")
    with refused(OutputError, f"{out} exists"):
        refuse_existing(out, force=False)


def test_only_a_resumable_output_is_offered_resumption(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"old")
    for resumable in (True, False):
        with pytest.raises(OutputError) as error:
            refuse_existing(tmp_path, force=False, resumable=resumable)
        assert ("--resume" in str(error.value)) == resumable


def test_outputs_of_every_kind_are_removed(tmp_path: Path) -> None:
    write_bytes(tmp_path / "directory" / "deep" / "file", b"old")
    write_bytes(tmp_path / "file", b"old")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("directory", "file", "link"):
        remove_output(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_removal_never_reaches_through_a_link(tmp_path: Path) -> None:
    write_bytes(tmp_path / "precious" / "file", b"old")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    remove_output(tmp_path / "link")
    assert not os.path.lexists(tmp_path / "link")
    assert (tmp_path / "precious" / "file").read_bytes() == b"old"


@pytest.mark.parametrize("there", [True, False])
def test_a_file_is_written_through_a_link(tmp_path: Path, there: bool) -> None:
    """Its target may lie on another disk: the temporary file has to be beside that."""
    target, link = tmp_path / "disk" / "file", tmp_path / "here" / "link"
    link.parent.mkdir()
    link.symlink_to("../disk/file")
    if there:
        write_bytes(target, b"old")
    with atomic_path(link) as part:
        assert part.parent == target.parent.resolve()
        part.write_bytes(b"new")
        assert not target.exists() or target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert os.readlink(link) == "../disk/file"
    assert names(tmp_path) == {"file", "link"}


def test_a_failed_write_through_a_link_leaves_both(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(RuntimeError, match="half way"):
        write_half(tmp_path / "link", RuntimeError("half way"))
    assert (tmp_path / "file").read_bytes() == b"old"
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == {"file", "link"}


def test_a_directory_is_made_through_a_link(tmp_path: Path) -> None:
    write_bytes(tmp_path / "disk" / "out" / "old", b"old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    with atomic_directory(tmp_path / "link") as part:
        (part / "new").write_bytes(b"new")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk") == {"new"}
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


def test_a_directory_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    for content in ("first", "second"):
        with atomic_directory(out) as part:
            assert list(part.iterdir()) == []
            (part / content).write_text(content)
            assert not (out / content).exists()
        assert [path.name for path in out.iterdir()] == [content]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_the_old_directory_survives_a_failed_replacement(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    def replace_half() -> None:
        with atomic_directory(tmp_path / "out") as part:
            (part / "new").write_bytes(b"half")
            raise kind("half way")

    write_bytes(tmp_path / "out" / "old", b"old")
    with pytest.raises(kind, match="half way"):
        replace_half()
    assert names(tmp_path) == {"old"}


def test_a_directory_that_a_killed_process_left_is_made_anew(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as part:
        (part / "file").write_bytes(b"x")
    (tmp_path / "out").rename(part)
    with atomic_directory(tmp_path / "out") as part:
        (part / "other").write_bytes(b"y")
    assert names(tmp_path) == {"other"}


def settings(model: Path, data: Path, out: Path, *, resume: bool = False) -> CollectConfig:
    return CollectConfig(
        model=str(model), data=str(data), out=out, tokens=600, context=64, resume=resume
    )


@pytest.fixture(scope="module")
def small_traces(
    model_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> TraceStore:
    return collect(settings(model_dir, data_file, tmp_path_factory.mktemp("small") / "traces"))


@pytest.mark.parametrize("missing", [100_000, 1], ids=["a third missing", "a byte missing"])
def test_export_on_a_full_disk_leaves_nothing(
    psp: Psp, model_dir: Path, exact_dir: Path, exact_bundle: Bundle, tmp_path: Path, missing: int
) -> None:
    out = tmp_path / "a.powerinfer.gguf"
    limit = exact_bundle.model_file.stat().st_size - missing
    line = refused_for_room(
        psp, limit, "export-gguf", "--model", model_dir, "--predictors", exact_dir, "--out", out
    )
    assert line.startswith(f"Error: cannot write {out}: ")
    assert "File too large" in line
    assert "ulimit -f" in line
    assert list(tmp_path.iterdir()) == []


def test_collect_on_a_full_disk_goes_on_once_there_is_room(
    psp: Psp, model_dir: Path, data_file: Path, small_traces: TraceStore, tmp_path: Path
) -> None:
    out = tmp_path / "traces"
    sizes = ("--tokens", 600, "--context", 64)
    line = refused_for_room(
        psp, 200_000, "collect", "--model", model_dir, "--data", data_file, "--out", out, *sizes
    )
    shard = out / "layer-00" / "shard-00000.safetensors"
    assert line.startswith(f"Error: cannot write {shard}: ")
    assert "File too large" in line
    assert "ulimit -f" in line
    assert names(out) == {"manifest.json", "weights.safetensors"}
    collect(settings(model_dir, data_file, out, resume=True))
    assert names(out) == names(small_traces.path)
    assert shard.read_bytes() == (small_traces.path / shard.relative_to(out)).read_bytes()


def test_train_predictor_on_a_full_disk_leaves_no_layer_file(
    psp: Psp, small_traces: TraceStore, tmp_path: Path
) -> None:
    out = tmp_path / "predictors"
    line = refused_for_room(
        psp,
        30_000,
        *("train-predictor", "--traces", small_traces.path, "--out", out),
        *("--rank", 128, "--jobs", 1),  # so that layer 0 comes first
    )
    assert line.startswith(f"Error: cannot write {out / 'layer-00.safetensors'}: ")
    assert "File too large" in line
    assert "ulimit -f" in line
    assert names(out) == {"predictors.json"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_documents_without_end_or_of_no_end_of_bytes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    with (tmp_path / "huge").open("wb") as huge:
        huge.truncate(LARGEST_DOCUMENT + 1)  # no block of it is on disk
    for name, problem in (
        *(("pipe", "no plain file"), ("link", "no plain file"), ("", "directory")),
        ("huge", "more than 64 MiB"),
    ):
        with refused(DataError, problem, "do that"):
            read_json(tmp_path / name, DataError, "do that")
    with refused(DataError, "more than 1 MiB"):
        read_whole(tmp_path / "huge", DataError, "do that", limit=1 << 20)


def test_json_that_grows_in_memory_is_refused_unparsed(tmp_path: Path) -> None:
    """A list takes 2 bytes of text and 64 of memory; 64 MiB of them would take 1.4 GB."""
    file = tmp_path / "lists.json"
    file.write_bytes(b'{"a": [' + b"[]," * 4_000_000 + b"[]]}")
    with refused(DataError, "more values than any such file has", "do that"):
        read_json(file, DataError, "do that")
    file.write_bytes(b'{"a": "' + b"x" * 4_000_000 + b'"}')
    assert len(read_json(file, DataError, "do that")["a"]) == 4_000_000


@pytest.mark.parametrize("nested", ["[", "{a: ", "- ", "? "])
def test_yaml_of_dozens_of_levels_is_refused_unparsed(tmp_path: Path, nested: str) -> None:
    """PyYAML took 45 s over 100 kB of brackets; here are as many levels as do no harm."""
    file = tmp_path / "deep.yaml"
    file.write_text(nested * 60)
    with refused(DataError, "more than 50 levels deep", "do that"):
        read_yaml_text(file, DataError, "do that")
    file.write_text("stages: [" + "{a: [1]}, " * 500 + "]")
    assert read_yaml_text(file, DataError, "do that") == file.read_bytes()


def test_yaml_whose_aliases_grow_is_refused() -> None:
    """What they stand for takes no memory, but minutes of whoever goes through it."""
    assert parse_yaml(b"a: &a [1, 2]\nb: {<<: &c {d: *a}, e: *a}") == {
        "a": [1, 2],
        "b": {"d": [1, 2], "e": [1, 2]},
    }
    assert parse_yaml(b"# nothing") is None
    levels = "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 10}]\n" for n in range(1, 5))
    with pytest.raises(yaml.YAMLError, match="aliases add more than 10000 values"):
        parse_yaml(f"a0: &a0 [1]\n{levels}".encode())
    with pytest.raises(yaml.YAMLError, match="a value holds itself"):
        parse_yaml(b"a: &a {b: [*a]}")


@pytest.mark.parametrize("force", [False, True])
def test_what_a_killed_process_left_half_is_in_nobodys_way(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "out"
    (out / "training" / ".windows.part").mkdir(parents=True)
    (out / "training" / ".sparsify.json.part").write_text("{")
    refuse_existing(out, force=force, marker="training/sparsify.json")
    (out / "training" / "notes.txt").touch()
    with refused(OutputError, str(out)):
        refuse_existing(out, force=force, marker="training/sparsify.json")


def test_a_library_that_finds_no_room_is_told_of_in_one_line(tmp_path: Path) -> None:
    told = refused(OutputError, str(tmp_path), "No space left", "free some space")
    with told, refused_writes(tmp_path):
        Path("/dev/full").write_text("x")
    with pytest.raises(FileNotFoundError), refused_writes(tmp_path):
        (tmp_path / "none").read_bytes()
