"""The search of FATReLU's threshold, and the checkpoint that carries it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEXT, ModelMaker, refused
from families import BY_NAME, Written, save_tensors, write

from architectures.checkpoint import Checkpoint
from architectures.model import load_model
from architectures.tensor_files import TensorFiles
from common.errors import OutputError, SparsityError
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from prosparse.activation import open_any, shifted
from prosparse.gate_statistics import GateStatistics, gate_statistics
from prosparse.measurement import ExchangeableModel, Measurement
from prosparse.settings import SparsityConfig
from prosparse.shifted_checkpoint import MARKER, common_threshold, write_shifted
from prosparse.threshold_shift import largest_within, shift

INDEX = "pytorch_model.bin.index.json"
WINDOWS = [[1, *range(5, 40)], [1, *range(60, 90)]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("held-out") / "text.txt"
    path.write_text(TEXT)
    return path


def make(name: str, path: Path, tokenizer: bytes) -> Written:
    return write(BY_NAME[name], path, tokenizer)


def statistics_of(counts: list[list[float]], errors: list[list[float]]) -> GateStatistics:
    """Make statistics of increments, at thresholds 1, 2, 3, …."""
    table = np.cumsum(np.array(counts, float), axis=1)
    edges = np.arange(1.0, table.shape[1] + 1)
    return GateStatistics(edges, table, np.cumsum(np.array(errors), axis=1), table[:, -1])


def test_a_common_threshold_is_the_lowest_that_turns_off_the_share() -> None:
    statistics = statistics_of([[1, 2, 3, 4], [3, 3, 3, 1]], [[0.0] * 4] * 2)
    # 4, 9, 15 and 20 of 20 are below 1, 2, 3 and 4.
    for share, threshold in ((0.2, 1.0), (0.21, 2.0), (0.45, 2.0), (0.75, 3.0), (0.76, 4.0)):
        assert statistics.common(share) == (threshold,) * 2


def test_thresholds_for_several_at_once_go_where_they_cost_least() -> None:
    # In the second layer every neuron costs a hundredth of what it costs in the first.
    errors = [[1.0, 2.0, 4.0, 8.0], [0.01, 0.02, 0.04, 0.08]]
    statistics = statistics_of([[10.0] * 4] * 2, errors)
    # The first bin of a layer is the least that it can turn off.
    assert statistics.each(0.5) == (1.0, 3.0)
    assert statistics.each(0.6) == (1.0, 4.0)
    assert statistics.common(0.5) == (2.0, 2.0)
    rising = [statistics.each(share) for share in (0.2, 0.5, 0.7, 0.95)]
    assert rising == sorted(rising)
    assert rising[-1] == (4.0, 4.0)


def test_statistics_are_those_of_the_published_formula(
    tokenizer_bytes: bytes, tmp_path: Path
) -> None:
    written = make("relu-llama", tmp_path / "model", tokenizer_bytes)
    checkpoint = Checkpoint.open(written.path)
    measured, statistics = gate_statistics(ExchangeableModel(checkpoint, WINDOWS, "cpu"))
    references = [written.reference(window) for window in WINDOWS]
    for layer in range(checkpoint.shape.n_layers):
        layers = [reference.layers[layer] for reference in references]
        gate = torch.cat([each.gate for each in layers])
        product = torch.cat([each.intermediate for each in layers])
        scale = torch.cat([each.residual for each in layers]).square().sum(1, keepdim=True)
        down = written.tensors[f"model.layers.{layer}.mlp.down_proj.weight"].double()
        cost = product.square() * down.square().sum(0) / scale
        assert statistics.active[layer] == pytest.approx(int((gate > 0).sum()), abs=1)
        for threshold in (0.1, 0.5, 1.0, 2.0):
            k = int(np.searchsorted(statistics.edges, threshold))
            assert statistics.edges[k] == pytest.approx(threshold, rel=0.03)
            off = (gate > 0) & (gate < statistics.edges[k])
            assert statistics.counts[layer, k] == pytest.approx(int(off.sum()), abs=2)
            assert statistics.errors[layer, k] == pytest.approx(float(cost[off].sum()), rel=2e-2)
    share = statistics.active.sum() / gate.numel() / checkpoint.shape.n_layers
    assert measured.mean_sparsity == pytest.approx(1 - share)


def measurement(share: float, gap: float) -> Measurement:
    losses = torch.tensor([[100 * (1 + math.log1p(gap)), 100.0]], dtype=torch.float64)
    return Measurement(setting=shifted((share,)), sparsity=(share,), losses=losses)


@pytest.mark.parametrize(("bound", "share"), [(0.0101, 64), (0.02, 90), (1.0, 127), (2e-4, 9)])
def test_the_largest_share_within_the_bound_is_found(bound: float, share: int) -> None:
    base, tried = measurement(0, 0), []

    def measure(at: float) -> Measurement:
        tried.append(at)
        return measurement(at, 0.04 * at**2)  # 0.01 at one half

    found = largest_within(measure, lambda m: m.gap(base), bound)
    assert found.sparsity[0] == share / 128
    assert len(tried) == 7


def test_a_bound_out_of_reach_names_the_best() -> None:
    base = measurement(0, 0)
    with refused(
        SparsityError, "--max-ppl-gap 0.001", "fatrelu_0.0078125", "2.0000%", "allow more"
    ):
        largest_within(lambda share: measurement(share, 0.02), lambda m: m.gap(base), 0.001)


def logits_of(checkpoint: Checkpoint, thresholds: tuple[float, ...] | None = None) -> torch.Tensor:
    from architectures.gated import FATReLU

    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    for block, threshold in zip(model.blocks, thresholds or (), strict=False):
        block.get_submodule("mlp").act_fn = FATReLU(threshold)
    return model.logits(torch.tensor(WINDOWS[:1]))


def relu_logits(path: Path) -> torch.Tensor:
    return logits_of(open_any(str(path)).checkpoint, (0.0, 0.0, 0.0))


@pytest.mark.parametrize("name", ["prosparse", "relu-llama", "minicpm-s", "relu-mistral"])
def test_thresholds_of_several_at_once_are_carried_by_the_weights(
    name: str, tokenizer_bytes: bytes, tmp_path: Path
) -> None:
    written = make(name, tmp_path / "model", tokenizer_bytes)
    checkpoint = open_any(str(written.path)).checkpoint
    thresholds = (0.1, 0.7, 0.3)[: checkpoint.shape.n_layers]
    out = tmp_path / "shifted"
    before = {file.name: file.read_bytes() for file in written.path.iterdir()}
    threshold = write_shifted(checkpoint, thresholds, out, {})
    assert before == {file.name: file.read_bytes() for file in written.path.iterdir()}
    shifted_model = Checkpoint.open(out)
    assert shifted_model.shape.activation == "fatrelu"
    assert shifted_model.shape.activation_threshold == threshold
    assert min(thresholds) < threshold < max(thresholds)
    wanted = logits_of(checkpoint, thresholds)
    spread = float(wanted.std())
    # Scaled weights are rounded once more: to 24, 11 or 8 bits.
    rounding = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}
    bound = rounding[str(checkpoint.dtype).removeprefix("torch.")] * spread
    assert float((logits_of(shifted_model) - wanted).square().mean().sqrt()) < bound
    # PowerInfer computes ReLU; to it nothing has changed.
    plain = relu_logits(out) - relu_logits(written.path)
    assert float(plain.square().mean().sqrt()) < bound
    # One threshold for all would be another model.
    assert float((logits_of(checkpoint, (threshold,) * 3) - wanted).abs().max()) > 0.05 * spread


def published_activation(config: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Choose the activation as the published modelling code does."""
    assert config["hidden_act"] == "fatrelu"

    class Published(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = torch.zeros_like(x)
            mask = torch.ge(x, config["hidden_act_param"])
            kept[mask] = x[mask]
            return kept

    return Published()


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_found_threshold_is_written_and_read_by_all(
    per_layer: bool, make_model: ModelMaker, data: Path, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    path, out = make_model(tmp_path / "model", intermediate_size=96), tmp_path / "shifted"
    config = SparsityConfig(
        model=str(path),
        data=str(data),
        tokens=120,
        context=40,
        thresholds=(0.2,),
        max_ppl_gap=0.05,
        per_layer=per_layer,
        out=out,
    )
    document = shift(config).document()
    relu, asked, found = document["settings"]
    assert (relu["setting"], asked["setting"]) == ("relu", "fatrelu_0.2")
    assert found["ppl_gap"] <= 0.05 + (1e-3 if per_layer else 0)
    assert found["activation_sparsity"] > relu["activation_sparsity"]
    chosen = document["search"]["thresholds"]
    assert (len(set(chosen)) == 1) != per_layer
    within = [row for row in document["search"]["tried"] if row["ppl_gap"] <= 0.05]
    best = max(within, key=lambda row: float(row["activation_sparsity"]))
    assert best["thresholds"] == chosen
    assert found["activation_sparsity"] == pytest.approx(best["activation_sparsity"], abs=1e-3)
    stored = json.loads((out / "config.json").read_text())
    assert found["thresholds"] == [stored["hidden_act_param"]] * 2
    assert json.loads((out / MARKER).read_text())["thresholds"] == chosen
    # transformers' own LLaMA with the published activation, from nothing but the directory.
    loaded = LlamaConfig.from_pretrained(out)
    assert loaded.hidden_act_param == stored["hidden_act_param"]
    loaded.hidden_act = "relu"
    model = LlamaForCausalLM.from_pretrained(out, config=loaded, dtype=torch.float32).eval()
    for block in model.model.layers:
        block.mlp.act_fn = published_activation(stored)
    with torch.no_grad():
        published = model(torch.tensor(WINDOWS[:1])).logits
    torch.testing.assert_close(logits_of(Checkpoint.open(out)), published, atol=1e-4, rtol=1e-4)
    # And collected: labels are gates from the threshold on.
    store = collect(CollectConfig(model=str(out), data=str(data), out=tmp_path / "t", tokens=120))
    assert store.header.activation == "fatrelu"
    assert store.header.activation_threshold == stored["hidden_act_param"]


def test_weights_stay_as_they_are_under_a_common_threshold(
    tokenizer_bytes: bytes, tmp_path: Path
) -> None:
    written = make("relu-llama", tmp_path / "model", tokenizer_bytes)
    (written.path / "notes.txt").write_text("not part of a checkpoint")
    checkpoint = Checkpoint.open(written.path)
    out = tmp_path / "shifted"
    assert write_shifted(checkpoint, (0.25, 0.25), out, {}) == 0.25
    kept = {file.name for file in out.iterdir()} - {MARKER}
    own = {file.name for file in written.path.iterdir()} - {"notes.txt"}
    mended = {"tokenizer.json", "tokenizer_config.json"}  # beside a bare tokenizer.model
    assert kept == own | mended
    for name in own - {"config.json", INDEX}:
        assert (out / name).read_bytes() == (written.path / name).read_bytes()
    old, new = (json.loads((p / INDEX).read_text()) for p in (written.path, out))
    assert new == old
    was, now = (json.loads((p / "config.json").read_text()) for p in (written.path, out))
    assert now == was | {"hidden_act": "fatrelu", "hidden_act_param": 0.25}


@pytest.mark.parametrize("thresholds", [(0.3, 0.3), (0.1, 0.7)])
def test_what_is_written_has_one_set_of_weights_under_plain_names(
    tokenizer_bytes: bytes, tmp_path: Path, thresholds: tuple[float, ...]
) -> None:
    """Two sets, names behind a wrapper, a head that the config denies: all is settled."""
    written = make("relu-llama", tmp_path / "model", tokenizer_bytes)
    named = {f"_orig_mod.{name}": tensor for name, tensor in written.tensors.items()}
    save_tensors(named, written.path, "sharded safetensors")
    config = json.loads((written.path / "config.json").read_text())
    index = "model.safetensors.index.json"
    (written.path / index).rename(written.path / "other.safetensors.index.json")
    config |= {"tie_word_embeddings": True, "architectures": None}
    config["transformers_weights"] = "other.safetensors.index.json"
    (written.path / "config.json").write_text(json.dumps(config))
    (written.path / "adapter_config.json").write_text("{}")
    checkpoint, out = Checkpoint.open(written.path), tmp_path / "shifted"
    assert len(checkpoint.notes) == 4
    write_shifted(checkpoint, thresholds, out, {})
    shifted_model = Checkpoint.open(out)
    assert not shifted_model.notes
    assert isinstance(shifted_model.files, TensorFiles)
    assert not shifted_model.files.prefix
    assert (out / index).exists()
    assert not list(out.glob("*.bin*"))
    found = json.loads((out / "config.json").read_text())
    assert found["architectures"] == ["LlamaForCausalLM"]
    assert found["tie_word_embeddings"] is False
    assert "transformers_weights" not in found
    wanted = logits_of(checkpoint, thresholds)
    difference = logits_of(shifted_model) - wanted
    assert float(difference.square().mean().sqrt()) < 2e-2 * float(wanted.std())


def test_one_threshold_lies_amid_those_of_the_layers() -> None:
    threshold, scales = common_threshold((0.1, 0.4))
    assert threshold == pytest.approx(0.2)
    assert scales == pytest.approx((2.0, 0.5))


@pytest.mark.parametrize("bound", [0.0, -0.1, math.nan, math.inf])
def test_what_is_no_bound_is_refused(bound: float) -> None:
    with refused(SparsityError, "--max-ppl-gap", f"{bound:g}", "above 0"):
        SparsityConfig(model="m", data="d", max_ppl_gap=bound)


def test_models_without_a_relu_gate_are_refused(
    make_model: ModelMaker, data: Path, tokenizer_bytes: bytes, tmp_path: Path
) -> None:
    silu = make_model(tmp_path / "silu", hidden_act="silu", intermediate_size=64)
    with refused(SparsityError, "hidden_act is 'silu'", "psp sparsify first"):
        shift(SparsityConfig(model=str(silu), data=str(data), max_ppl_gap=0.01))
    opt = make("opt-125m", tmp_path / "opt", tokenizer_bytes)
    with refused(SparsityError, "FATReLU needs", "family opt"):
        shift(SparsityConfig(model=str(opt.path), data=str(data), max_ppl_gap=0.01))


def test_nothing_is_overwritten_by_mistake(
    make_model: ModelMaker, data: Path, tmp_path: Path
) -> None:
    path = make_model(tmp_path / "model", intermediate_size=64)
    other = make_model(tmp_path / "other", intermediate_size=64)

    def attempt(out: Path, force: bool) -> None:
        bound = SparsityConfig(
            model=str(path), data=str(data), max_ppl_gap=9.0, tokens=80, out=out, force=force
        )
        shift(bound)

    with refused(OutputError, "is the model itself"):
        attempt(path, True)
    with refused(OutputError, "exists; pass --force"):
        attempt(other, False)
    with refused(OutputError, "was not made by this command"):
        attempt(other, True)
    assert "hidden_act_param" not in json.loads((other / "config.json").read_text())
    attempt(tmp_path / "new", False)
    attempt(tmp_path / "new", True)
    assert Checkpoint.open(tmp_path / "new").shape.activation == "fatrelu"
