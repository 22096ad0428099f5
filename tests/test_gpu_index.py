"""What PowerInfer is told of the GPU: the index, byte for byte, and the budget."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from conftest import refused

from common.errors import ExportError, FormatError, OutputError
from common.units import parse_size
from gguf_export.pwri.gpu_index import index_path, read_gpu_index, write_gpu_index
from gguf_export.pwri.memory_plan import vram_option

UINT32, STRING, UINT64 = 4, 8, 10
I32 = 18
"""In PowerInfer's ggml.h; GGUF has 26 today."""


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def info(name: str, elements: int, offset: int, kind: int = I32) -> bytes:
    return text(name) + struct.pack("<IQIQ", 1, elements, kind, offset)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 32)


def by_hand() -> bytes:
    """Three layers of 33 neurons: all but number 2, none and all on the GPU."""
    split = [n for n in range(33) if n != 2]
    vectors = [
        ("blk.0.gpu_idx", [int(n in split) for n in range(33)]),
        ("blk.0.gpu_bucket", split),
        ("blk.1.gpu_idx", [0] * 33),
        ("blk.1.gpu_bucket", []),
        ("blk.2.gpu_idx", [1] * 33),
        ("blk.2.gpu_bucket", list(range(33))),
    ]
    header = b"PWRI" + struct.pack("<IQQ", 3, len(vectors), 3)
    header += text("general.architecture") + struct.pack("<I", STRING) + text("generic.gpu_index")
    header += text("generic.gpu_index.block_count") + struct.pack("<II", UINT32, 3)
    header += text("split.vram_capacity") + struct.pack("<IQ", UINT64, 5_000_000_000)
    data = b""
    for name, values in vectors:
        header += info(name, len(values), len(data))
        data += padded(struct.pack(f"<{len(values)}i", *values))
    return padded(header) + data


def layers(*numbers: int, d_ff: int = 1012) -> list[torch.Tensor]:
    """Layers whose last neurons are on the GPU."""
    return [torch.arange(d_ff) >= d_ff - number for number in numbers]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.gpuidx"


def test_bytes_are_those_written_by_hand(path: Path) -> None:
    split = torch.ones(33, dtype=torch.bool)
    split[2] = False
    masks = [split, torch.zeros(33, dtype=torch.bool), torch.ones(33, dtype=torch.bool)]
    write_gpu_index(path, masks, 5_000_000_000)
    assert path.read_bytes() == by_hand()
    assert list(path.parent.iterdir()) == [path]


def test_bytes_written_by_hand_are_read(path: Path) -> None:
    path.write_bytes(by_hand())
    chosen, capacity = read_gpu_index(path, 3, 33)
    assert capacity == 5_000_000_000
    assert [layer.tolist() for layer in chosen] == [
        [n != 2 for n in range(33)],
        [False] * 33,
        [True] * 33,
    ]


@pytest.mark.parametrize("d_ff", [1012, 11008])
def test_more_than_ten_layers_keep_their_numbers(path: Path, d_ff: int) -> None:
    """Sorted as strings, blk.10 would come before blk.2; PowerInfer goes by position."""
    masks = layers(*(32 * n for n in range(12)), d_ff, d_ff=d_ff)
    write_gpu_index(path, masks, 1)
    chosen, _ = read_gpu_index(path, 13, d_ff)
    assert len(chosen) == 13
    assert all(torch.equal(a, b) for a, b in zip(masks, chosen, strict=True))
    content = path.read_bytes()
    places = [content.index(text(f"blk.{layer}.gpu_idx")) for layer in range(13)]
    assert places == sorted(places)


def test_all_layers_on_the_cpu(path: Path) -> None:
    write_gpu_index(path, layers(0, 0), 0)
    chosen, capacity = read_gpu_index(path, 2, 1012)
    assert capacity == 0
    assert not torch.cat(chosen).any()


@pytest.mark.parametrize("number", [1, 31, 33, 1011])
def test_numbers_that_cuda_asserts_on_are_refused(path: Path, number: int) -> None:
    with refused(ExportError, "layer 1", str(number), "multiple of 32"):
        write_gpu_index(path, layers(32, number), 0)
    assert not path.exists()


def test_what_the_system_refuses_is_one_line(path: Path) -> None:
    path.mkdir()
    with refused(OutputError, str(path)):
        write_gpu_index(path, layers(32), 0)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_path_beside_the_model() -> None:
    model = Path("/models/NAME.powerinfer.gguf")
    assert str(index_path(model)) == "/models/NAME.powerinfer.gguf.generated.gpuidx"


def swap(old: bytes, new: bytes) -> bytes:
    content = by_hand()
    assert content.count(old) == 1
    assert len(old) == len(new)
    return content.replace(old, new)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (swap(b"PWRI", b"GGUF"), "dense"),
        (swap(text("generic.gpu_index"), text("generic.gpu_split")), "generic.gpu_split"),
        (swap(b"split.vram_capacity", b"split.vram_capacitx"), "split.vram_capacity is missing"),
        (swap(b"blk.1.gpu_bucket", b"blk.0.gpu_bucket"), "twice"),
        (swap(text("blk.1.gpu_idx"), text("blk.7.gpu_idx")), "3 layers"),
        (swap(info("blk.0.gpu_idx", 33, 0), info("blk.0.gpu_idx", 33, 0, 26)), "type 26"),
        (swap(info("blk.0.gpu_idx", 33, 0), info("blk.0.gpu_idx", 32, 0)), "expected 33"),
        (swap(info("blk.1.gpu_bucket", 0, 448), info("blk.1.gpu_bucket", 1, 448)), "contradict"),
        (swap(struct.pack("<5i", 0, 1, 3, 4, 5), struct.pack("<5i", 0, 3, 1, 4, 5)), "contradict"),
        (swap(struct.pack("<5i", 0, 1, 3, 4, 5), struct.pack("<5i", 0, 1, 2, 4, 5)), "contradict"),
        (by_hand()[:-64], "ends after"),
        (by_hand()[:100], "more than the file can hold"),
        (b"", "empty"),
    ],
    ids=range(13),
)
def test_files_that_lie_are_refused(path: Path, content: bytes, problem: str) -> None:
    path.write_bytes(content)
    with refused(FormatError, str(path), problem):
        read_gpu_index(path, 3, 33)


@pytest.mark.parametrize("value", [2, -1])
def test_index_of_other_values_is_refused(path: Path, value: int) -> None:
    path.write_bytes(swap(struct.pack("<4i", 1, 1, 0, 1), struct.pack("<4i", 1, value, 0, 1)))
    with refused(FormatError, "layer 0"):
        read_gpu_index(path, 3, 33)


def test_index_of_another_model_is_refused(path: Path) -> None:
    path.write_bytes(by_hand())
    with refused(FormatError, "2 layers"):
        read_gpu_index(path, 2, 33)
    with refused(FormatError, "expected 34"):
        read_gpu_index(path, 3, 34)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 25_769_803_776),
        ("24GB", 24_000_000_000),
        ("1.5 gib", 1_610_612_736),
        ("0.1GB", 100_000_000),
        ("512MiB", 536_870_912),
        ("1TiB", 1_099_511_627_776),
        ("3kB", 3000),
        ("7B", 7),
        (" 25769803776 ", 25_769_803_776),
        ("0", 0),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "24 G", "-1GiB", "1e3", "24iB", "1.GiB", "inf", "１²"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with refused(ExportError, "24GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    "budget", [0, 1, 24 * 1024**3, 24_000_000_000, 5_548_032_001, 80 * 1024**3 - 1, 10**12 + 7]
)
def test_option_never_gives_powerinfer_more_than_the_budget(budget: int) -> None:
    text, granted = vram_option(budget)
    bits = struct.unpack("<I", struct.pack("<f", float(text)))[0]
    value, above = (struct.unpack("<f", struct.pack("<I", bits + more))[0] for more in (0, 1))
    assert int(value * 1024 * 1024 * 1024) == granted <= budget
    assert int(above * 1024 * 1024 * 1024) > budget or granted == budget
