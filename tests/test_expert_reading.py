"""Files of arch `smallthinker` with one expert as models: what `psp verify` refuses is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from gguf import GGMLQuantizationType as Kind
from rewriting import Tensor, rewritten, tensors_of

from architectures.checkpoint import Checkpoint
from common.errors import CheckpointError
from gguf_export.dense import export_single
from gguf_export.settings import ExportConfig
from powerinfer_bridge.verify.verification import verify

ROUTER = "blk.1.ffn_gate_inp.weight"
D_MODEL = 64


@pytest.fixture(scope="module")
def file(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("expert") / "m.gguf"
    config = ExportConfig(model=str(model_dir), engine="llama.cpp", out=out)
    return export_single(config).model_file


def router(number: float, shape: tuple[int, ...] = (1, D_MODEL)) -> Tensor:
    return shape, Kind.F32, np.full(D_MODEL, number, np.float32).tobytes()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no expert used": ({"keys": {"expert_used_count": np.uint32(0)}}, "used_count is 0, expected"),
    "five used": ({"keys": {"expert_used_count": np.uint32(5)}}, "used_count is 5, expected 1"),
    "a gating that programs stop at": (
        {"keys": {"expert_gating_func": np.uint32(9)}},
        "expert_gating_func is 9, expected 1 or 2",
    ),
    "another activation": ({"keys": {"psp.activation": "silu"}}, "psp.activation is 'silu'"),
    "no router": ({"tensors": {ROUTER: None}}, f"tensor {ROUTER}"),
    "a router of NaN": ({"tensors": {ROUTER: router(np.nan)}}, f"{ROUTER} holds NaN"),
    "an infinite router": ({"tensors": {ROUTER: router(np.inf)}}, f"{ROUTER} holds NaN or inf"),
    "a router of bytes": (
        {"tensors": {ROUTER: ((1, D_MODEL), Kind.I8, bytes(D_MODEL))}},
        f"{ROUTER} has type I8, which psp cannot read",
    ),
    "a router of two rows": (
        {"tensors": {ROUTER: router(0, (2, D_MODEL // 2))}},
        f"{ROUTER} has shape (2, 32), expected (1, 64)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_verify_refuses_is_no_model(file: Path, tmp_path: Path, name: str) -> None:
    changes, problem = WRONG[name]
    prefix = {key: key if "." in key else f"smallthinker.{key}" for key in changes.get("keys", {})}
    keys = {prefix[key]: value for key, value in changes.get("keys", {}).items()}
    other = tmp_path / "other.gguf"
    rewritten(file, other, keys=keys, tensors=changes.get("tensors"))
    with refused(CheckpointError, str(other), problem):
        Checkpoint.open(str(other))
    failed = [found.line for found in verify(other).checks.values() if not found.ok]
    assert any(problem in line for line in failed), failed


def test_a_router_may_be_stored_as_a_vector(file: Path, tmp_path: Path) -> None:
    """As `llama-quantize` leaves it; whatever its numbers are, the one weight is 1."""
    assert tensors_of(file)[ROUTER][0] == (1, D_MODEL)
    vector = {ROUTER: router(3.5, (D_MODEL,))}
    other = rewritten(file, tmp_path / "vector.gguf", tensors=vector)
    assert Checkpoint.open(str(other)).fingerprint == Checkpoint.open(str(file)).fingerprint
    assert verify(other).ok
