"""Every kind of damage is caught by the check that is for it, and no file makes one crash."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refused
from gguf import GGUFValueType, TokenType
from test_weights import Change, Content, add, drop, put, value

from common.errors import FormatError
from gguf_export.bundle import Bundle
from gguf_export.pwri.gpu_index import index_path, write_gpu_index
from powerinfer_bridge.verify.verification import verification_table, verify

STRUCTURE = [
    "file",
    "layout",
    "magic",
    "keys",
    "threshold",
    "tokenizer",
    "tensor set",
    "shapes",
    "types",
    "predictor ranks",
    "predictor types",
    "predictors finite",
    "norms finite",
    "weights finite",
    "dense layers",
    "gpu index",
]
TOKENS = "tokenizer.ggml.tokens"
SCORES = "tokenizer.ggml.scores"
TYPES = "tokenizer.ggml.token_type"
THRESHOLD = "powerinfer.sparse_threshold"
FILE_NAME = "changed.powerinfer.gguf"


def failures(document: dict[str, Any]) -> dict[str, str]:
    """Return the checks that failed by themselves, and what they say."""
    found = {check["name"]: check["detail"] for check in document["checks"] if not check["ok"]}
    assert document["ok"] == (not found)
    assert all(len(detail.splitlines()) == 1 for detail in found.values())
    assert json.dumps(document, allow_nan=False)
    return {name: text for name, text in found.items() if not text.startswith("not checked")}


def changed(bundle: Bundle, tmp_path: Path, *changes: Change) -> Path:
    content = Content.of(bundle.model_file)
    for change in changes:
        change(content)
    return content.write(tmp_path / FILE_NAME)


def each(key: str, change: Callable[[list[Any]], object]) -> Change:
    """Change a list among the values in place."""
    return lambda content: change(content.keys[key][0])


def fill(name: str, number: float) -> Change:
    """Replace one number of a tensor, the last."""

    def change(tensor: Any) -> Any:
        tensor = tensor.copy()
        tensor.flat[-1] = number
        return tensor

    return put(name, change)


def test_a_good_file_passes_every_check(exact_bundle: Bundle) -> None:
    document = verify(exact_bundle.model_file).document()
    assert document["ok"], failures(document)
    assert document["file"] == str(exact_bundle.model_file)
    assert [check["name"] for check in document["checks"]] == ["checksum", *STRUCTURE]


def test_the_table_tells_every_check_and_the_verdict(exact_bundle: Bundle, tmp_path: Path) -> None:
    first, *good = verification_table(verify(exact_bundle.model_file)).splitlines()
    assert first.split() == ["checksum", "ok", "1", "files", "hold", "what", "was", "exported"]
    assert [line.split("  ")[0] for line in good[: len(STRUCTURE)]] == STRUCTURE
    assert all(" ok " in line for line in good[: len(STRUCTURE)])
    assert good[-1].endswith(f"{exact_bundle.model_file}: all checks hold")
    path = changed(exact_bundle, tmp_path, drop("output.weight"), value(THRESHOLD, math.inf))
    bad = verification_table(verify(path)).splitlines()
    assert "tensor output.weight: missing" in bad[STRUCTURE.index("tensor set")]
    assert [STRUCTURE[at] for at, line in enumerate(bad[:-1]) if "FAILED" in line] == [
        "threshold",
        "tensor set",
    ]
    assert bad[-1].endswith(": 2 of 16 checks failed")


def narrow(content: Content) -> None:
    """Give layer 1 a predictor of rank 100, no multiple of 32."""
    put("blk.1.fc1.weight", lambda x: x[:100])(content)
    put("blk.1.fc2.weight", lambda x: x[:, :100])(content)


def normal_bos(content: Content) -> None:
    content.keys[TYPES][0][1] = int(TokenType.NORMAL)


DAMAGE: dict[str, tuple[Change, set[str], str]] = {
    "key type": (
        lambda content: content.retype("llama.block_count", GGUFValueType.UINT64),
        {"keys"},
        "is UINT64, expected UINT32",
    ),
    "missing key": (
        lambda content: content.keys.pop("llama.block_count"),
        {"keys"},
        "key llama.block_count is missing",
    ),
    "heads": (
        value("llama.attention.head_count", 3),
        {"keys"},
        "is 64, expected a multiple of twice the attention.head_count 3",
    ),
    "blocks": (value("llama.block_count", 20_000), {"keys"}, "more than there are tensors"),
    "rope": (value("llama.rope.dimension_count", 8), {"keys"}, "not the head size 16"),
    "architecture": (value("general.architecture", b"mpt"), {"keys"}, "'mpt'"),
    "infinite threshold": (value(THRESHOLD, -math.inf), {"threshold"}, "is -inf"),
    "threshold type": (
        lambda content: content.retype(THRESHOLD, GGUFValueType.FLOAT64),
        {"threshold", "keys"},
        "is FLOAT64, expected FLOAT32",
    ),
    "NaN threshold": (value(THRESHOLD, math.nan), {"threshold", "keys"}, "is nan"),
    "missing tensor": (
        drop("blk.1.attn_q.weight"),
        {"tensor set"},
        "tensor blk.1.attn_q.weight: missing",
    ),
    "missing predictor": (
        drop("blk.1.fc2.weight"),
        {"tensor set", "predictor ranks"},
        "blk.1.fc2.weight: missing",
    ),
    "extra tensor": (add("blk.2.attn_q.weight"), {"tensor set"}, "not PowerInfer's"),
    "not transposed": (put("blk.0.ffn_down_t.weight", lambda x: x.T), {"shapes"}, "(64, 1012)"),
    "norm of two dimensions": (
        put("output_norm.weight", lambda x: x[None]),
        {"shapes"},
        "(1, 64)",
    ),
    "one token more": (
        lambda content: [
            content.keys[key][0].append(new)
            for key, new in ((TOKENS, b"new"), (SCORES, -9.0), (TYPES, 1))
        ],
        {"shapes"},
        "expected (321, 64)",
    ),
    "float32 matrix": (
        put("blk.0.ffn_up.weight", lambda x: x.astype(np.float32)),
        {"types"},
        "blk.0.ffn_up.weight is F32, expected F16",
    ),
    "float16 norm": (
        put("blk.0.ffn_norm.weight", lambda x: x.astype(np.float16)),
        {"types"},
        "is F16, expected F32",
    ),
    "unequal ranks": (
        put("blk.1.fc1.weight", lambda x: x[:96]),
        {"predictor ranks"},
        "layer 1: ranks of fc1 and fc2 are [96, 128]",
    ),
    "odd rank": (narrow, {"predictor ranks"}, "[100, 100], expected two equal multiples of 32"),
    "predictor NaN": (
        fill("blk.1.fc2.weight", math.nan),
        {"predictors finite"},
        "tensor blk.1.fc2.weight holds NaN or infinity",
    ),
    "predictor infinity": (
        fill("blk.0.fc1.weight", -math.inf),
        {"predictors finite"},
        "tensor blk.0.fc1.weight holds",
    ),
    "norm infinity": (
        fill("blk.0.attn_norm.weight", math.inf),
        {"norms finite"},
        "tensor blk.0.attn_norm.weight holds",
    ),
    "weight NaN": (
        fill("token_embd.weight", math.nan),
        {"weights finite"},
        "tensor token_embd.weight holds",
    ),
    "tokenizer kind": (value("tokenizer.ggml.model", b"bert"), {"tokenizer"}, "'bert'"),
    "no tokens": (lambda content: content.keys.pop(TOKENS), {"tokenizer"}, "is missing"),
    "token twice": (
        each(TOKENS, lambda tokens: tokens.__setitem__(300, tokens[301])),
        {"tokenizer"},
        "appears twice",
    ),
    "byte piece": (
        each(TOKENS, lambda tokens: tokens.__setitem__(tokens.index(b"<0x41>"), b"!")),
        {"tokenizer"},
        "byte piece <0x41> is missing",
    ),
    "byte type": (
        each(TYPES, lambda types: types.__setitem__(types.index(6), 1)),
        {"tokenizer"},
        "not all of type BYTE",
    ),
    "token type": (
        each(TYPES, lambda types: types.__setitem__(-1, 9)),
        {"tokenizer"},
        "token type 9 is unknown",
    ),
    "scores": (each(SCORES, lambda scores: scores.pop()), {"tokenizer"}, "differ in number"),
    "score": (
        each(SCORES, lambda scores: scores.__setitem__(7, math.nan)),
        {"tokenizer"},
        "a token's score is not finite",
    ),
    "BOS": (value("tokenizer.ggml.bos_token_id", 320), {"tokenizer"}, "outside the vocabulary"),
    "BOS type": (normal_bos, {"tokenizer"}, "BOS id 1 is no control token"),
    "EOS": (
        value("tokenizer.ggml.eos_token_id", 320),
        {"tokenizer"},
        "eos_token_id is outside the vocabulary",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_caught_by_its_check_alone(
    exact_bundle: Bundle, tmp_path: Path, name: str
) -> None:
    change, checks, part = DAMAGE[name]
    found = failures(verify(changed(exact_bundle, tmp_path, change)).document())
    assert found.keys() == checks
    assert any(part in detail for detail in found.values()), found


def test_faults_do_not_hide_one_another(exact_bundle: Bundle, tmp_path: Path) -> None:
    names = ("infinite threshold", "extra tensor", "odd rank", "norm infinity", "score")
    path = changed(exact_bundle, tmp_path, *(DAMAGE[name][0] for name in names))
    expected = set().union(*(DAMAGE[name][1] for name in names))
    assert len(expected) == len(names)
    assert failures(verify(path).document()).keys() == expected


@pytest.mark.parametrize(
    ("at", "new", "check", "part"),
    [
        (0, b"GGUF", "magic", "runs the file densely"),
        (0, b"LMGG", "file", "magic is b'LMGG'"),
        (4, struct.pack("<I", 1), "file", "version is 1"),
        (8, struct.pack("<Q", 2**40), "file", "tensor count"),
    ],
)
def test_a_damaged_header_is_caught(
    exact_bundle: Bundle, tmp_path: Path, at: int, new: bytes, check: str, part: str
) -> None:
    content = exact_bundle.model_file.read_bytes()
    path = tmp_path / FILE_NAME
    path.write_bytes(content[:at] + new + content[at + len(new) :])
    found = failures(verify(path).document())
    assert found.keys() == {check}
    assert part in found[check]


def test_a_file_that_is_cut_fails_and_one_that_is_not_there_is_refused(
    exact_bundle: Bundle, tmp_path: Path
) -> None:
    path = tmp_path / FILE_NAME
    with refused(FormatError, f"{path}: No such file", "psp export-gguf"):
        verify(path)
    path.write_bytes(exact_bundle.model_file.read_bytes()[:-1])
    assert "ends after the file does" in failures(verify(path).document())["file"]


def test_tensors_that_share_bytes_are_caught(exact_bundle: Bundle, tmp_path: Path) -> None:
    """Also what keeps a small file with many large tensors from taking hours to read."""
    content = bytearray(exact_bundle.model_file.read_bytes())
    name = b"blk.1.fc1.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8 + 4
    struct.pack_into("<Q", content, at, struct.unpack_from("<Q", content, at)[0] - 32)
    path = tmp_path / FILE_NAME
    path.write_bytes(content)
    found = failures(verify(path).document())
    assert found.keys() == {"layout"}
    assert "and blk.1.fc1.weight overlap" in found["layout"]


def with_gpu_index(bundle: Bundle, path: Path, change: Callable[[bytes], bytes]) -> Path:
    """Copy the model file and write a GPU index beside it, its bytes changed."""
    model = path / FILE_NAME
    model.write_bytes(bundle.model_file.read_bytes())
    chosen = [torch.zeros(1012, dtype=torch.bool) for _ in range(2)]
    chosen[1][100:132] = True
    write_gpu_index(index_path(model), chosen, 1 << 20)
    index_path(model).write_bytes(change(index_path(model).read_bytes()))
    return model


def test_a_good_gpu_index_passes(exact_bundle: Bundle, tmp_path: Path) -> None:
    document = verify(with_gpu_index(exact_bundle, tmp_path, lambda content: content)).document()
    assert document["ok"]
    assert document["checks"][-1]["detail"] == "32 of 2024 neurons on the GPU, 1048576 bytes"


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"GGUF" + content[4:],
        lambda content: content.replace(b"generic.gpu_index", b"generic.cpu_index"),
        lambda content: content.replace(b"split.vram_capacity", b"split.vram_capacitx"),
        lambda content: content.replace(b"blk.1.gpu_idx", b"blk.2.gpu_idx"),
        lambda content: content.replace(struct.pack("<2i", 130, 131), struct.pack("<2i", 131, 130)),
        lambda content: content[:-32],
        lambda content: content[:9],
        lambda content: b"",
    ],
)
def test_a_bad_gpu_index_is_caught(
    exact_bundle: Bundle, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    found = failures(verify(with_gpu_index(exact_bundle, tmp_path, change)).document())
    assert found.keys() == {"gpu index"}
