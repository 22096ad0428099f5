"""What was exported, byte by byte, long after."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from conftest import refused

import gguf_export.gpu_split
import gguf_export.manifest
from common.errors import FormatError, OutputError, ResultError
from common.hashing import hash_file
from common.provenance import read
from gguf_export.bundle import Bundle, export
from gguf_export.gpu_split import split
from gguf_export.manifest import check_outputs
from gguf_export.settings import ExportConfig, SplitConfig

Psp = Callable[..., Result]


@pytest.fixture
def bundle(exact_bundle: Bundle, tmp_path: Path) -> Bundle:
    directory = tmp_path / "copy"
    shutil.copytree(exact_bundle.model_file.parent, directory)
    return Bundle.beside(directory / exact_bundle.model_file.name)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_one_bit_of_any_exported_file_is_noticed(psp: Psp, bundle: Bundle) -> None:
    chance = random.Random(0)
    assert psp("verify", bundle.model_file).exit_code == 0
    for at in chance.sample(range(bundle.model_file.stat().st_size), 40):
        flip(bundle.model_file, at)
        with refused(FormatError, bundle.model_file.name, "damaged", "export again"):
            check_outputs(bundle.model_file, [bundle.model_file])
        flip(bundle.model_file, at)
    end = bundle.model_file.stat().st_size - 3  # a weight, which no other check would miss
    flip(bundle.model_file, end)
    result = psp("verify", bundle.model_file)
    assert result.exit_code == 1
    assert "checksum" in result.output
    flip(bundle.model_file, end)
    assert check_outputs(bundle.model_file, bundle.written) == "6 files hold what was exported"


def test_damaged_statistics_split_nothing(psp: Psp, bundle: Bundle) -> None:
    file = bundle.activation_directory / "activation_1.pt"
    arguments = ("gpu-split", bundle.model_file, "--vram-budget", "1GiB", "--force")
    assert psp(*arguments).exit_code == 0
    index = bundle.model_file.with_name(f"{bundle.model_file.name}.generated.gpuidx")
    assert index.name in {each.name for each in read(bundle.manifest).outputs}
    assert "7 files" in check_outputs(bundle.model_file, [*bundle.written, index])
    flip(file, file.stat().st_size // 2)
    result = psp(*arguments)
    assert result.exit_code == 1
    assert "activation_1.pt: damaged" in result.stderr
    assert "--statistics DIR" in result.stderr
    flip(index, 4000)
    with refused(FormatError, index.name, "damaged"):
        check_outputs(bundle.model_file, [index])


def test_a_split_that_cannot_be_written_leaves_the_old_one_vouched_for(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SplitConfig(file=bundle.model_file, vram_budget="1GiB", force=True)
    index, said = split(config).gpu_index, list[bool]()

    def fail(*given: object) -> None:
        said.append(index.name in {each.name for each in read(bundle.manifest).outputs})
        raise OutputError("disk full", "free some")

    monkeypatch.setattr(gguf_export.gpu_split, "write_gpu_index", fail)
    with refused(OutputError, "disk full"):
        split(config)
    assert said == [False], "killed here, it would vouch for an index that is another by now"
    assert check_outputs(bundle.model_file, [index]) == "1 files hold what was exported"


def test_a_damaged_file_is_not_benchmarked(psp: Psp, bundle: Bundle) -> None:
    flip(bundle.model_file, bundle.model_file.stat().st_size - 3)
    options = ("--ctx", 32, "--chunks", 1, "-n", 4, "--repeats", 1, "--warm-up", 0)
    result = psp("bench-powerinfer", bundle.model_file, *options)
    assert result.exit_code == 1
    assert f"{bundle.model_file}: damaged" in result.stderr


def test_what_is_exported_says_what_it_was_made_of(bundle: Bundle, model_dir: Path) -> None:
    found = read(bundle.manifest)
    roles = {each.role: each for each in found.ingredients}
    assert roles.keys() == {"model", "predictors"}
    assert [file.name for file in roles["model"].files] == ["model.safetensors"]
    assert len(found.outputs) == 6
    assert found.settings["engine"] == "powerinfer"


def test_a_dense_file_is_vouched_for_too(
    model_dir: Path, exact_dir: Path, tmp_path: Path, psp: Psp
) -> None:
    out = tmp_path / "m.powerinfer.gguf"
    made = export(ExportConfig(model=str(model_dir), predictors=exact_dir, out=out, dense=True))
    assert psp("verify", made.dense_file).exit_code == 0
    flip(made.dense_file, made.dense_file.stat().st_size - 5)
    result = psp("verify", made.dense_file)
    assert (result.exit_code, "checksum" in result.output) == (1, True)


def test_model_files_are_hashed_as_they_are_written_and_not_read_for_it(
    model_dir: Path, exact_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def hashed(path: Path) -> tuple[int, str]:
        read.append(path)
        return hash_file(path)

    monkeypatch.setattr(gguf_export.manifest, "hash_file", hashed)
    out = tmp_path / "m.powerinfer.gguf"
    made = export(ExportConfig(model=str(model_dir), predictors=exact_dir, out=out, dense=True))

    assert {path.suffix for path in read} == {".pt", ".json"}
    assert check_outputs(out, [out, made.dense_file]) == "2 files hold what was exported"


def test_a_file_of_others_has_nothing_to_compare_with(bundle: Bundle, psp: Psp) -> None:
    bundle.manifest.unlink()
    assert "nothing to compare with" in check_outputs(bundle.model_file, bundle.written)
    shown = psp("verify", bundle.model_file)
    assert shown.exit_code == 0
    assert "checksum" not in shown.output
    config = SplitConfig(file=bundle.model_file, vram_budget="1GiB", force=True)
    assert split(config).gpu_index.exists()


def test_a_manifest_that_is_no_file_is_not_taken_for_none(bundle: Bundle) -> None:
    bundle.manifest.unlink()
    assert "no manifest" in check_outputs(bundle.model_file, [bundle.model_file])
    bundle.manifest.symlink_to("nowhere")
    with refused(ResultError, "manifest.json: No such file"):
        check_outputs(bundle.model_file, [bundle.model_file])


def test_a_file_of_another_size_is_not_read(bundle: Bundle) -> None:
    os.truncate(bundle.model_file, 1 << 40)  # sparse: it takes no room, and an hour to hash
    with refused(FormatError, bundle.model_file.name, "damaged"):
        check_outputs(bundle.model_file, [bundle.model_file])
