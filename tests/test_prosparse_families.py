"""Every family that `psp sparsify` accepts: it writes the ReLU-substituted original."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from architectures.checkpoint import Checkpoint
from architectures.model import load_model
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from prosparse.schedule import Schedule
from prosparse.settings import SparsifyConfig
from prosparse.training import sparsify

pytestmark = pytest.mark.usefixtures("trainer_is_imported")
STAGES = Schedule.of(("substitution", 0, 3))
TOKENS = [1, 17, 255, 3, 90, 41, 300, 8]
CASES = {
    "llama": families.BY_NAME["relu-llama"].changed(hidden_act="silu"),
    "llama-gelu": families.BY_NAME["llama-linear"].changed(hidden_act="gelu"),
    "llama-tied": families.BY_NAME["llama-tied"].changed(hidden_act="silu"),
    "llama-yarn": families.BY_NAME["llama-yarn"].changed(hidden_act="gelu_pytorch_tanh"),
    "mistral": families.BY_NAME["relu-mistral"].changed(hidden_act="silu"),
    "minicpm": families.BY_NAME["minicpm"].changed(hidden_act="silu"),
    "minicpm-untied": families.BY_NAME["minicpm-s"].changed(
        hidden_act="silu", hidden_act_param=None
    ),
    "prosparse": families.BY_NAME["prosparse"],
}


@pytest.mark.parametrize("name", CASES)
def test_the_output_is_the_original_with_relu(
    name: str, tokenizer_bytes: bytes, data_file: Path, tmp_path: Path
) -> None:
    """At a rate of 1e-12 no float moves, so what is left of training is what it must not change."""
    original = families.write(CASES[name], tmp_path / "model", tokenizer_bytes)
    out = tmp_path / "sparse"
    sparsify(
        SparsifyConfig(
            model=str(original.path),
            data=str(data_file),
            out=out,
            schedule=STAGES,
            context=32,
            batch=2,
            eval_windows=2,
            device="cpu",
            learning_rate=1e-12,
        )
    )

    # The published formulas, with ReLU, in float64: no code in common with what was trained.
    variant = replace(CASES[name], config=CASES[name].config | {"hidden_act": "relu"})
    expected = replace(original, variant=variant).reference(TOKENS).logits
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.inference_mode():
        logits = found(torch.tensor([TOKENS])).logits[0]
    assert type(found).__name__ == "LlamaForCausalLM"
    # MiniCPM's constants are rounded once more when they are folded into the type of its weights.
    rounding = 0.03 if name.startswith("minicpm") else 1e-4
    assert (logits - expected).abs().max() < rounding * expected.std()

    checkpoint = Checkpoint.open(out)
    assert checkpoint.architecture.name == "llama"
    mine = load_model(checkpoint, dtype=torch.float32, device="cpu").logits(torch.tensor([TOKENS]))
    torch.testing.assert_close(mine[0], logits, rtol=1e-4, atol=1e-4)
    assert_files(out, CASES[name])

    traces = CollectConfig(
        model=str(out), data=str(data_file), out=tmp_path / "traces", tokens=200, context=32
    )
    assert collect(traces).progress.complete


def assert_files(out: Path, variant: families.Variant) -> None:
    """The config names ReLU and the type of the original, which the weights have."""
    config = json.loads((out / "config.json").read_text())
    assert config["hidden_act"] == "relu"
    assert "hidden_act_param" not in config
    assert config["dtype"] == variant.config["torch_dtype"]
    weights = load_file(out / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {families.DTYPES[config["dtype"]]}
    assert "lm_head.weight" in weights
