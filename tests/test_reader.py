"""Reading of GGUF and PWRI files: honest ones to the byte, hostile ones refused in one line."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from common.errors import FormatError
from gguf_export.bundle import Bundle
from gguf_files.reader import GGUFFile, TensorInfo, Value

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
TENSOR_F32, TENSOR_F16, TENSOR_Q4_0, TENSOR_Q8_1, TENSOR_I32 = 0, 1, 2, 9, 26
HUGE = [2**31, 2**32, 2**62, 2**63, 2**64 - 1]
# Far below what a lying header asks for, far above what an honest small file needs.
ALLOWED_BYTES = 1 << 20


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def key(name: bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def array(name: bytes, element: int, count: int, payload: bytes) -> bytes:
    return key(name, ARRAY, struct.pack("<IQ", element, count) + payload)


def tensor(name: bytes, dims: Sequence[int], kind: int, offset: int) -> bytes:
    """Describe a tensor; `dims` in the file's order, fastest first."""
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def pwri(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"PWRI",
    version: int = 3,
    tensor_count: int | None = None,
    key_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    """Assemble a file whose counts may lie."""
    tensor_count = len(tensors) if tensor_count is None else tensor_count
    key_count = len(keys) if key_count is None else key_count
    counts = struct.pack("<IQQ", version, tensor_count, key_count)
    header = b"".join([magic, counts, *keys, *tensors])
    return header + bytes(-len(header) % alignment) + data


def aligned(size: int) -> bytes:
    return key(b"general.alignment", U32, struct.pack("<I", size))


def small() -> tuple[bytes, int]:
    """Return a small honest file and the size of its header."""
    keys = [
        key(b"name", STRING, text(b"small")),
        key(b"size", U32, struct.pack("<I", 7)),
        array(b"list", STRING, 2, text(b"a") + text(b"bc")),
        array(b"real", F32, 2, struct.pack("<2f", 0.5, -2)),
    ]
    tensors = [tensor(b"m", (2, 3), TENSOR_F16, 0), tensor(b"v", (4,), TENSOR_F32, 32)]
    data = np.arange(6, dtype="<f2").tobytes() + bytes(20) + np.arange(4, dtype="<f4").tobytes()
    return pwri(keys, tensors, data), 24 + sum(map(len, keys)) + sum(map(len, tensors))


def opened(tmp_path: Path, content: bytes) -> GGUFFile:
    path = tmp_path / "file.powerinfer.gguf"
    # A new file each time: truncating one that is still mapped is slow.
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return GGUFFile(path)


def refusal(tmp_path: Path, content: bytes) -> str:
    """Open a bad file: it must be refused in one line that names it, without any allocation."""
    tracemalloc.start()
    try:
        with pytest.raises(FormatError) as caught:
            opened(tmp_path, content)
        assert tracemalloc.get_traced_memory()[1] < ALLOWED_BYTES
    finally:
        tracemalloc.stop()
    return one_line(caught.value)


def one_line(error: FormatError) -> str:
    message = str(error)
    assert len(message.splitlines()) == 1, repr(message)
    assert "file.powerinfer.gguf: " in message
    return message


def survives(tmp_path: Path, content: bytes) -> bool:
    """Whether a file opens; any failure but a one-line `FormatError` fails the test."""
    try:
        file = opened(tmp_path, content)
        for name in file.tensors:
            file.tensor(name)
    except FormatError as error:
        one_line(error)
        return False
    return True


def test_a_hand_assembled_file_is_parsed_to_exact_values(tmp_path: Path) -> None:
    numbers: list[tuple[bytes, int, str, Any]] = [
        (b"u8", U8, "<B", 200),
        (b"i8", I8, "<b", -100),
        (b"u16", U16, "<H", 60000),
        (b"i16", I16, "<h", -30000),
        (b"u32", U32, "<I", 4000000000),
        (b"i32", I32, "<i", -2000000000),
        (b"f32", F32, "<f", 0.375),
        (b"bool", BOOL, "<?", True),
        (b"u64", U64, "<Q", 2**63 + 1),
        (b"i64", I64, "<q", -(2**62)),
        (b"f64", F64, "<d", 0.1),
    ]
    keys = [key(name, kind, struct.pack(code, value)) for name, kind, code, value in numbers]
    keys += [
        key("näme".encode(), STRING, text(b"any \xff bytes")),
        array(b"numbers", I32, 3, struct.pack("<3i", 1, -2, 3)),
        array(b"words", STRING, 2, text(b"") + text(b"two")),
        array(b"none", F32, 0, b""),
    ]
    tensors = [tensor(b"m", (2, 3), TENSOR_F16, 0), tensor(b"i", (2,), TENSOR_I32, 32)]
    data = np.arange(6, dtype="<f2").tobytes() + bytes(20) + struct.pack("<2i", 5, -6)
    content = pwri(keys, tensors, data)
    file = opened(tmp_path, content)

    assert file.sparse
    for name, kind, _, value in numbers:
        assert file.values[name.decode()] == Value(GGUFValueType(kind), None, value)
    assert file.values["näme"] == Value(GGUFValueType.STRING, None, b"any \xff bytes")
    assert file.values["words"].data == [b"", b"two"]
    assert file.value("numbers", GGUFValueType.ARRAY, GGUFValueType.INT32).tolist() == [1, -2, 3]
    assert file.values["none"].data.tolist() == []
    start = len(content) - len(data)
    assert file.tensors == {
        "m": TensorInfo("m", (3, 2), GGMLQuantizationType.F16, start, 12),
        "i": TensorInfo("i", (2,), GGMLQuantizationType.I32, start + 32, 8),
    }
    assert file.tensor("m").tolist() == [[0, 1], [2, 3], [4, 5]]
    assert file.tensor("m").dtype == np.float16
    assert file.tensor("i").tolist() == [5, -6]


def test_a_file_without_keys_or_tensors_is_24_bytes(tmp_path: Path) -> None:
    file = opened(tmp_path, bytes.fromhex("50575249 03000000 0000000000000000 0000000000000000"))
    assert (file.sparse, file.values, file.tensors) == (True, {}, {})
    assert not opened(tmp_path, pwri(magic=b"GGUF")).sparse


def test_tensors_are_read_only(tmp_path: Path) -> None:
    vector = opened(tmp_path, small()[0]).tensor("v")
    with pytest.raises(ValueError, match="read-only"):
        vector[0] = 1


def patched(path: Path, out: Path) -> GGUFReader:
    """Open a copy of a PWRI file, its magic changed to GGUF, with the format's own library."""
    content = path.read_bytes()
    assert content[:4] == b"PWRI"
    out.write_bytes(b"GGUF" + content[4:])
    return GGUFReader(out)


def plain(data: Any) -> Any:
    """Turn a value into what the library's reader gives: str, numbers and lists of them."""
    if isinstance(data, bytes):
        return data.decode()
    if isinstance(data, list):
        return [plain(element) for element in data]
    return data.tolist() if isinstance(data, np.ndarray) else data


def test_the_format_s_own_library_agrees_key_for_key(exact_bundle: Bundle, tmp_path: Path) -> None:
    ours = GGUFFile(exact_bundle.model_file)
    theirs = patched(exact_bundle.model_file, tmp_path / "copy.gguf")
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.values) == list(fields)
    for name, value in ours.values.items():
        types = [value.kind] if value.element is None else [value.kind, value.element]
        assert fields[name].types == types, name
        assert fields[name].contents() == plain(value.data), name


def test_the_format_s_own_library_agrees_tensor_for_tensor(
    exact_bundle: Bundle, tmp_path: Path
) -> None:
    ours = GGUFFile(exact_bundle.model_file)
    theirs = patched(exact_bundle.model_file, tmp_path / "copy.gguf").tensors
    assert list(ours.tensors) == [found.name for found in theirs]
    for found in theirs:
        info = ours.tensors[found.name]
        assert (info.kind, info.start, info.size) == (
            found.tensor_type,
            found.data_offset,
            found.n_bytes,
        )
        assert info.shape == tuple(reversed(found.shape.tolist()))
        assert ours.tensor(found.name).tobytes() == found.data.tobytes()


def test_every_kind_that_the_library_writes_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "written.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_bool("flag", False)
    writer.add_uint64("large", 2**64 - 1)
    writer.add_float64("real", 1e300)
    writer.add_array("flags", [True, False])
    writer.add_array("names", ["a", "ü"])
    writer.add_tensor("matrix", np.eye(3, 32, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(path)
    assert not file.sparse
    assert {name: plain(value.data) for name, value in file.values.items()} == {
        "general.architecture": "llama",
        "flag": False,
        "large": 2**64 - 1,
        "real": 1e300,
        "flags": [True, False],
        "names": ["a", "ü"],
    }
    np.testing.assert_array_equal(file.tensor("matrix"), np.eye(3, 32))


def test_truncation_at_every_byte_is_refused(tmp_path: Path) -> None:
    content, header = small()
    for size in [*range(header), *range(header, len(content), 5), len(content) - 1]:
        assert not survives(tmp_path, content[:size]), size
    assert survives(tmp_path, content)


def test_any_flipped_header_bit_gives_one_line_or_a_file(tmp_path: Path) -> None:
    content, header = small()
    opened_files = 0
    tracemalloc.start()
    try:
        for bit in range(8 * header):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            opened_files += survives(tmp_path, bytes(flipped))
        assert tracemalloc.get_traced_memory()[1] < ALLOWED_BYTES
    finally:
        tracemalloc.stop()
    # Bits of names and values change what is read and nothing else; those of structure are caught.
    assert header < opened_files < 6 * header


@pytest.mark.parametrize("count", HUGE)
def test_a_count_beyond_the_file_is_refused(tmp_path: Path, count: int) -> None:
    assert f"tensor count {count}" in refusal(tmp_path, pwri(tensor_count=count))
    assert f"value count {count}" in refusal(tmp_path, pwri(key_count=count))


@pytest.mark.parametrize("count", HUGE)
@pytest.mark.parametrize("element", [U8, F32, STRING, F64])
def test_an_array_longer_than_the_file_is_refused(tmp_path: Path, element: int, count: int) -> None:
    message = refusal(tmp_path, pwri([array(b"list", element, count, bytes(64))]))
    assert f"list {count}" in message


@pytest.mark.parametrize("length", HUGE)
def test_a_string_longer_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    lie = struct.pack("<Q", length)
    assert str(length) in refusal(tmp_path, pwri([key(b"word", STRING, lie + b"abc")]))
    assert str(length) in refusal(tmp_path, pwri([lie + bytes(64)]))
    assert str(length) in refusal(tmp_path, pwri([], [lie + bytes(64)]))


@pytest.mark.parametrize("size", [*HUGE, 0])
@pytest.mark.parametrize("dims", ["{0}", "32,{0}", "{0},{0},{0},{0}"])
def test_a_tensor_larger_than_the_file_is_refused(tmp_path: Path, dims: str, size: int) -> None:
    shape = [int(part) for part in dims.format(size).split(",")]
    for kind in (TENSOR_F16, TENSOR_Q4_0):
        content = pwri([], [tensor(b"m", shape, kind, 0)], bytes(64))
        assert "tensor m" in refusal(tmp_path, content)


@pytest.mark.parametrize("offset", [64, 2**62, 2**63, 2**64 - 32])
def test_a_tensor_beyond_the_end_is_refused(tmp_path: Path, offset: int) -> None:
    content = pwri([], [tensor(b"m", (8,), TENSOR_F32, offset)], bytes(64))
    assert "tensor m ends after the file does" in refusal(tmp_path, content)


FOUR = struct.pack("<I", 4)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (pwri(magic=b"LMGG"), "magic is b'LMGG'"),
        (pwri(version=1), "version is 1, expected 2 or 3, little-endian; convert"),
        (pwri(version=4), "version is 4, expected 2 or 3"),
        (pwri(version=0), "version is 0, expected 2 or 3"),
        (pwri(version=0x03000000), "version is 3, big-endian, expected"),
        (pwri([key(b"k", U32, FOUR), key(b"k", U32, FOUR)]), "key k appears twice"),
        (pwri([key(b"k", 13, FOUR)]), "k has unknown type 13"),
        (pwri([array(b"k", 99, 1, FOUR)]), "k has unknown type 99"),
        (pwri([array(b"k", ARRAY, 1, FOUR)]), "k is an array of arrays"),
        (pwri([key(b"\xff\xfe", U32, FOUR)]), "not UTF-8"),
        (pwri([], [tensor(b"t", (8,), TENSOR_F32, 0)] * 2, bytes(32)), "tensor t appears twice"),
        (pwri([], [tensor(b"t", (8,), 9999, 0)], bytes(32)), "tensor t has unknown type 9999"),
        (pwri([], [tensor(b"t", (), TENSOR_F32, 0)], bytes(32)), "tensor t has 0 dimensions"),
        (pwri([], [tensor(b"t", (1,) * 5, TENSOR_F32, 0)]), "tensor t has 5 dimensions"),
        (pwri([], [tensor(b"t", (8,), TENSOR_F32, 4)], bytes(64)), "tensor t is not aligned"),
        (pwri([], [tensor(b"t", (33,), TENSOR_Q4_0, 0)], bytes(64)), "tensor t has shape (33,)"),
        (b"", "is empty"),
        (b"PWR", "ends inside magic"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: bytes, problem: str) -> None:
    assert problem in refusal(tmp_path, content)


@pytest.mark.parametrize("control", ["\n", "\r", "\x0b", "\x1b[2J", "\x85", "\u2028"])
def test_names_in_the_file_cannot_break_the_line(tmp_path: Path, control: str) -> None:
    name = f"a{control}b".encode()
    for content in (
        pwri([key(name, U32, FOUR)] * 2),
        pwri([key(name, 77, FOUR)]),
        pwri([array(name, F32, 2**40, FOUR)]),
        pwri([], [tensor(name, (8,), TENSOR_F32, 0)]),
        pwri([], [tensor(name, (8,), 9999, 0)], bytes(32)),
    ):
        assert "\x1b" not in refusal(tmp_path, content)


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    directory = tmp_path / "file.powerinfer.gguf"
    directory.mkdir()
    missing = tmp_path / "missing" / "file.powerinfer.gguf"
    too_long = tmp_path / ("x" * 300 + "file.powerinfer.gguf")
    for path, problem in (
        (directory, "Is a directory"),
        (missing, "No such file"),
        (too_long, "name too long"),
    ):
        with pytest.raises(FormatError, match=problem) as caught:
            GGUFFile(path)
        assert "psp export-gguf" in one_line(caught.value)


def test_values_and_tensors_that_are_not_there_are_refused_by_name(tmp_path: Path) -> None:
    unused = tensor(b"q", (32,), TENSOR_Q8_1, 0)
    file = opened(tmp_path, pwri([array(b"list", F32, 0, b"")], [unused], bytes(40)))
    requests: list[tuple[str, Callable[[], object]]] = [
        ("key size is missing", lambda: file.value("size", GGUFValueType.UINT32)),
        ("key list is FLOAT32, expected UINT32", lambda: file.value("list", GGUFValueType.UINT32)),
        ("tensor m is missing", lambda: file.tensor("m")),
        ("tensor q has type Q8_1", lambda: file.tensor("q")),
    ]
    for problem, request in requests:
        with pytest.raises(FormatError) as caught:
            request()
        assert problem in one_line(caught.value)


@pytest.mark.parametrize("alignment", [8, 16, 32, 64, 256])
@pytest.mark.parametrize("filler", range(0, 64, 16))
def test_every_alignment_is_read_right(tmp_path: Path, filler: int, alignment: int) -> None:
    keys = [aligned(alignment), key(b"filler", STRING, text(bytes(filler)))]
    tensors = [tensor(b"m", (2,), TENSOR_F32, 0), tensor(b"n", (1,), TENSOR_F32, alignment)]
    data = struct.pack("<2f", 1, 2).ljust(alignment, b"\0") + struct.pack("<f", 3)
    file = opened(tmp_path, pwri(keys, tensors, data, alignment=alignment))
    assert file.alignment == alignment
    assert (file.tensor("m").tolist(), file.tensor("n").tolist()) == ([1, 2], [3])


@pytest.mark.parametrize(
    "value",
    [
        *(aligned(size) for size in (0, 1, 4, 24, 2**32 - 1)),
        key(b"general.alignment", U64, struct.pack("<Q", 32)),
        array(b"general.alignment", U32, 1, struct.pack("<I", 32)),
    ],
)
def test_an_alignment_that_the_format_does_not_know_is_refused(
    tmp_path: Path, value: bytes
) -> None:
    assert "expected a power of two from 8 on as UINT32" in refusal(tmp_path, pwri([value]))


def test_a_tensor_is_checked_against_the_file_s_own_alignment(tmp_path: Path) -> None:
    content = pwri([aligned(64)], [tensor(b"t", (8,), TENSOR_F32, 32)], bytes(128), alignment=64)
    assert "tensor t is not aligned to 64 bytes" in refusal(tmp_path, content)
    huge = pwri([aligned(2**31)], [tensor(b"t", (8,), TENSOR_F32, 0)], bytes(64))
    assert "tensor t ends after the file does" in refusal(tmp_path, huge)


def test_version_2_has_the_layout_of_3(tmp_path: Path) -> None:
    content, _ = small()
    old = content[:4] + struct.pack("<I", 2) + content[8:]
    three, two = opened(tmp_path, content), opened(tmp_path, old)
    assert (three.version, two.version) == (3, 2)
    assert two.tensors == three.tensors
    for name in two.tensors:
        np.testing.assert_array_equal(two.tensor(name), three.tensor(name))
