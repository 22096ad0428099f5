"""Models in several GGUF files: read as one, whichever is named; broken sets in one line."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from gguf import GGMLQuantizationType, GGUFWriter
from test_reader import I32, STRING, TENSOR_F32, U16, key, pwri, tensor, text

from architectures.checkpoint import Checkpoint
from common.errors import CheckpointError, FormatError
from gguf_export.pwri.inspection import inspect_file
from gguf_files.reader import GGUFFile
from gguf_files.split_set import GGUFSet, open_gguf

NUMBERS = {f"blk.{n}.m.weight": np.full((2, 32), n, dtype=np.float16) for n in range(5)}
QUANTISED = np.arange(18, dtype=np.uint8).reshape(1, 18)


def written(out: Path, **options: Any) -> list[Path]:
    """Write six tensors with gguf's own writer; return its files."""
    writer = GGUFWriter(out, "llama", **options)
    writer.add_name("whole")
    for name, data in NUMBERS.items():
        writer.add_tensor(name, data)
    writer.add_tensor("q", QUANTISED, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(out.parent.glob(f"{out.stem}*.gguf"))


@pytest.fixture
def members(tmp_path: Path) -> list[Path]:
    paths = written(tmp_path / "m.gguf", split_max_tensors=2)
    assert [path.name for path in paths] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    return paths


@pytest.mark.parametrize("named", range(3))
def test_any_member_opens_the_set_as_one_file(
    members: list[Path], tmp_path: Path, named: int
) -> None:
    (whole,) = written(tmp_path / "whole.gguf")
    alone, together = open_gguf(whole), open_gguf(members[named])
    assert isinstance(together, GGUFSet)
    assert not isinstance(alone, GGUFSet)
    assert (alone.files, together.files) == ((whole,), tuple(members))
    assert together.path == members[0]
    assert list(together.tensors) == [*NUMBERS, "q"] == list(alone.tensors)
    assert set(together.values) - set(alone.values) == {
        "split.no",
        "split.count",
        "split.tensors.count",
    }
    for name in alone.tensors:
        np.testing.assert_array_equal(together.tensor(name), alone.tensor(name))
        assert together.mapped(name).tobytes() == alone.mapped(name).tobytes()
    assert together.mapped("q").tolist() == list(range(18))
    rows = np.array([1])
    np.testing.assert_array_equal(together.tensor("blk.4.m.weight", rows), [[4.0] * 32])
    together.forget()
    with refused(FormatError, "tensor none is missing"):
        together.tensor("none")


def member(number: int, count: int, tensors: int, *names: bytes, first: bytes = b"") -> bytes:
    """Return a member as gguf-split lays it out: only the first has keys of the model."""
    keys = [
        key(b"split.no", U16, struct.pack("<H", number)),
        key(b"split.count", U16, struct.pack("<H", count)),
        key(b"split.tensors.count", I32, struct.pack("<i", tensors)),
    ]
    infos = [tensor(name, (8,), TENSOR_F32, 32 * at) for at, name in enumerate(names)]
    data = np.full(8 * len(names), number, dtype="<f4").tobytes()
    return pwri([*([first] if first else []), *keys], infos, data, magic=b"GGUF")


def put(directory: Path, *contents: bytes, stem: str = "m") -> list[Path]:
    paths = [
        directory / f"{stem}-{n:05}-of-{len(contents):05}.gguf" for n in range(1, len(contents) + 1)
    ]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


NAME = key(b"general.name", STRING, text(b"model"))


def test_the_first_file_may_hold_no_tensor(tmp_path: Path) -> None:
    contents = (member(0, 3, 3, first=NAME), member(1, 3, 3, b"a"), member(2, 3, 3, b"b", b"c"))
    file = open_gguf(put(tmp_path, *contents)[1])
    assert file.values["general.name"].data == b"model"
    assert {name: file.tensor(name)[0] for name in file.tensors} == {"a": 1, "b": 2, "c": 2}


def test_one_file_of_one_is_a_file(tmp_path: Path) -> None:
    (path,) = put(tmp_path, member(0, 1, 1, b"a", first=NAME))
    assert not isinstance(open_gguf(path), GGUFSet)


def test_a_missing_member_is_named(members: list[Path]) -> None:
    members[1].unlink()
    with refused(FormatError, f"{members[1]}: 1 of 3 files are missing; fetch all files"):
        open_gguf(members[2])
    with refused(CheckpointError, f"{members[1]}: 1 of 3 files are missing; fetch all files"):
        Checkpoint.open(members[2])


def test_a_truncated_member_is_named(members: list[Path]) -> None:
    members[2].write_bytes(members[2].read_bytes()[:-40])
    with refused(
        FormatError,
        f"{members[2]}: tensor ",
        "ends after the file does; the file is damaged",
        "fetch or export",
    ):
        open_gguf(members[0])


def test_a_renamed_member_asks_for_its_name(members: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "renamed.gguf"
    shutil.copyfile(members[0], other)
    with refused(FormatError, f"{other}: is one of 3 files", "NAME-00001-of-00003.gguf"):
        open_gguf(other)


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (member(1, 2, 5, b"b"), "split.tensors.count is 5, expected 2"),
        (member(1, 3, 2, b"b"), "split.count is 3, expected 2"),
        (member(0, 2, 2, b"b"), "split.no is 0, expected 1"),
        (member(1, 2, 2, b"a"), "repeats tensors of m-00001-of-00002.gguf"),
        (member(1, 2, 2, b"b", b"c"), "the files hold 3 tensors, split.tensors.count is 2"),
        (b"PWRI" + member(1, 2, 2, b"b")[4:], "its magic is another"),
    ],
)
def test_members_of_different_sets_are_refused(tmp_path: Path, second: bytes, problem: str) -> None:
    paths = put(tmp_path, member(0, 2, 2, b"a", first=NAME), second)
    with refused(FormatError, "no part of one set with the others", problem, "fetch all files"):
        open_gguf(paths[0])


def test_a_member_without_its_keys_is_refused(tmp_path: Path) -> None:
    paths = put(tmp_path, member(0, 2, 2, b"a", first=NAME), pwri(magic=b"GGUF"))
    with refused(FormatError, f"{paths[1]}: key split.no is missing"):
        open_gguf(paths[0])
    assert not isinstance(open_gguf(paths[1]), GGUFSet)


def test_a_count_of_another_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(pwri([key(b"split.count", I32, struct.pack("<i", 2))]))
    with refused(FormatError, "key split.count is INT32, expected UINT16"):
        open_gguf(path)
    assert GGUFFile(path).tensors == {}


def test_inspect_tells_all_of_a_set(members: list[Path]) -> None:
    document = inspect_file(members[1])
    assert document["file_bytes"] == sum(path.stat().st_size for path in members)
    assert [each["name"] for each in document["tensors"]] == [*NUMBERS, "q"]
    assert document["keys"]["general.name"]["value"] == "whole"
