"""Sparsity and perplexity against the published formulas, and against hooks on transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import TEXT, ModelMaker, refused
from families import BY_NAME, Written, write
from torch.nn.functional import cross_entropy

from common.errors import CheckpointError, DataError, SparsityError
from prosparse.activation import shifted
from prosparse.measurement import Measurement
from prosparse.settings import SparsityConfig
from prosparse.sparsity import sparsity

CONTEXT, TOKENS = 40, 150
DOCUMENTS = [TEXT, "Another one.\n" + TEXT[::-1]]
FAMILIES = ["relu-llama", "prosparse", "minicpm", "minicpm-s", "bamboo", "opt-125m", "falcon-7b"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("held-out") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


def windows_of(
    encode: Callable[[str], list[int]], bos: int, longest: int = CONTEXT
) -> Iterator[list[int]]:
    """Cut the documents as told: BOS and one document's tokens, the last window cut short."""
    left = TOKENS
    for document in DOCUMENTS:
        ids = encode(document)
        while ids and left > 1:
            window = [bos, *ids[: longest - 1]][:left]
            ids, left = ids[longest - 1 :], left - len(window)
            yield window


def settings_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["setting"]: row for row in document["settings"]}


def by_formula(written: Written) -> tuple[list[float], float]:
    """Return each layer's sparsity and the perplexity by the published formula."""
    from architectures.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(written.path, 320, written.variant.config)
    longest = min(CONTEXT, written.variant.config.get("sliding_window", CONTEXT))
    losses, active = [], []
    for window in windows_of(tokenizer.encode, tokenizer.bos_id(), longest):
        reference = written.reference(window)
        target = torch.tensor(window[1:])
        losses.append(cross_entropy(reference.logits[:-1], target, reduction="none"))
        active.append(torch.stack([layer.active.double().mean(1) for layer in reference.layers]))
    shares = torch.cat(active, dim=1).mean(1)
    return (1 - shares).tolist(), float(torch.cat(losses).mean().exp())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_measures_what_its_formula_gives(
    name: str, data: Path, tokenizer_bytes: bytes, tmp_path: Path
) -> None:
    written = write(BY_NAME[name], tmp_path / name, tokenizer_bytes)
    config = SparsityConfig(model=str(written.path), data=str(data), tokens=TOKENS, context=CONTEXT)
    document = sparsity(config).document()
    activation, threshold = written.variant.activation
    own = f"fatrelu_{threshold:g}" if threshold else activation
    row = settings_of(document)[own]
    layers, ppl = by_formula(written)
    # The formula rounds nowhere; gates within float32 of the threshold may fall on either side.
    measured = [layer["activation_sparsity"] for layer in row["layers"]]
    assert measured == pytest.approx(layers, abs=2e-3)
    assert row["activation_sparsity"] == pytest.approx(sum(measured) / len(measured))
    assert row["ppl"] == pytest.approx(ppl, rel=5e-3)
    assert document["hidden_act"] == activation
    assert document["tokens"] == TOKENS
    if threshold:
        relu = by_formula(Written(written.variant.changed(hidden_act="relu"), *_rest(written)))
        assert document["settings"][0]["setting"] == "relu"
        assert document["settings"][0]["ppl"] == pytest.approx(relu[1], rel=5e-3)
        assert row["ppl_gap"] == pytest.approx(row["ppl"] / document["settings"][0]["ppl"] - 1)


def _rest(written: Written) -> tuple[Path, dict[str, torch.Tensor]]:
    return written.path, written.tensors


class Hooked:
    """transformers' own model, watched at the input of every down projection."""

    def __init__(self, path: Path) -> None:
        from transformers import LlamaForCausalLM

        self.model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.zeros: list[list[torch.Tensor]] = [[] for _ in self.model.model.layers]
        for layer, block in enumerate(self.model.model.layers):
            block.mlp.down_proj.register_forward_pre_hook(
                lambda module, args, layer=layer: self.zeros[layer].append(args[0][0] == 0)
            )

    @torch.no_grad()
    def measure(self, activation: torch.nn.Module, windows: Any) -> Any:
        losses = []
        for block in self.model.model.layers:
            block.mlp.act_fn = activation
        for zeros in self.zeros:
            zeros.clear()
        for window in windows:
            logits = self.model(torch.tensor([window])).logits[0, :-1]
            losses.append(cross_entropy(logits, torch.tensor(window[1:]), reduction="none"))
        sparsity = [float(torch.cat(zeros).float().mean()) for zeros in self.zeros]
        return sparsity, float(torch.cat(losses).mean().exp())


def test_a_silu_model_is_measured_as_it_is_and_substituted(
    make_model: ModelMaker, data: Path, tmp_path: Path
) -> None:
    from architectures.tokenizer import load_tokenizer

    path = make_model(tmp_path / "silu", hidden_act="silu", intermediate_size=96)
    notes: list[str] = []
    config = SparsityConfig(
        model=str(path), data=str(data), tokens=TOKENS, context=CONTEXT, thresholds=(0.3, 0)
    )
    document = sparsity(config, notes.append).document()
    assert [row["setting"] for row in document["settings"]] == ["silu", "relu", "fatrelu_0.3"]
    assert "silu is never exactly zero" in notes[0]
    tokenizer = load_tokenizer(path, 320)
    windows = list(windows_of(tokenizer.encode, 1))
    assert sum(map(len, windows)) == TOKENS == document["tokens"]
    hooked, rows = Hooked(path), settings_of(document)
    activations = {
        "silu": torch.nn.SiLU(),
        "relu": torch.nn.ReLU(),
        "fatrelu_0.3": torch.nn.Threshold(0.3, 0.0),
    }
    for name, activation in activations.items():
        layers, ppl = hooked.measure(activation, windows)
        measured = [layer["activation_sparsity"] for layer in rows[name]["layers"]]
        assert measured == pytest.approx(layers, abs=1e-4)
        assert rows[name]["ppl"] == pytest.approx(ppl, rel=1e-4)
        assert rows[name]["ppl_gap"] == pytest.approx(ppl / rows["silu"]["ppl"] - 1, abs=1e-4)
    assert rows["silu"]["activation_sparsity"] == 0
    assert 0.2 < rows["relu"]["activation_sparsity"] < rows["fatrelu_0.3"]["activation_sparsity"]


def test_the_standard_error_is_that_of_a_ratio_over_windows() -> None:
    def measured(losses: list[list[float]]) -> Measurement:
        table = torch.tensor(losses, dtype=torch.float64)
        return Measurement(setting=shifted((0.0,)), sparsity=(0.5,), losses=table)

    base, other = measured([[10, 5], [20, 15]]), measured([[11, 5], [20, 15]])
    assert other.ppl == pytest.approx(math.exp(31 / 20))
    assert other.gap(base) == pytest.approx(math.exp(1 / 20) - 1)
    # Growth 1/20: windows scatter by 1 - 5/20 and 0 - 15/20.
    assert other.standard_error(base) == pytest.approx((2 * 0.75**2) ** 0.5 / 20)


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf])
def test_what_is_no_threshold_is_refused(threshold: float) -> None:
    with refused(SparsityError, "--thresholds", f"{threshold:g}", "0 (ReLU) or more"):
        SparsityConfig(model="m", data="d", thresholds=(0.1, threshold))


@pytest.mark.parametrize("name", ["opt-125m", "falcon-7b", "bamboo"])
def test_thresholds_need_a_gated_activation(
    name: str, data: Path, tokenizer_bytes: bytes, tmp_path: Path
) -> None:
    written = write(BY_NAME[name], tmp_path / name, tokenizer_bytes)
    config = SparsityConfig(model=str(written.path), data=str(data), thresholds=(0.1,))
    with refused(SparsityError, "FATReLU needs", written.variant.family, "without thresholds"):
        sparsity(config)


def test_too_little_text_and_unknown_models_are_refused(
    model_dir: Path, make_model: ModelMaker, tmp_path: Path
) -> None:
    short, empty = tmp_path / "short.txt", tmp_path / "empty.txt"
    short.write_text("Hardly a word.")
    empty.write_text("  \n")
    with refused(DataError, str(short), "at least 64", "pass more text"):
        sparsity(SparsityConfig(model=str(model_dir), data=str(short)))
    with refused(DataError, str(empty), "holds no text"):
        sparsity(SparsityConfig(model=str(model_dir), data=str(empty)))
    odd = make_model(tmp_path / "odd", hidden_act="tanh", intermediate_size=64)
    with refused(CheckpointError, "hidden_act is 'tanh'"):
        sparsity(SparsityConfig(model=str(odd), data=str(short)))


@pytest.mark.parametrize(
    ("number", "parts"),
    [
        (math.nan, ("tensor lm_head.weight is damaged: 2 NaN and 0 infinite",)),
        (3e38, ("no finite number", "check the weights")),
    ],
)
def test_numbers_that_overflow_are_refused(
    make_model: ModelMaker, data: Path, tmp_path: Path, number: float, parts: tuple[str, ...]
) -> None:
    from safetensors.torch import load_file, save_file

    path = make_model(tmp_path / "broken", intermediate_size=64)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
    tensors["lm_head.weight"][3, 5:7] = number
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with refused(CheckpointError, str(path), *parts):
        sparsity(SparsityConfig(model=str(path), data=str(data)))


def test_the_command_prints_the_cards_columns_or_json(
    psp: Callable[..., Result], model_dir: Path, data: Path
) -> None:
    base = ("--model", model_dir, "--data", data, "--tokens", TOKENS, "--context", CONTEXT)
    printed = psp("sparsity", *base, "--thresholds", "0,0.5")
    assert printed.exit_code == 0
    assert "average sparsity %" in printed.stdout
    document = json.loads(psp("sparsity", *base, "--thresholds", "0,0.5", "--json").stdout)
    assert [row["setting"] for row in document["settings"]] == ["relu", "fatrelu_0.5"]
    for row in document["settings"]:
        line = next(line for line in printed.stdout.splitlines() if line.startswith(row["setting"]))
        assert line.split()[1:3] == [f"{100 * row['activation_sparsity']:.2f}", f"{row['ppl']:.4f}"]
    refusal = psp("sparsity", *base, "--thresholds", "0.1,-2")
    assert refusal.exit_code == 1
    assert refusal.stderr.startswith("Error: --thresholds: -2 is no threshold")
    for words in (("--thresholds", "a,b"), ("--out", "x"), ("--per-layer",)):
        assert psp("sparsity", *base, *words).exit_code == 2
