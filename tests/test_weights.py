"""Tensors and sizes of an exported file: what breaks PowerInfer's contract is refused by name."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEXT
from gguf import GGUFValueType, GGUFWriter

from architectures.rope import RopeScaling
from common.errors import FormatError
from common.machine import weight_budget
from gguf_export.bundle import Bundle
from gguf_export.pwri.hyperparameters import read_hyperparameters
from gguf_files.reader import GGUFFile
from powerinfer_bridge.engine.attention import KVCache
from powerinfer_bridge.engine.engine import Engine, generate

Change = Callable[["Content"], object]
ALLOWED_BYTES = 16 << 20


@dataclass
class Content:
    """An exported file taken apart, to be changed and written again."""

    keys: dict[str, tuple[Any, GGUFValueType, GGUFValueType | None]] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> Content:
        file = GGUFFile(path)
        content = cls(tensors={name: file.tensor(name) for name in file.tensors})
        for name, value in file.values.items():
            data = value.data.tolist() if isinstance(value.data, np.ndarray) else value.data
            content.keys[name] = (data, value.kind, value.element)
        return content

    def set(self, key: str, data: Any) -> None:
        """Change a value, not its type."""
        self.keys[key] = (data, *self.keys[key][1:])

    def retype(self, key: str, kind: GGUFValueType) -> None:
        self.keys[key] = (self.keys[key][0], kind, None)

    def write(self, path: Path, magic: bytes = b"PWRI") -> Path:
        writer = GGUFWriter(path, "llama")
        for name, (data, kind, element) in self.keys.items():
            writer.kv_data[0].pop(name, None)
            writer.add_key_value(name, data, kind, element)
        for name, tensor in self.tensors.items():
            writer.add_tensor(name, np.ascontiguousarray(tensor))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        path.write_bytes(magic + path.read_bytes()[4:])
        return path


def drop(name: str) -> Change:
    return lambda content: content.tensors.pop(name)


def put(name: str, change: Callable[[Any], Any]) -> Change:
    return lambda content: content.tensors.update({name: change(content.tensors[name])})


def add(name: str) -> Change:
    return lambda content: content.tensors.update({name: np.zeros((32, 32), np.float16)})


def value(key: str, data: object) -> Change:
    return lambda content: content.set(key, data)


def refusal(bundle: Bundle, tmp_path: Path, change: Change) -> str:
    """Change an exported file and open it: it must be refused in one line with a remedy."""
    content = Content.of(bundle.model_file)
    change(content)
    path = content.write(tmp_path / "changed.powerinfer.gguf")
    with pytest.raises(FormatError) as caught:
        Engine(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{path}: ")
    return message


def assert_remedy(message: str) -> None:
    problem, _, remedy = message.rpartition("; ")
    assert problem, f"no remedy in {message!r}"
    assert remedy


def logits(path: Path) -> torch.Tensor:
    engine = Engine(path)
    tokens = [1, *engine.vocabulary.encode(TEXT)][:40]
    return engine.forward(tokens, KVCache(engine.hyper.n_layers))


def test_an_unchanged_copy_gives_the_same_logits(exact_bundle: Bundle, tmp_path: Path) -> None:
    copy = Content.of(exact_bundle.model_file).write(tmp_path / "copy.powerinfer.gguf")
    torch.testing.assert_close(logits(copy), logits(exact_bundle.model_file), atol=0, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        "token_embd.weight",
        "output.weight",
        "output_norm.weight",
        "blk.0.attn_q.weight",
        "blk.1.ffn_down_t.weight",
        "blk.1.fc1.weight",
        "blk.0.fc2.weight",
    ],
)
def test_a_missing_tensor_is_named(exact_bundle: Bundle, tmp_path: Path, name: str) -> None:
    message = refusal(exact_bundle, tmp_path, drop(name))
    assert f"tensor {name}: missing; " in message


@pytest.mark.parametrize("name", ["blk.2.attn_q.weight", "blk.0.ffn_down.weight", "x"])
def test_an_extra_tensor_is_named(exact_bundle: Bundle, tmp_path: Path, name: str) -> None:
    message = refusal(exact_bundle, tmp_path, add(name))
    assert f"tensor {name}: not PowerInfer's; " in message


@pytest.mark.parametrize(
    ("name", "change", "found", "expected"),
    [
        ("token_embd.weight", lambda x: x[:-1], "(319, 64)", "(320, 64)"),
        ("output_norm.weight", lambda x: x[:32], "(32,)", "(64,)"),
        ("output_norm.weight", lambda x: x[None], "(1, 64)", "(64,)"),
        ("blk.0.attn_k.weight", lambda x: np.tile(x, (2, 1)), "(64, 64)", "(32, 64)"),
        ("blk.1.ffn_down_t.weight", lambda x: x.T, "(64, 1012)", "(1012, 64)"),
        ("blk.1.ffn_gate.weight", lambda x: x.reshape(-1), "(64768,)", "(1012, 64)"),
        ("blk.0.fc1.weight", lambda x: x[:, :32], "(128, 32)", "(any, 64)"),
        ("blk.0.fc2.weight", lambda x: x[:96], "(96, 128)", "(1012, any)"),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(
    exact_bundle: Bundle,
    tmp_path: Path,
    name: str,
    change: Callable[[Any], Any],
    found: str,
    expected: str,
) -> None:
    message = refusal(exact_bundle, tmp_path, put(name, change))
    assert f"tensor {name} has shape {found}, expected {expected.replace('any', '-1')}" in message
    assert_remedy(message)


@pytest.mark.parametrize(
    ("name", "dtype", "found", "expected"),
    [
        ("blk.0.ffn_down_t.weight", np.float32, "F32", "F16"),
        ("blk.1.fc1.weight", np.int32, "I32", "F16"),
        ("token_embd.weight", np.int32, "I32", "F16"),
        ("blk.0.ffn_norm.weight", np.float16, "F16", "F32"),
    ],
)
def test_a_tensor_of_another_type_is_named_with_both_types(
    exact_bundle: Bundle, tmp_path: Path, name: str, dtype: type, found: str, expected: str
) -> None:
    message = refusal(exact_bundle, tmp_path, put(name, lambda x: x.astype(dtype)))
    assert f"tensor {name} is {found}, expected {expected}" in message
    assert_remedy(message)


def test_ranks_of_a_layer_s_two_matrices_must_agree(exact_bundle: Bundle, tmp_path: Path) -> None:
    message = refusal(exact_bundle, tmp_path, put("blk.1.fc1.weight", lambda x: x[:96]))
    found = "layer 1: ranks of fc1 and fc2 are [96, 128], expected two equal multiples of 32"
    assert found in message
    assert_remedy(message)


def test_ranks_may_differ_between_layers(exact_bundle: Bundle, tmp_path: Path) -> None:
    content = Content.of(exact_bundle.model_file)
    put("blk.1.fc1.weight", lambda x: x[:96])(content)
    put("blk.1.fc2.weight", lambda x: x[:, :96])(content)
    engine = Engine(content.write(tmp_path / "ranks.powerinfer.gguf"))
    assert [engine.rank(0), engine.rank(1)] == [128, 96]


def test_a_dense_file_is_refused(exact_bundle: Bundle, tmp_path: Path) -> None:
    path = Content.of(exact_bundle.model_file).write(tmp_path / "dense.gguf", magic=b"GGUF")
    with pytest.raises(FormatError) as caught:
        Engine(path)
    assert str(caught.value) == (
        f"{path}: magic is GGUF, a dense file; pass a *.powerinfer.gguf (magic PWRI)"
    )


def test_another_architecture_is_refused(exact_bundle: Bundle, tmp_path: Path) -> None:
    message = refusal(exact_bundle, tmp_path, value("general.architecture", b"mpt"))
    assert "architecture 'mpt' is not supported, expected 'llama'" in message
    assert_remedy(message)


SIZES = [
    ("llama.attention.head_count", 0),
    ("llama.attention.head_count", 3),
    ("llama.attention.head_count", 64),
    ("llama.attention.head_count", 2**32 - 1),
    ("llama.attention.head_count_kv", 0),
    ("llama.attention.head_count_kv", 3),
    ("llama.attention.head_count_kv", 8),
    ("llama.embedding_length", 72),
    ("llama.block_count", 0),
    ("llama.context_length", 0),
]


@pytest.mark.parametrize(("key", "size"), SIZES)
def test_impossible_sizes_are_refused(
    exact_bundle: Bundle, tmp_path: Path, key: str, size: int
) -> None:
    message = refusal(exact_bundle, tmp_path, value(key, size))
    assert key.removeprefix("llama.") in message
    assert str(size) in message
    assert "export the file again" in message


@pytest.mark.parametrize(
    ("key", "size"),
    [
        ("llama.embedding_length", 0),
        ("llama.feed_forward_length", 0),
        ("llama.feed_forward_length", 1000),
        ("llama.attention.head_count_kv", 1),
    ],
)
def test_sizes_that_differ_from_the_tensors_are_refused(
    exact_bundle: Bundle, tmp_path: Path, key: str, size: int
) -> None:
    message = refusal(exact_bundle, tmp_path, value(key, size))
    assert "has shape" in message or f"{key.removeprefix('llama.')} is {size}" in message
    assert_remedy(message)


def test_a_lie_about_the_number_of_blocks_costs_no_memory(
    exact_bundle: Bundle, tmp_path: Path
) -> None:
    tracemalloc.start()
    try:
        refusal(exact_bundle, tmp_path, value("llama.block_count", 20_000))
        assert tracemalloc.get_traced_memory()[1] < ALLOWED_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("key", "number"),
    [
        ("llama.attention.layer_norm_rms_epsilon", float("nan")),
        ("llama.attention.layer_norm_rms_epsilon", -1.0),
        ("llama.rope.freq_base", 0.0),
        ("llama.rope.freq_base", float("inf")),
        ("powerinfer.sparse_threshold", float("nan")),
    ],
)
def test_impossible_constants_are_refused(
    exact_bundle: Bundle, tmp_path: Path, key: str, number: float
) -> None:
    assert_remedy(refusal(exact_bundle, tmp_path, value(key, number)))


def test_keys_that_powerinfer_does_without_have_its_defaults(
    exact_bundle: Bundle, tmp_path: Path
) -> None:
    content = Content.of(exact_bundle.model_file)
    for key in (
        "general.name",
        "llama.attention.head_count_kv",
        "llama.rope.freq_base",
        "llama.rope.dimension_count",
        "powerinfer.sparse_threshold",
        "psp.activation_threshold",
    ):
        del content.keys[key]
    content.keys["llama.rope.scale_linear"] = (4.0, GGUFValueType.FLOAT32, None)
    hyper = read_hyperparameters(GGUFFile(content.write(tmp_path / "m.powerinfer.gguf")))
    found = (hyper.name, hyper.n_kv_heads, hyper.rope_theta, hyper.threshold)
    assert found == ("", hyper.n_heads, 10000.0, 0.0)
    assert hyper.rope_scaling == RopeScaling(kind="linear", factor=4.0)


@pytest.mark.parametrize(
    "key",
    [
        "llama.embedding_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
    ],
)
def test_a_missing_key_is_named(exact_bundle: Bundle, tmp_path: Path, key: str) -> None:
    message = refusal(exact_bundle, tmp_path, lambda content: content.keys.pop(key))
    assert f"key {key} is missing" in message
    assert_remedy(message)


@pytest.mark.parametrize(
    ("key", "kind", "problem"),
    [
        ("llama.block_count", GGUFValueType.UINT64, "is UINT64, expected UINT32"),
        ("powerinfer.sparse_threshold", GGUFValueType.FLOAT64, "is FLOAT64, expected FLOAT32"),
    ],
)
def test_a_key_of_another_type_is_named(
    exact_bundle: Bundle, tmp_path: Path, key: str, kind: GGUFValueType, problem: str
) -> None:
    message = refusal(exact_bundle, tmp_path, lambda content: content.retype(key, kind))
    assert f"key {key} {problem}" in message
    assert_remedy(message)


def test_a_file_larger_than_memory_gives_the_same_logits(exact_bundle: Bundle) -> None:
    resident = Engine(exact_bundle.model_file)
    assert resident.weights.resident
    streamed = Engine(exact_bundle.model_file, budget=0)
    assert not streamed.weights.resident
    tokens = [1, *streamed.vocabulary.encode(TEXT)][:40]
    torch.testing.assert_close(
        streamed.forward(tokens, KVCache(2)), resident.forward(tokens, KVCache(2)), atol=0, rtol=0
    )
    # Generation goes through the path that reads single rows.
    assert generate(streamed, "def ", 4).tokens == generate(resident, "def ", 4).tokens


GROUP_LIMITS = {
    "version 2": ("0::/job\n", "sys/fs/cgroup/job/memory.max"),
    "version 2, nested": ("0::/job/step\n", "sys/fs/cgroup/job/memory.max"),
    "version 1": ("4:memory:/job\n", "sys/fs/cgroup/memory/job/memory.limit_in_bytes"),
    "version 1, nested": ("4:memory:/job/step\n", "sys/fs/cgroup/memory/job/memory.limit_in_bytes"),
}


@pytest.mark.parametrize(("groups", "file"), GROUP_LIMITS.values(), ids=GROUP_LIMITS)
@pytest.mark.parametrize("fits", [True, False])
def test_weights_stay_in_memory_by_the_containers_limit(
    exact_bundle: Bundle, tmp_path: Path, groups: str, file: str, fits: bool
) -> None:
    infos = GGUFFile(exact_bundle.model_file).tensors.values()
    needed = 4 * sum(math.prod(info.shape) for info in infos)
    limit = 2 * needed if fits else needed
    for name, text in ((file, f"{limit}\n"), ("proc/self/cgroup", groups)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    engine = Engine(exact_bundle.model_file, budget=weight_budget("cpu", tmp_path))
    assert engine.weights.resident == fits
