"""Thousands of damaged files through `inspect` and `verify`: an answer or one line, never more."""

from __future__ import annotations

import json
import os
import random
import struct
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import refused
from gguf import GGUFValueType
from test_weights import Content

from common.errors import FormatError, PspError
from gguf_export.bundle import Bundle
from gguf_export.gpu_index import index_path, write_gpu_index
from gguf_export.reader import GGUFFile
from powerinfer_bridge.inspection import inspect_file, inspection_table
from powerinfer_bridge.verification import verification_table, verify

TRUNCATED, FLIPPED, LYING, SPLICED, INDEXES, COMPARED = 600, 900, 700, 200, 300, 25
ALLOWED_BYTES = 32 << 20
ALLOWED_SECONDS = 5.0
LIES = [0, 1, 3, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]

WIDTHS = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
    GGUFValueType.STRING: 8,
}


@pytest.fixture(scope="module")
def small(exact_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The smallest file that passes every check: a layer, d_model 32, 260 tokens."""
    content = Content.of(exact_bundle.model_file)
    sizes = {"embedding_length": 32, "block_count": 1, "feed_forward_length": 1001}
    heads = {"attention.head_count": 2, "attention.head_count_kv": 1}
    for key, size in (sizes | heads | {"rope.dimension_count": 16}).items():
        content.set(f"llama.{key}", size)
    content.keys["general.alignment"] = (32, GGUFValueType.UINT32, None)
    for key in ("tokens", "scores", "token_type"):
        del content.keys[f"tokenizer.ggml.{key}"][0][260:]
    d_ff, kv = 1001, 16
    rows = {"token_embd": 260, "output": 260, "attn_k": kv, "attn_v": kv, "ffn_gate": d_ff}
    rows |= {"ffn_up": d_ff, "ffn_down_t": d_ff, "fc2": d_ff}
    content.tensors = {
        name: tensor[: rows.get(name.split(".")[-2], 32), ..., :32][:, :32]
        if tensor.ndim == 2
        else tensor[:32]
        for name, tensor in content.tensors.items()
        if not name.startswith("blk.1.")
    }
    path = content.write(tmp_path_factory.mktemp("small") / "small.powerinfer.gguf")
    document = verify(path)
    assert document["ok"], verification_table(document)
    return path.read_bytes()


def header_end(small: bytes) -> int:
    """Return where the last tensor's name, two sizes, type and offset end."""
    last = b"blk.0.fc2.weight"
    return small.index(last) + len(last) + 4 + 2 * 8 + 4 + 8


@pytest.fixture(scope="module")
def places(small: bytes) -> list[int]:
    """Bytes of the header, those of the long lists of tokens left out."""
    first, last = small.index(b"tokenizer.ggml.tokens"), small.index(b"tokenizer.ggml.bos_token")
    return [at for at in range(header_end(small)) if at < first + 100 or at > last - 100]


def check(path: Path, model: str | None = None) -> bool:
    """Whether a file passes; anything but documents and one-line errors fails the test."""
    start, message = time.perf_counter(), "one line"
    try:
        document = inspect_file(path)
        json.dumps(document, allow_nan=False)
        assert inspection_table(document)
    except PspError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    document = verify(path, model, context=16, chunks=1)
    json.dumps(document, allow_nan=False)
    for found in document["checks"]:
        assert found["detail"].isprintable()
        assert len(found["detail"]) < 500
    assert verification_table(document)
    assert time.perf_counter() - start < ALLOWED_SECONDS
    return bool(document["ok"])


def passing(
    tmp_path: Path, variants: Iterator[bytes | bytearray], model: str | None = None
) -> tuple[int, int]:
    """Check every variant; returns how many passed, and how many there were."""
    passed = count = 0
    path = tmp_path / "fuzz.powerinfer.gguf"
    for content in variants:
        # A new file each time: truncating one that is still mapped is slow.
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        passed += check(path, model)
        count += 1
    return passed, count


def test_truncated_files(small: bytes, tmp_path: Path, places: list[int]) -> None:
    chance = random.Random(1)
    header = [chance.choice(places) for _ in range(TRUNCATED // 2)]
    sizes = header + [chance.randrange(len(small)) for _ in range(TRUNCATED // 2)]
    assert passing(tmp_path, (small[:size] for size in sizes)) == (0, TRUNCATED)


def flipped(small: bytes, places: list[int], chance: random.Random) -> bytearray:
    content = bytearray(small)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        anywhere = chance.random() < 0.2
        at = chance.randrange(len(content)) if anywhere else chance.choice(places)
        content[at] ^= 1 << chance.randrange(8)
    return content


def test_flipped_bits(small: bytes, tmp_path: Path, places: list[int]) -> None:
    chance = random.Random(2)
    variants = (flipped(small, places, chance) for _ in range(FLIPPED))
    passed, count = passing(tmp_path, variants)
    assert count == FLIPPED
    # Names and weights may change without harm; structure may not.
    assert 0 < passed < FLIPPED / 2


def lying(small: bytes, places: list[int], chance: random.Random) -> bytearray:
    """Overwrite a number of the header, be it a length, a count, a type, a size or an offset."""
    content = bytearray(small)
    for _ in range(chance.choice((1, 1, 2))):
        lie = chance.choice(LIES) if chance.random() < 0.7 else chance.randrange(20)
        code = "<I" if chance.random() < 0.4 else "<Q"
        lie &= 2 ** (8 * struct.calcsize(code)) - 1
        struct.pack_into(code, content, chance.choice(places), lie)
    return content


def test_lying_numbers(small: bytes, tmp_path: Path, places: list[int]) -> None:
    chance = random.Random(3)
    passed, count = passing(tmp_path, (lying(small, places, chance) for _ in range(LYING)))
    assert count == LYING
    assert passed < LYING / 2


def test_lies_cost_no_memory(small: bytes, tmp_path: Path, places: list[int]) -> None:
    chance = random.Random(4)
    tracemalloc.start()
    try:
        _, count = passing(tmp_path, (lying(small, places, chance) for _ in range(100)))
        assert tracemalloc.get_traced_memory()[1] < ALLOWED_BYTES
    finally:
        tracemalloc.stop()
    assert count == 100


def spliced(small: bytes, places: list[int], chance: random.Random) -> bytes:
    """Cut a piece out, or put it in twice."""
    at, size = chance.choice(places), chance.choice((1, 4, 8, 24, 100, 1000))
    cut = small[at : at + size]
    return small[:at] + (cut + cut if chance.random() < 0.5 else b"") + small[at + size :]


def test_pieces_missing_or_doubled(small: bytes, tmp_path: Path, places: list[int]) -> None:
    chance = random.Random(5)
    passed, count = passing(tmp_path, (spliced(small, places, chance) for _ in range(SPLICED)))
    assert count == SPLICED
    assert passed < SPLICED / 4


def other_values() -> Iterator[bytes]:
    """Yield a value of every type: scalars, a string, arrays of none and of two elements."""
    for kind in GGUFValueType:
        scalar = struct.pack("<I", kind) + (bytes(8) if kind is GGUFValueType.STRING else b"")
        if kind is GGUFValueType.ARRAY:
            yield scalar + struct.pack("<IQ", kind, 0)
            continue
        size = WIDTHS.get(kind, 4)
        yield scalar + (b"" if kind is GGUFValueType.STRING else bytes([1] * size))
        for count in (0, 2):
            yield struct.pack("<IIQ", GGUFValueType.ARRAY, kind, count) + bytes(size * count)


def retyped(small: bytes, path: Path) -> Iterator[bytes]:
    """Give every key a value of every type, everything else as it was."""
    path.write_bytes(small)
    file = GGUFFile(path)
    names = [*file.values, next(iter(file.tensors))]
    starts = [small.index(struct.pack("<Q", len(name)) + name.encode()) for name in names]
    end, data = header_end(small), min(info.start for info in file.tensors.values())
    assert 0 <= data - end < 32
    for name, start, following in zip(names, starts, starts[1:], strict=False):
        for value in other_values():
            header = small[: start + 8 + len(name)] + value + small[following:end]
            yield header + bytes(-len(header) % 32) + small[data:]


def test_keys_of_every_type(small: bytes, tmp_path: Path) -> None:
    passed, count = passing(tmp_path, retyped(small, tmp_path / "small.gguf"))
    assert count > 900
    assert passed < count / 2


def test_damaged_files_against_their_model(
    exact_bundle: Bundle, model_dir: Path, tmp_path: Path
) -> None:
    content = exact_bundle.model_file.read_bytes()
    chance = random.Random(6)
    places = list(range(content.index(b"llama.context_length"), len(content)))
    keys = list(range(places[0], content.index(b"llama.rope.freq_base") + 40))

    def variants() -> Iterator[bytearray]:
        for _ in range(COMPARED):
            yield flipped(content, chance.choice((places, keys)), chance)

    passed, count = passing(tmp_path, variants(), str(model_dir))
    assert count == COMPARED
    assert passed < count / 4


def test_damaged_gpu_indexes(small: bytes, tmp_path: Path) -> None:
    model = tmp_path / "fuzz.powerinfer.gguf"
    model.write_bytes(small)
    path = index_path(model)
    write_gpu_index(path, [torch.arange(1001) < 32], 1 << 20)
    assert check(model)
    content = path.read_bytes()
    header = list(range(content.index(b"blk.0.gpu_bucket") + 36))
    chance, passed = random.Random(7), 0
    for _ in range(INDEXES):
        change = chance.choice((flipped, lying, spliced))
        path.unlink()
        path.write_bytes(change(content, header, chance))
        passed += check(model)
    assert passed < INDEXES / 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with refused(FormatError, str(tmp_path / "pipe"), "no plain file"):
        inspect_file(tmp_path / "pipe")
