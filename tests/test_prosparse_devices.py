"""Where sparsification runs, and in which type."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import refused

from common.errors import SparsityError
from prosparse.settings import SparsifyConfig
from prosparse.training import training_arguments

BFLOAT16 = SparsifyConfig(
    model="unused", data="unused", out=Path("unused"), precision="bfloat16", device="auto"
)


def test_bfloat16_needs_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    arguments = training_arguments(BFLOAT16)
    assert arguments.bf16
    assert arguments.device == torch.device("cpu")


def test_bfloat16_on_a_gpu_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(transformers.utils, "is_torch_bf16_gpu_available", lambda: False)
    with refused(SparsityError, "--precision bfloat16", "--precision float32"):
        training_arguments(BFLOAT16)
