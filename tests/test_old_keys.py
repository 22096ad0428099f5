"""What psp writes is read alike by transformers 5 and 4 and by PowerInfer's converter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from packaging.version import Version

from architectures.old_keys import with_old_keys
from architectures.rope import read_rope
from prosparse.schedule import Schedule
from prosparse.settings import SparsifyConfig
from prosparse.training import sparsify

TOKENS = torch.arange(7, 100)[None]
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 7e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, **YARN},
}
OLD: dict[str, tuple[float, dict[str, Any] | None]] = {
    "default": (5e5, None),
    "linear": (7e4, {"type": "linear", "factor": 4.0}),
    "yarn": (1e4, {"type": "yarn", **YARN}),
}


def config(**values: Any) -> dict[str, Any]:
    return {"max_position_embeddings": 128, "model_type": "llama", **values}


@pytest.mark.parametrize("kind", ROPES)
def test_new_keys_are_written_under_their_old_names_too(kind: str) -> None:
    given = config(rope_parameters=ROPES[kind], dtype="float16")
    written, (theta, scaling) = with_old_keys(given), OLD[kind]
    assert written == given | {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "torch_dtype": "float16",
    }
    assert read_rope(written) == read_rope(given)


def test_old_keys_stay_as_they_are() -> None:
    given = config(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2}, torch_dtype="x")
    assert with_old_keys(given) == given


def test_where_both_are_there_the_one_that_counts_is_written() -> None:
    given = config(rope_parameters=ROPES["linear"], rope_scaling={"type": "yarn", **YARN})
    written = with_old_keys(given)
    assert written["rope_scaling"] == OLD["yarn"][1]
    assert read_rope(written) == read_rope(given)


@pytest.mark.parametrize("kind", ROPES)
def test_transformers_reads_the_same_with_and_without_them(kind: str) -> None:
    from transformers import LlamaConfig

    given = config(rope_parameters=ROPES[kind], dtype="float16")
    plain, both = (LlamaConfig.from_dict(c) for c in (given, with_old_keys(given)))
    kept = {k: v for k, v in both.rope_parameters.items() if k != "type"}
    assert kept == plain.rope_parameters
    assert both.dtype == plain.dtype == torch.float16


READER = """
import sys, torch, transformers, warnings
assert transformers.__version__.startswith("4."), transformers.__version__
tokens = torch.load(sys.argv[1])
for path in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, torch_dtype="auto")
    assert model.dtype == torch.float16, model.dtype
    with torch.no_grad():
        torch.save(model.float()(tokens).logits, path + "/logits.pt")
"""


@pytest.mark.transformers_4
def test_transformers_4_computes_what_5_does(
    make_model: ModelMaker, data_file: Path, transformers_4: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    torch.save(TOKENS, tmp_path / "tokens.pt")
    paths = []
    (installed,) = distributions(name="transformers", path=[str(transformers_4)])
    knows_yarn = Version(installed.version) >= Version("4.43")
    for kind, rope in ROPES.items():
        if kind == "yarn" and not knows_yarn:
            continue
        model = make_model(tmp_path / f"{kind}-model", intermediate_size=96, rope_parameters=rope)
        out = tmp_path / kind
        schedule = Schedule.of(("progressive", 1e-3, 2))
        settings: dict[str, Any] = {"context": 16, "batch": 1, "eval_windows": 1, "device": "cpu"}
        sparsify(
            SparsifyConfig(
                model=str(model), data=str(data_file), out=out, schedule=schedule, **settings
            )
        )
        paths.append(out)
    command = [sys.executable, "-c", READER, tmp_path / "tokens.pt", *paths]
    environment = os.environ | {"PYTHONPATH": str(transformers_4)}
    subprocess.run(list(map(str, command)), check=True, env=environment, capture_output=True)
    for path in paths:
        ours = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            expected = ours(TOKENS).logits
        found = torch.load(path / "logits.pt", weights_only=True)
        assert json.loads((path / "config.json").read_text())["hidden_act"] == "relu"
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
