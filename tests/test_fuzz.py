"""Thousands of damaged files through every reader: an answer or one line, never more."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import refused
from damages import for_all_damages, lying
from gguf import GGMLQuantizationType, GGUFValueType
from safetensors.torch import save_file
from test_weights import Content

from common.errors import FormatError, PspError
from gguf_export.bundle import Bundle
from gguf_export.gpu_split import split
from gguf_export.predictor_kinds import open_predictors
from gguf_export.predictor_source import read_ranks
from gguf_export.pwri.gpu_index import index_path, read_gpu_index, write_gpu_index
from gguf_export.pwri.inspection import inspect_file, inspection_table
from gguf_export.pwri.statistics import read_statistics
from gguf_export.settings import SplitConfig
from gguf_files.reader import GGUFFile
from powerinfer_bridge.verify.verification import verification_table, verify

ALLOWED_SECONDS = 5.0
D_MODEL, D_FF, RANK = 32, 64, 32

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
    report = verify(path)
    assert report.ok, verification_table(report)
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


def answered(read: Callable[[], object]) -> bool:
    """Whether reading went well; anything but an answer or one line fails the test."""
    start, message = time.perf_counter(), ""
    try:
        read()
    except PspError as error:
        message = str(error)
        assert "; " in message, "no remedy"
        assert "alloc" not in message, "memory was asked for"
    assert len(message.splitlines()) <= 1
    assert len(message) < 1000
    assert time.perf_counter() - start < ALLOWED_SECONDS
    return not message


def inspected(path: Path) -> None:
    document = inspect_file(path)
    json.dumps(document, allow_nan=False)
    assert inspection_table(document)


def check(path: Path, model: str | None = None) -> bool:
    """Whether a file passes; anything but documents and one-line errors fails the test."""
    start = time.perf_counter()
    answered(lambda: inspected(path))
    report = verify(path, model, context=16, chunks=1)
    document = report.document()
    json.dumps(document, allow_nan=False)
    for found in document["checks"]:
        assert found["detail"].isprintable()
        assert len(found["detail"]) < 500
        assert "alloc" not in found["detail"]
    assert verification_table(report)
    assert time.perf_counter() - start < ALLOWED_SECONDS
    return bool(document["ok"])


def replace_file(path: Path, content: bytes) -> None:
    """Write a new file: truncating one that is still mapped is slow."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def test_damaged_model_files(small: bytes, tmp_path: Path, places: list[int]) -> None:
    path = tmp_path / "fuzz.powerinfer.gguf"

    def one(content: bytes) -> bool:
        replace_file(path, content)
        return check(path)

    assert one(small)
    # A vector in blocks of 32, which cannot be read row by row.
    vector = small.index(b"blk.0.attn_norm.weight") + len(b"blk.0.attn_norm.weight") + 4 + 8
    assert not one(lying(small, vector, "<I", GGMLQuantizationType.Q8_0))
    passed, count = for_all_damages(small, places, one, examples=1500)
    # Names and weights may change without harm; structure may not.
    assert 0 < passed < count / 2


def test_truncated_files_never_pass(small: bytes, tmp_path: Path, places: list[int]) -> None:
    path = tmp_path / "fuzz.powerinfer.gguf"
    for size in [*places[::40], *range(places[-1], len(small), 20_011), len(small) - 1]:
        replace_file(path, small[:size])
        assert not check(path), size


def imported(path: Path) -> None:
    """Read predictors as an export does."""
    source = open_predictors(path)
    json.loads(source.recipe)
    read_ranks(source, D_MODEL, D_FF)


def test_predictors_from_damaged_model_files(
    small: bytes, tmp_path: Path, places: list[int]
) -> None:
    path = tmp_path / "theirs.gguf"

    def one(content: bytes) -> bool:
        replace_file(path, content)
        return answered(lambda: read_ranks(open_predictors(path), 32, 1001))

    assert one(small)
    # A key's name of thousands of characters, found by more examples than these.
    tokens = small.index(b"tokenizer.ggml.tokens")
    assert not one(lying(small, tokens - 8, "<Q", 3000))
    passed, count = for_all_damages(small, places, one, examples=600)
    assert 0 < passed < count


def predictor_directory(path: Path) -> list[Path]:
    """Write two layers in PowerInfer's form with statistics; returns the files."""
    path.mkdir()
    (path.parent / "activation").mkdir()
    for layer in range(2):
        fc1, fc2 = torch.ones(RANK, D_MODEL).half(), torch.ones(D_FF, RANK).half()
        torch.save({"fc1.weight": fc1, "fc2.weight": fc2}, path / f"model_{layer}.pt")
        torch.save(torch.arange(D_FF), path.parent / "activation" / f"activation_{layer}.pt")
    (path / "config.json").write_text(json.dumps({"sparse_threshold": 0.5}))
    return [path / "model_1.pt", path / "config.json", path.parent / "activation/activation_0.pt"]


def checkpoint(path: Path, kind: str) -> list[Path]:
    """Write a checkpoint with predictors in it; returns the files."""
    path.mkdir()
    parts = {"fc1": torch.ones(RANK, D_MODEL).half(), "fc2": torch.ones(D_FF, RANK).half()}
    tensors = {f"model.layers.0.mlp.predictor.{name}.weight": t for name, t in parts.items()}
    (path / "config.json").write_text("{}")
    if kind == "safetensors":
        save_file(tensors, path / "model.safetensors")
        return [path / "model.safetensors"]
    shard, index = path / "pytorch_model-1-of-1.bin", path / "pytorch_model.bin.index.json"
    torch.save(tensors, shard)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard.name)}))
    return [shard, index]


@pytest.mark.parametrize("kind", ["directory", "safetensors", "bin"])
def test_damaged_predictors_of_others(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "theirs"
    files = predictor_directory(path) if kind == "directory" else checkpoint(path, kind)
    assert answered(lambda: imported(path))
    for file in files:
        whole = file.read_bytes()

        def one(content: bytes, file: Path = file) -> bool:
            replace_file(file, content)
            return answered(lambda: imported(path))

        passed, count = for_all_damages(whole, range(len(whole)), one, examples=250)
        assert passed < count
        replace_file(file, whole)
    assert answered(lambda: imported(path))


def test_damaged_statistics(tmp_path: Path) -> None:
    file = predictor_directory(tmp_path / "theirs")[-1]
    whole = file.read_bytes()

    def one(content: bytes) -> bool:
        replace_file(file, content)
        return answered(lambda: read_statistics(tmp_path, 2, D_FF))

    assert one(whole)
    passed, count = for_all_damages(whole, range(len(whole)), one, examples=250)
    assert passed < count


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
    path = tmp_path / "fuzz.powerinfer.gguf"
    passed = []
    for content in retyped(small, tmp_path / "small.gguf"):
        replace_file(path, content)
        passed.append(check(path))
    assert len(passed) > 900
    assert sum(passed) < len(passed) / 2


def test_damaged_files_against_their_model(
    exact_bundle: Bundle, model_dir: Path, tmp_path: Path
) -> None:
    content = exact_bundle.model_file.read_bytes()
    keys = range(content.index(b"llama.context_length"), content.index(b"tokenizer.ggml.tokens"))
    path = tmp_path / "fuzz.powerinfer.gguf"

    def one(data: bytes) -> bool:
        replace_file(path, data)
        return check(path, str(model_dir))

    assert one(content)
    passed, count = for_all_damages(content, keys, one, examples=25)
    assert passed < count / 4


def test_damaged_gpu_indexes(small: bytes, tmp_path: Path) -> None:
    model = tmp_path / "fuzz.powerinfer.gguf"
    model.write_bytes(small)
    path = index_path(model)
    write_gpu_index(path, [torch.arange(1001) < 32], 1 << 20)
    assert check(model)
    content = path.read_bytes()
    header = range(content.index(b"blk.0.gpu_bucket") + 36)

    def one(data: bytes) -> bool:
        replace_file(path, data)
        good = answered(lambda: read_gpu_index(path, 1, 1001))
        assert check(model) == good
        return good

    assert one(content)
    passed, count = for_all_damages(content, header, one, examples=400)
    assert 0 < passed < count / 2


def test_splits_of_damaged_model_files(small: bytes, tmp_path: Path, places: list[int]) -> None:
    path = tmp_path / "fuzz.powerinfer.gguf"
    (tmp_path / "activation").mkdir()
    torch.save(torch.arange(1001), tmp_path / "activation" / "activation_0.pt")
    config = SplitConfig(file=path, vram_budget="1MiB", force=True)

    def one(content: bytes) -> bool:
        replace_file(path, content)
        return answered(lambda: split(config))

    assert one(small)
    # Heads of no size, found by more examples than these.
    heads = small.index(b"llama.attention.head_count") + len(b"llama.attention.head_count") + 4
    assert not one(lying(small, heads, "<I", 2**31))
    passed, count = for_all_damages(small, places, one, examples=400)
    assert 0 < passed < count


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with refused(FormatError, str(tmp_path / "pipe"), "no plain file"):
        inspect_file(tmp_path / "pipe")
