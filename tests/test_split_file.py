"""The GPU split of a real exported file, by function and by command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from conftest import make_export, refused

from common.errors import ExportError, FormatError, OutputError, PredictorError
from gguf_export.bundle import Bundle
from gguf_export.gpu_split import split
from gguf_export.pwri.gpu_index import index_path, read_gpu_index
from gguf_export.pwri.statistics import write_statistics
from gguf_export.settings import SplitConfig
from gguf_files.reader import GGUFFile

LAYERS, D_FF = 2, 1012
# Gate, up and down row of a neuron in float16, and its number in the bucket.
NEURON = 3 * 64 * 2 + 4
FFN = ("ffn_gate", "ffn_up", "ffn_down_t")


@pytest.fixture
def bundle(exact_bundle: Bundle, tmp_path: Path) -> Bundle:
    """Return a copy of an export with statistics in which no two neurons of a layer tie."""
    directory = tmp_path / "copy"
    shutil.copytree(exact_bundle.model_file.parent, directory)
    made = Bundle.beside(directory / exact_bundle.model_file.name)
    for layer in range(LAYERS):
        generator = torch.Generator().manual_seed(layer)
        counts = torch.randperm(D_FF, generator=generator) ** (2 - layer)
        torch.save(counts, made.activation_directory / f"activation_{layer}.pt")
    made.manifest.unlink()  # the counts are others
    return made


def statistics(bundle: Bundle) -> list[torch.Tensor]:
    files = (bundle.activation_directory / f"activation_{layer}.pt" for layer in range(LAYERS))
    return [torch.load(file, weights_only=True) for file in files]


def fixed_bytes(bundle: Bundle, context: int) -> int:
    """What lies in VRAM before any neuron: all but embedding and FFN matrices, and the cache."""
    infos = GGUFFile(bundle.model_file).tensors
    kept = (
        info.size
        for name, info in infos.items()
        if name != "token_embd.weight" and not any(part in name for part in FFN)
    )
    # Two key/value heads of size 16, keys and values, float16.
    return sum(kept) + LAYERS * context * 2 * 16 * 2 * 2


@pytest.mark.parametrize("neurons", [0, 32, 320, 1000])
def test_the_hottest_neurons_that_fit_are_chosen(bundle: Bundle, neurons: int) -> None:
    budget = fixed_bytes(bundle, 64) + neurons * NEURON + 2000
    document = split(
        SplitConfig(file=bundle.model_file, vram_budget=str(budget), context=64, least_budget=1)
    )
    chosen, capacity = read_gpu_index(index_path(bundle.model_file), LAYERS, D_FF)
    counts = statistics(bundle)
    numbers = [int(mask.sum()) for mask in chosen]
    assert document.everything_but_ffn_fits
    assert document.kv_cache_in_vram
    assert neurons - 32 < sum(numbers) <= neurons + 5
    assert all(number % 32 == 0 or number == D_FF for number in numbers)
    assert capacity == document.ffn_bytes_in_vram == sum(numbers) * NEURON
    for mask, layer, share in zip(chosen, counts, document.layers, strict=True):
        assert share == float(mask.double().mean())
        if 0 < mask.sum() < D_FF:
            assert int(layer[mask].min()) > int(layer[~mask].max())
    total = sum(int(layer.sum()) for layer in counts)
    hot = sum(int(layer[mask].sum()) for layer, mask in zip(counts, chosen, strict=True))
    assert document.activation_share_on_gpu == pytest.approx(hot / total)


def test_other_statistics_count_where_they_are_named(
    bundle: Bundle, tmp_path: Path, psp: Callable[..., Result]
) -> None:
    served = tmp_path / "served"
    served.mkdir()
    hottest = [torch.arange(D_FF), torch.arange(D_FF).flip(0)]
    write_statistics(served, hottest)
    budget = fixed_bytes(bundle, 64) + 320 * NEURON + 2000
    config = SplitConfig(
        file=bundle.model_file,
        vram_budget=str(budget),
        context=64,
        least_budget=1,
        statistics=served,
    )
    split(config)
    chosen, _ = read_gpu_index(index_path(bundle.model_file), LAYERS, D_FF)
    assert sum(int(mask.sum()) for mask in chosen) > 288
    for mask, layer in zip(chosen, hottest, strict=True):
        assert 0 < mask.sum() < D_FF
        assert int(layer[mask].min()) > int(layer[~mask].max())
    options = ("--vram-budget", "2MiB", "--force", "--statistics")
    result = psp("gpu-split", bundle.model_file, *options, served)
    assert result.exit_code == 0, result.output
    empty = psp("gpu-split", bundle.model_file, *options, tmp_path)
    assert empty.exit_code == 1
    assert f"{tmp_path / 'activation'}: holds no statistics of 2 layers" in empty.output


def test_a_budget_below_the_rest_of_the_model_takes_no_neuron(bundle: Bundle) -> None:
    budget = fixed_bytes(bundle, 64) // 2
    document = split(
        SplitConfig(file=bundle.model_file, vram_budget=str(budget), context=64, least_budget=1)
    )
    chosen, capacity = read_gpu_index(index_path(bundle.model_file), LAYERS, D_FF)
    assert not document.everything_but_ffn_fits
    assert capacity == 0
    assert not any(mask.any() for mask in chosen)


def test_a_budget_beyond_the_model_takes_all(bundle: Bundle) -> None:
    document = split(SplitConfig(file=bundle.model_file, vram_budget="1GiB"))
    chosen, _ = read_gpu_index(index_path(bundle.model_file), LAYERS, D_FF)
    assert all(mask.all() for mask in chosen)
    assert document.activation_share_on_gpu == 1
    assert document.powerinfer_option == "--vram-budget 1"
    assert document.vram_budget_bytes == 1 << 30


@pytest.mark.parametrize("change", [{"context": 600}, {"kv_type": "f32"}])
def test_a_larger_cache_leaves_less_for_neurons(bundle: Bundle, change: dict[str, object]) -> None:
    budget = str(fixed_bytes(bundle, 512) + 900 * NEURON)

    def used(**settings: object) -> int:
        run = SplitConfig(
            least_budget=1,
            file=bundle.model_file,
            vram_budget=budget,
            force=True,
            **settings,  # type: ignore[arg-type]
        )
        return split(run).ffn_bytes_in_vram

    assert used(**change) < used()


def test_an_existing_index_needs_force(bundle: Bundle) -> None:
    target = index_path(bundle.model_file)
    target.write_text("old")
    with refused(ExportError, str(target), "--force"):
        split(SplitConfig(file=bundle.model_file, vram_budget="1GiB"))
    assert target.read_text() == "old"
    split(SplitConfig(file=bundle.model_file, vram_budget="1GiB", force=True))
    assert target.read_bytes()[:4] == b"PWRI"


def test_an_export_leaves_no_index_of_an_earlier_model(
    bundle: Bundle, model_dir: Path, exact_dir: Path
) -> None:
    """PowerInfer would load it without a look at its sizes."""
    target = index_path(bundle.model_file)
    target.write_text("old")
    with refused(OutputError, "--force"):
        make_export(model_dir, exact_dir, bundle.model_file)
    make_export(model_dir, exact_dir, bundle.model_file, force=True)
    assert not target.exists()
    bundle.model_file.unlink()
    shutil.rmtree(bundle.predictor_directory)
    shutil.rmtree(bundle.activation_directory)
    target.write_text("left over")
    with refused(OutputError, str(target), "--force"):
        make_export(model_dir, exact_dir, bundle.model_file)


def test_what_cannot_be_split_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with refused(ExportError, "--vram-budget 24", "add a unit", "24GiB"):
        SplitConfig(file=bundle.model_file, vram_budget="24")
    with refused(ExportError, "'24XB'", "24GiB"):
        SplitConfig(file=bundle.model_file, vram_budget="24XB")
    with refused(ExportError, "'q8'", "f16, f32"):
        SplitConfig(file=bundle.model_file, vram_budget="1GiB", kv_type="q8")
    dense = tmp_path / "dense.gguf"
    dense.write_bytes(b"GGUF" + bundle.model_file.read_bytes()[4:])
    with refused(FormatError, str(dense), "dense file", "powerinfer.gguf"):
        split(SplitConfig(file=dense, vram_budget="1GiB"))
    file = bundle.activation_directory / "activation_1.pt"
    torch.save(torch.zeros(7, dtype=torch.int64), file)
    with refused(PredictorError, str(file), "7 counts", "1012 neurons"):
        split(SplitConfig(file=bundle.model_file, vram_budget="1GiB"))
    file.unlink()
    with refused(PredictorError, str(bundle.activation_directory), "no statistics of 2 layers"):
        split(SplitConfig(file=bundle.model_file, vram_budget="1GiB"))
    assert not index_path(bundle.model_file).exists()


def test_the_commands_print_the_same_split(
    psp: Callable[..., Result], bundle: Bundle, model_dir: Path, exact_dir: Path, tmp_path: Path
) -> None:
    command = ("gpu-split", bundle.model_file, "--vram-budget", "1GiB")
    text = psp(*command).stdout
    assert str(index_path(bundle.model_file)) in text
    assert "--vram-budget 1" in text
    assert "2 wholly on the GPU, 0 not at all, of 2" in text
    document = json.loads(psp(*command, "--force", "--json").stdout)
    assert document["layers"] == [1, 1]
    out = tmp_path / "new" / "m.powerinfer.gguf"
    export = ("export-gguf", "--model", model_dir, "--predictors", exact_dir, "--out", out)
    both = json.loads(psp(*export, "--vram-budget", "1GiB", "--json").stdout)
    assert both["model_file"] == str(out)
    assert both["gpu_index"] == str(index_path(out))
    assert both["layers"] == [1, 1]
    assert "activations on the GPU" in psp(*export, "--vram-budget", "1GiB", "--force").stdout
    assert "GPU" not in psp(*export, "--force").stdout
    assert not index_path(out).exists()
