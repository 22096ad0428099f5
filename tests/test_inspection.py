"""What `inspect` tells of a file: sparse, dense or foreign, from its header alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refused
from gguf import GGUFWriter

from common.errors import FormatError
from gguf_export.bundle import Bundle
from gguf_export.pwri.gpu_index import index_path, write_gpu_index
from gguf_export.pwri.inspection import inspect_file, inspection_table
from gguf_files.reader import GGUFFile


@pytest.fixture(scope="module")
def document(exact_bundle: Bundle) -> dict[str, Any]:
    return inspect_file(exact_bundle.model_file)


def written(path: Path, keys: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """Write a dense file with the format's own library."""
    writer = GGUFWriter(path, "falcon")
    for name, value in keys.items():
        if isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_string(name, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_header_s_facts(document: dict[str, Any], exact_bundle: Bundle) -> None:
    path = exact_bundle.model_file
    facts = ("file", "magic", "kind", "version", "architecture", "file_bytes")
    assert [document[fact] for fact in facts] == [
        str(path),
        "PWRI",
        "sparse",
        3,
        "llama",
        path.stat().st_size,
    ]
    json.dumps(document, allow_nan=False)


def test_keys_have_types_and_arrays_are_shortened(document: dict[str, Any]) -> None:
    keys = document["keys"]
    assert keys["llama.block_count"] == {"type": "UINT32", "value": 2}
    assert keys["powerinfer.sparse_threshold"] == {"type": "FLOAT32", "value": 0.0}
    assert keys["psp.activation"] == {"type": "STRING", "value": "relu"}
    assert keys["tokenizer.ggml.tokens"] == {
        "type": "ARRAY",
        "element": "STRING",
        "length": 320,
        "first": ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>"],
    }
    assert keys["tokenizer.ggml.token_type"]["first"] == [2, 3, 3, 6, 6]


def test_tensors_are_listed_as_the_reader_finds_them(
    document: dict[str, Any], exact_bundle: Bundle
) -> None:
    infos = GGUFFile(exact_bundle.model_file).tensors.values()
    assert document["tensors"] == [
        {
            "name": info.name,
            "shape": list(info.shape),
            "type": info.kind.name,
            "bytes": info.size,
            "offset": info.start,
        }
        for info in infos
    ]


def test_ranks_and_bytes_by_kind(document: dict[str, Any]) -> None:
    """Sizes of the tiny model: d_model 64, d_ff 1012, 2 layers, rank 128, 2 of 4 heads for keys."""
    assert document["predictor_ranks"] == [{"layer": n, "rank": 128} for n in range(2)]
    assert document["bytes_by_kind"] == {
        "predictors": 2 * 2 * 128 * (64 + 1012),
        "norms": 4 * 64 * 5,
        "attention": 2 * 2 * (2 * 64 * 64 + 2 * 32 * 64),
        "ffn": 2 * 2 * 3 * 1012 * 64,
        "embeddings_and_output": 2 * 2 * 320 * 64,
        "other": 0,
    }
    assert document["tensor_bytes"] == sum(document["bytes_by_kind"].values())


def test_a_dense_file_of_another_family(tmp_path: Path) -> None:
    half = np.zeros((2, 32), np.float16)
    tensors = {
        "token_embd.weight": half,
        "blk.0.attn_norm_2.weight": np.zeros(32, np.float32),
        "blk.0.attn_norm.bias": np.zeros(32, np.float32),
        "blk.0.attn_qkv.weight": half,
        "blk.11.ffn_up.weight": half,
        "blk.0.ffn_norm_exps": half,
        "rope_freqs": half,
        "blk.x.fc1.weight": half,
    }
    document = inspect_file(written(tmp_path / "dense.gguf", {}, tensors))
    assert (document["magic"], document["kind"]) == ("GGUF", "dense")
    assert document["architecture"] == "falcon"
    assert document["predictor_ranks"] == []
    assert document["bytes_by_kind"] == {
        "predictors": 0,
        "norms": 256,
        "attention": 128,
        "ffn": 256,
        "embeddings_and_output": 128,
        "other": 256,
    }
    table = inspection_table(document)
    assert "GGUF, version 3: dense" in table
    assert "no predictors" in table


def test_layers_are_sorted_by_number(tmp_path: Path) -> None:
    layers = (10, 9, 2)
    tensors = {f"blk.{n}.fc1.weight": np.zeros((32 + n, 32), np.float16) for n in layers}
    document = inspect_file(written(tmp_path / "ranks.gguf", {}, tensors))
    assert document["predictor_ranks"] == [{"layer": n, "rank": 32 + n} for n in (2, 9, 10)]
    assert "2: 34, 9: 41, 10: 42" in inspection_table(document)


def test_hostile_values_stay_short_and_printable(tmp_path: Path) -> None:
    keys = {
        "evil": "\x1b[2J\nnew line \u202e",
        "long": "x" * 100_000,
        "nan": math.nan,
        "list": ["y" * 1000, "\x07"],
        "reals": [math.inf, 1.5],
    }
    document = inspect_file(written(tmp_path / "evil.gguf", keys, {}))
    shown = document["keys"]
    assert shown["evil"]["value"] == "\\x1b[2J\\nnew line \\u202e"
    assert len(shown["long"]["value"]) < 200
    assert len(shown["list"]["first"][0]) < 200
    assert shown["list"]["first"][1] == "\\x07"
    assert shown["nan"]["value"] == "nan"
    assert shown["reals"]["first"] == ["inf", 1.5]
    assert len(json.dumps(document, allow_nan=False)) < 3000
    assert all(line.isprintable() for line in inspection_table(document).split("\n"))


def test_the_table_names_every_key_and_tensor(document: dict[str, Any]) -> None:
    table = inspection_table(document)
    for name in [*document["keys"], *(tensor["name"] for tensor in document["tensors"])]:
        assert f"  {name} " in table
    for line in (
        "  magic         PWRI, version 3: sparse",
        "  ranks         128 in each of 2 layers",
        "  llama.block_count                       uint32 2",
        "  blk.0.fc1.weight          F16   (128, 64), 16,384 bytes at",
        "  ffn                    777,216 (53.2%)",
    ):
        assert line in table


def test_no_tensor_data_is_read(exact_bundle: Bundle, tmp_path: Path) -> None:
    """A file whose data is a hole of four gigabytes costs neither time nor memory."""
    import tracemalloc

    tensors = {"token_embd.weight": np.zeros((1, 1 << 10), np.float16)}
    path = written(tmp_path / "sparse.gguf", {}, tensors)
    content = path.read_bytes()
    dims = (1).to_bytes(8, "little")
    at = content.index((1 << 10).to_bytes(8, "little") + dims)
    rows = 1 << 21
    with path.open("r+b") as file:
        file.seek(at + 8)
        file.write(rows.to_bytes(8, "little"))
        file.truncate(len(content) + rows * 2048)
    tracemalloc.start()
    try:
        document = inspect_file(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert document["tensor_bytes"] == rows * 2048


def test_a_gpu_index_is_told(tmp_path: Path) -> None:
    path = index_path(tmp_path / "m.powerinfer.gguf")
    layers = [torch.arange(1012) < number for number in (64, 0, 1012)]
    write_gpu_index(path, layers, 5_000_000_000)
    document = inspect_file(path)
    assert (document["magic"], document["kind"]) == ("PWRI", "gpu index")
    assert document["architecture"] == "generic.gpu_index"
    assert document["keys"]["split.vram_capacity"] == {"type": "UINT64", "value": 5_000_000_000}
    assert document["gpu_neurons"] == [
        {"layer": 0, "neurons": 64},
        {"layer": 1, "neurons": 0},
        {"layer": 2, "neurons": 1012},
    ]
    assert {each["type"] for each in document["tensors"]} == {"I32"}
    assert document["tensor_bytes"] == 4 * (3 * 1012 + 64 + 1012)
    table = inspection_table(document)
    assert "PWRI, version 3: gpu index" in table
    assert "on the GPU    0: 64, 1: 0, 2: 1012" in table
    damaged = path.with_name(f"x{path.name}")
    damaged.write_bytes(path.read_bytes()[:-4000])
    with refused(FormatError, str(damaged), "ends after the file does"):
        inspect_file(damaged)


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("not a model at all")
    with refused(FormatError, str(path), "magic"):
        inspect_file(path)
    with refused(FormatError, "No such file"):
        inspect_file(tmp_path / "missing.gguf")
