"""Every family's file can be measured: its bytes have a place, its quality is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import TEXT, make_export
from test_export_families import NAMES, write_model

from common.typed_json import plain
from gguf_files.reader import GGUFFile
from powerinfer_bridge.benchmark.run import bench
from powerinfer_bridge.benchmark.settings import BenchConfig


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_the_family_is_measured(
    name: str, tokenizer_bytes: bytes, tmp_path: Path
) -> None:
    _, predictors = write_model(name, tmp_path / "model", tokenizer_bytes)
    file = make_export(tmp_path / "model", predictors, tmp_path / "m.powerinfer.gguf").model_file
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    found: dict[str, Any] = plain(
        bench(
            BenchConfig(
                file=file,
                data=str(tmp_path / "text.txt"),
                context=32,
                chunks=1,
                generate=2,
                repeats=1,
                model=str(tmp_path / "model"),
            )
        )
    )
    devices = found["placement"]["devices"]
    sizes = dict(devices[0]["bytes"])
    del sizes["kv_cache"]
    assert sum(sizes.values()) == sum(info.size for info in GGUFFile(file).tensors.values())
    assert all(sizes[kind] for kind in ("embedding", "attention", "predictors", "ffn_neurons"))
    codes = {warning["code"] for warning in found["warnings"]}
    fatrelu = GGUFFile(file).values.get("psp.activation_threshold")
    assert ("fatrelu" in codes) == bool(fatrelu is not None and fatrelu.data)
    if "fatrelu" not in codes:
        assert found["ppl_dense"] == pytest.approx(found["ppl_transformers"], rel=3e-3)
