"""Which files PowerInfer runs, told by the real thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import TEXT
from rewriting import rewritten

from gguf_export.bundle import Bundle
from powerinfer_bridge.programs.powerinfer import PowerInfer
from powerinfer_bridge.verify.verification import verify

pytestmark = pytest.mark.powerinfer


def perplexity(programs: Path, file: Path) -> float:
    return PowerInfer(programs).perplexity(file, TEXT * 4, 64, None, threads=1)


@pytest.mark.parametrize(
    "change", [{"alignment": 8}, {"alignment": 16}, {"alignment": 64}, {"version": 2}], ids=str
)
def test_alignments_and_version_2_run_and_pass(
    powerinfer_bin: Path, exact_bundle: Bundle, tmp_path: Path, change: dict[str, Any]
) -> None:
    file = rewritten(exact_bundle.model_file, tmp_path / "changed.powerinfer.gguf", **change)
    assert verify(file).ok
    assert perplexity(powerinfer_bin, file) == perplexity(powerinfer_bin, exact_bundle.model_file)
