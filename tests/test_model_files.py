"""The model's weights between its traces and its export."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import refused

import common.hashing
from architectures.checkpoint import Checkpoint
from architectures.model_files import compare_files, hashed_meanwhile, weight_files
from common.errors import CheckpointError
from common.hashing import HashedFile, hash_files
from gguf_export.bundle import export
from gguf_export.settings import ExportConfig
from predictor.artifact import PredictorArtifact
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig


@pytest.fixture
def model(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


@pytest.fixture
def artifact(model: Path, tmp_path: Path, data_file: Path) -> PredictorArtifact:
    traces = tmp_path / "traces"
    collect(CollectConfig(model=str(model), data=(str(data_file),), out=traces, tokens=600))
    config = TrainConfig(traces=traces, out=tmp_path / "predictors", rank=32, recipe="svd")
    return train_predictors(config)


def flip(model: Path, byte: int) -> None:
    """Flip a bit of the weights; counted from the end, far from any sample."""
    file = model / "model.safetensors"
    whole = bytearray(file.read_bytes())
    whole[byte] ^= 4
    file.write_bytes(whole)


def test_one_bit_of_any_tensor_is_noticed_at_export(
    artifact: PredictorArtifact, model: Path, tmp_path: Path
) -> None:
    [known] = artifact.model_files
    assert (known.name, known.bytes) == (
        "model.safetensors",
        os.path.getsize(model / "model.safetensors"),
    )
    config = ExportConfig(
        model=str(model), predictors=artifact.path, out=tmp_path / "o" / "m.powerinfer.gguf"
    )
    before = Checkpoint.open(str(model)).fingerprint
    flip(model, -3000)
    assert Checkpoint.open(str(model)).fingerprint == before
    with refused(CheckpointError, "model.safetensors has changed since", str(artifact.path)):
        export(config)
    assert not config.out.exists()
    flip(model, -3000)
    assert not any("other files" in line for line in export(config).warnings)


def test_the_same_weights_in_other_files_are_said_not_to_be_compared(
    artifact: PredictorArtifact, model: Path, tmp_path: Path
) -> None:
    file = model / "model.safetensors"
    names = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    names.pop("__metadata__", None)
    file.rename(model / "model-00001-of-00001.safetensors")
    weights = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": weights}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    out = tmp_path / "o" / "m.powerinfer.gguf"
    bundle = export(ExportConfig(model=str(model), predictors=artifact.path, out=out))
    assert any("lie in other files" in line for line in bundle.warnings)


def test_nothing_is_said_of_what_an_older_version_made(model_dir: Path) -> None:
    checkpoint = Checkpoint.open(str(model_dir))
    with hashed_meanwhile(checkpoint) as files:
        assert compare_files(checkpoint, files.result(), (), model_dir) is None
    assert [file.name for file in files.result()] == [
        path.name for path in weight_files(checkpoint)
    ]


def test_large_files_are_remembered_until_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PSP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(common.hashing, "_KEPT", 4)
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(b"large")
    small.write_bytes(b"s")
    found = hash_files([large, small])
    real, asked = common.hashing.hash_file, list[str]()

    def told(path: Path) -> tuple[int, str]:
        asked.append(path.name)
        return real(path)

    monkeypatch.setattr(common.hashing, "hash_file", told)
    assert hash_files([large, small]) == found
    assert asked == ["small"]
    large.write_bytes(b"other")
    assert hash_files([large])[0] == HashedFile(name="large", bytes=5, xxh3_128=real(large)[1])
    before = large.stat()
    large.write_bytes(b"third")
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy keeps it
    assert hash_files([large])[0].xxh3_128 == real(large)[1]
    (tmp_path / "cache" / "hashes.json").write_text("{")
    assert hash_files([large])[0].bytes == 5
    assert asked == ["small", "large", "large", "large"]
    monkeypatch.setenv("PSP_CACHE_DIR", "/proc/none")
    assert hash_files([large])[0].bytes == 5
