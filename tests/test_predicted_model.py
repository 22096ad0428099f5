"""The model with predictors in place, for every kind of FFN, against the published formulas."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TEXT
from families import BY_NAME, Written, write
from torch.nn.functional import cross_entropy

from architectures.checkpoint import Checkpoint
from architectures.tokenizer import load_tokenizer
from predictor.module import Predictor
from predictor.thresholds.predicted_model import PredictedModel, held_out_windows, quality_of

NAMES = ["relu-llama", "prosparse", "minicpm", "bamboo", "opt-125m", "falcon-7b", "falcon-40b"]


def windows_of(written: Written) -> list[list[int]]:
    tokens = load_tokenizer(written.path, 320, written.variant.config).encode(TEXT)
    return [[1, *tokens[:30]], [1, *tokens[30:50]]]


def loss(written: Written, windows: list[list[int]]) -> float:
    """Mean negative log-likelihood by the formula."""
    parts = []
    for window in windows:
        logits = written.reference(window).logits[:-1]
        parts.append(cross_entropy(logits, torch.tensor(window[1:]), reduction="none"))
    return float(torch.cat(parts).mean())


@pytest.mark.parametrize("name", NAMES)
def test_masks_change_what_the_model_predicts(
    name: str, tokenizer_bytes: bytes, tmp_path: Path
) -> None:
    written = write(BY_NAME[name], tmp_path / name, tokenizer_bytes)
    checkpoint = Checkpoint.open(written.path)
    shape, windows = checkpoint.shape, windows_of(written)
    model = PredictedModel(checkpoint, windows, "cpu")
    generator = torch.Generator().manual_seed(0)
    half = Predictor(
        torch.randn(32, shape.d_model, generator=generator),
        torch.randn(shape.d_ff, 32, generator=generator),
    )
    predictors = dict.fromkeys(range(shape.n_layers), half)
    own = loss(written, windows)
    everything = model.quality(predictors, -1e30)
    assert everything.ppl_dense == pytest.approx(2.718281828**own, rel=2e-2)
    if written.variant.activation[0] == "fatrelu":
        # PowerInfer computes ReLU where predictors let a neuron through.
        plain = written.variant.changed(hidden_act="relu", hidden_act_param=None)
        relu = Written(plain, written.path, written.tensors)
        assert everything.ppl_sparse == pytest.approx(2.718281828 ** loss(relu, windows), rel=2e-2)
    else:
        assert everything.ppl_gap == pytest.approx(0, abs=2e-3)
    # Nothing is missed, whatever the activation.
    assert everything.kl_divergence < 1e-4
    some, nothing = (model.quality(predictors, threshold) for threshold in (0.0, 1e30))
    assert 1e-3 < some.kl_divergence < nothing.kl_divergence
    # Masks are gone afterwards, and the same ones give the same.
    assert model.quality({}, 0.0).kl_divergence < 1e-4
    assert model.quality(predictors, 0.0) == some
    sums = torch.tensor([[10.0, 11.0, 0.5, 5.0], [20.0, 20.0, 0.5, 15.0]], dtype=torch.float64)
    told = quality_of(list(sums))
    assert told.ppl_sparse == pytest.approx(2.718281828 ** (31 / 20))
    assert told.kl_divergence == pytest.approx(0.05)
    # Growth 1/20: windows scatter by 1 - 5/20 and 0 - 15/20.
    assert told.standard_error == pytest.approx((2 * 0.75**2) ** 0.5 / 20)


def test_rows_of_another_text_that_have_none_are_told_as_far_as_it_is_read(
    model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    header: Any = SimpleNamespace(data="gone", field="text", chat_template="none", context=32)
    holes, null = tmp_path / "holes.jsonl", b'{"text": null}\n'
    holes.write_bytes(null + data_file.read_bytes() + null)
    told: list[str] = []
    options: dict[str, Any] = {"data": str(holes), "tokens": 100, "note": told.append}
    assert held_out_windows(header, Checkpoint.open(model_dir), set(), **options)
    line = "1 row was passed over, without text under 'text', the first is"
    assert told == [f"{line} {holes}:1"]


def test_fatrelu_models_miss_what_their_threshold_lets_through(
    tokenizer_bytes: bytes, tmp_path: Path
) -> None:
    """Predictors that skip everything are compared with the model itself, the threshold kept."""
    high = BY_NAME["prosparse"].changed(hidden_act_param=1.0)
    written = write(high, tmp_path / "model", tokenizer_bytes)
    checkpoint = Checkpoint.open(written.path)
    shape, windows = checkpoint.shape, windows_of(written)
    model = PredictedModel(checkpoint, windows, "cpu")
    off = Predictor(torch.zeros(32, shape.d_model), torch.zeros(shape.d_ff, 32))
    nothing = model.quality(dict.fromkeys(range(shape.n_layers), off), 1.0)

    def mean_divergence() -> float:
        """KL of the formulas' FATReLU model and of the model whose FFNs are zero."""
        silent = {
            name: torch.zeros_like(tensor) if "down_proj" in name else tensor
            for name, tensor in written.tensors.items()
        }
        without = Written(written.variant, written.path, silent)
        parts = []
        for window in windows:
            own, other = (
                model.reference(window).logits[:-1].log_softmax(-1) for model in (written, without)
            )
            parts.append((own.exp() * (own - other)).sum(-1))
        return float(torch.cat(parts).mean())

    assert nothing.kl_divergence == pytest.approx(mean_divergence(), rel=2e-2)


def test_one_layer_may_be_masked_alone(tokenizer_bytes: bytes, tmp_path: Path) -> None:
    written = write(BY_NAME["relu-llama"], tmp_path / "model", tokenizer_bytes)
    checkpoint = Checkpoint.open(written.path)
    model = PredictedModel(checkpoint, windows_of(written), "cpu")
    shape = checkpoint.shape
    off = Predictor(torch.zeros(32, shape.d_model), torch.zeros(shape.d_ff, 32))
    single = [model.quality({layer: off}, 1.0).kl_divergence for layer in range(2)]
    assert min(single) > 1e-3
    assert model.quality(dict.fromkeys(range(2), off), 1.0).kl_divergence > max(single)
