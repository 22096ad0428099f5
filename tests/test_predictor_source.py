"""Predictors of others: PowerInfer's own directory, and those inside an existing file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_export, refused, write_predictors
from damages import compress
from families import BY_NAME, write
from gguf import GGMLQuantizationType, GGUFValueType
from published import gated_shapes
from rewriting import rewritten, stored

from common.errors import ExportError, FormatError, PredictorError
from gguf_export.bundle import Bundle
from gguf_export.predictor_kinds import open_predictors
from gguf_files.reader import GGUFFile

Damage = Callable[[Path], object]


@pytest.fixture
def copy(exact_bundle: Bundle, tmp_path: Path) -> Bundle:
    """Return a copy of the bundle that a test may damage."""
    directory = tmp_path / "copy"
    shutil.copytree(exact_bundle.model_file.parent, directory)
    return Bundle.beside(directory / exact_bundle.model_file.name)


def tensors(path: Path) -> dict[str, bytes]:
    file = GGUFFile(path)
    return {name: file.tensor(name).tobytes() for name in file.tensors}


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_imported_predictors_give_the_same_tensors_and_statistics(
    model_dir: Path, exact_bundle: Bundle, tmp_path: Path, kind: str
) -> None:
    source = exact_bundle.predictor_directory if kind == "directory" else exact_bundle.model_file
    made = make_export(model_dir, source, tmp_path / "new" / "exact.powerinfer.gguf")
    assert tensors(made.model_file) == tensors(exact_bundle.model_file)
    for layer in range(2):
        name = f"activation_{layer}.pt"
        ours = torch.load(made.activation_directory / name, weights_only=True)
        theirs = torch.load(exact_bundle.activation_directory / name, weights_only=True)
        assert torch.equal(ours, theirs)
    recipe = json.loads(GGUFFile(made.model_file).values["psp.recipe"].data)
    assert recipe["name"] == ("imported" if kind == "directory" else "made by hand")


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_without_statistics_none_are_written_and_old_ones_go(
    model_dir: Path, copy: Bundle, tmp_path: Path, kind: str
) -> None:
    shutil.rmtree(copy.activation_directory)
    source = copy.predictor_directory if kind == "directory" else copy.model_file
    out = tmp_path / "new" / "m.powerinfer.gguf"
    made = make_export(model_dir, source, out)
    assert made.model_file.exists()
    assert not made.activation_directory.exists()
    made.activation_directory.mkdir()
    (made.activation_directory / "activation_0.pt").write_bytes(b"of an earlier export")
    make_export(model_dir, source, out, force=True)
    assert not made.activation_directory.exists()


def test_every_layer_has_a_rank_of_its_own(model_dir: Path, copy: Bundle, tmp_path: Path) -> None:
    file = copy.predictor_directory / "model_1.pt"
    layer = torch.load(file, weights_only=True)
    small = {"fc1.weight": layer["fc1.weight"][:64], "fc2.weight": layer["fc2.weight"][:, :64]}
    torch.save({name: part.float().clone() for name, part in small.items()}, file)
    out = tmp_path / "new" / "m.powerinfer.gguf"
    made = GGUFFile(make_export(model_dir, copy.predictor_directory, out).model_file)
    assert made.tensors["blk.0.fc1.weight"].shape == (128, 64)
    assert made.tensors["blk.1.fc1.weight"].shape == (64, 64)
    assert made.tensors["blk.1.fc2.weight"].shape == (1012, 64)
    assert made.tensor("blk.1.fc1.weight").tobytes() == small["fc1.weight"].numpy().tobytes()


@pytest.mark.parametrize("threshold", [0.0, -1.5, 3])
def test_the_threshold_comes_along(
    model_dir: Path, copy: Bundle, tmp_path: Path, threshold: float
) -> None:
    (copy.predictor_directory / "config.json").write_text(
        json.dumps({"sparse_threshold": threshold})
    )
    assert open_predictors(copy.predictor_directory).threshold == threshold
    first = make_export(model_dir, copy.predictor_directory, tmp_path / "a" / "m.powerinfer.gguf")
    second = make_export(model_dir, first.model_file, tmp_path / "b" / "m.powerinfer.gguf")
    for made in (first, second):
        assert GGUFFile(made.model_file).values["powerinfer.sparse_threshold"].data == threshold


class _Malice:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def _save(directory: Path, **changes: Any) -> None:
    file = directory / "model_0.pt"
    content = torch.load(file, weights_only=True)
    names = {name.replace("_", "."): value for name, value in changes.items()}
    torch.save({k: v for k, v in (content | names).items() if v is not None}, file)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated": (
        lambda path: (path / "model_1.pt").write_bytes((path / "model_1.pt").read_bytes()[:100]),
        "model_1.pt: cannot be read",
    ),
    "no dictionary": (
        lambda path: torch.save(torch.zeros(3), path / "model_0.pt"),
        "model_0.pt: expected fc1.weight and fc2.weight",
    ),
    "fc1 missing": (lambda path: _save(path, fc1_weight=None), "fc1.weight is missing"),
    "biases": (
        lambda path: _save(path, fc1_bias=torch.zeros(128), fc2_bias=torch.zeros(1012)),
        "model_0.pt: holds fc1.bias, fc2.bias beside fc1.weight and fc2.weight; PowerInfer's",
    ),
    "a third matrix": (lambda path: _save(path, fc3_weight=torch.eye(2)), "holds fc3.weight"),
    "no names": (
        lambda path: torch.save({1: torch.eye(2)}, path / "model_0.pt"),
        "model_0.pt: holds 1 beside",
    ),
    "fc2 a vector": (lambda path: _save(path, fc2_weight=torch.zeros(9)), "fc2.weight is missing"),
    "integers": (
        lambda path: _save(path, fc1_weight=torch.zeros(128, 64, dtype=torch.int64)),
        "fc1.weight is missing or no matrix",
    ),
    "too large": (
        lambda path: _save(path, fc1_weight=torch.full((128, 64), 1e6)),
        "fc1.weight does not fit float16",
    ),
    "not a number": (
        lambda path: _save(path, fc1_weight=torch.full((128, 64), float("nan"))),
        "fc1.weight does not fit float16",
    ),
    "terabytes of one number": (
        lambda path: _save(path, fc1_weight=torch.zeros(1, 1).expand(2**20, 2**20)),
        "fc1.weight is missing or no matrix",
    ),
    "no numbers": (
        lambda path: _save(path, fc1_weight=torch.zeros(128, 64, device="meta")),
        "fc1.weight is missing or no matrix",
    ),
    "sparse": (
        lambda path: _save(path, fc1_weight=torch.eye(64).to_sparse()),
        "fc1.weight is missing or no matrix",
    ),
    "compressed": (lambda path: compress(path / "model_0.pt"), "model_0.pt: is compressed"),
    "ranks differ": (
        lambda path: _save(path, fc1_weight=torch.zeros(64, 64)),
        "layer 0 has fc1 (64, 64) and fc2 (1012, 128)",
    ),
    "a layer missing": (
        lambda path: (path / "model_1.pt").unlink(),
        "predictors have 1 layers, the model has 2",
    ),
    "threshold a text": (
        lambda path: (path / "config.json").write_text('{"sparse_threshold": "0"}'),
        "sparse_threshold is '0', expected a number",
    ),
    "threshold no number": (
        lambda path: (path / "config.json").write_text('{"sparse_threshold": NaN}'),
        "sparse_threshold is nan, expected a number",
    ),
    "threshold too large": (
        lambda path: (path / "config.json").write_text(f'{{"sparse_threshold": {10**400}}}'),
        "expected a number that fits float32",
    ),
    "statistics complex": (
        lambda path: torch.save(
            torch.zeros(1012, dtype=torch.complex64), path.parent / "activation" / "activation_0.pt"
        ),
        "activation_0.pt: expected a vector of counts",
    ),
    "statistics no numbers": (
        lambda path: torch.save(
            torch.full((1012,), float("nan")), path.parent / "activation" / "activation_0.pt"
        ),
        "activation_0.pt: expected a vector of counts",
    ),
    "config no object": (lambda path: (path / "config.json").write_text("[]"), "config.json"),
    "statistics no vector": (
        lambda path: torch.save(torch.zeros(2, 2), path.parent / "activation" / "activation_0.pt"),
        "activation_0.pt: expected a vector of counts",
    ),
    "statistics of other sizes": (
        lambda path: torch.save(
            torch.zeros(7, dtype=torch.int64), path.parent / "activation" / "activation_0.pt"
        ),
        "pass predictors of this model",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_directory_is_refused_and_nothing_written(
    model_dir: Path, copy: Bundle, tmp_path: Path, name: str
) -> None:
    damage, problem = DAMAGES[name]
    damage(copy.predictor_directory)
    with refused(PredictorError, str(copy.model_file.parent), problem):
        make_export(model_dir, copy.predictor_directory, tmp_path / "new" / "m.powerinfer.gguf")
    assert not (tmp_path / "new").exists()


def test_a_pickle_is_not_run(model_dir: Path, copy: Bundle, tmp_path: Path) -> None:
    target = tmp_path / "harmed"
    payload = {"fc1.weight": _Malice(target), "fc2.weight": torch.zeros(1012, 128)}
    torch.save(payload, copy.predictor_directory / "model_0.pt")
    with refused(PredictorError, "model_0.pt", "cannot be read"):
        make_export(model_dir, copy.predictor_directory, tmp_path / "new" / "m.powerinfer.gguf")
    assert not target.exists()
    pickle.loads(pickle.dumps(_Malice(target)))
    assert target.exists(), "the payload would have done harm"


def test_a_rank_that_powerinfer_cannot_run_is_refused(
    model_dir: Path, copy: Bundle, tmp_path: Path
) -> None:
    _save(
        copy.predictor_directory, fc1_weight=torch.zeros(40, 64), fc2_weight=torch.zeros(1012, 40)
    )
    with refused(ExportError, "rank 40", "multiple of 32"):
        make_export(model_dir, copy.predictor_directory, tmp_path / "new" / "m.powerinfer.gguf")


def test_predictors_inside_a_checkpoint_are_taken_from_it(
    tokenizer_bytes: bytes, model_dir: Path, tmp_path: Path
) -> None:
    """TurboSparse's own, which its code applies to the same residual as PowerInfer does."""
    variant = BY_NAME["turbosparse"].changed(intermediate_size=1012)
    shapes = partial(gated_shapes, predictor=32)
    written = write(replace(variant, shapes=shapes), tmp_path / "turbo", tokenizer_bytes)
    made = make_export(written.path, written.path, tmp_path / "new" / "m.powerinfer.gguf")
    file = GGUFFile(made.model_file)
    for layer in range(2):
        for part in ("fc1", "fc2"):
            stored = written.tensors[f"model.layers.{layer}.mlp.predictor.{part}.weight"]
            found = file.tensor(f"blk.{layer}.{part}.weight")
            assert found.tobytes() == stored.half().numpy().tobytes()
    assert not made.activation_directory.exists()
    with refused(PredictorError, str(model_dir), "without predictors", "psp train-predictor"):
        open_predictors(model_dir)


def test_a_bias_in_a_checkpoint_or_file_is_refused(
    tokenizer_bytes: bytes, exact_bundle: Bundle, tmp_path: Path
) -> None:
    """PowerInfer would have no place for it, and without it the logits are others."""
    variant = BY_NAME["turbosparse"].changed(intermediate_size=1012)

    def shapes(config: Any) -> dict[str, tuple[int, ...]]:
        bias = {"model.layers.1.mlp.predictor.fc2.bias": (1012,)}
        return {**gated_shapes(config, predictor=32), **bias}

    written = write(replace(variant, shapes=shapes), tmp_path / "turbo", tokenizer_bytes)
    source = open_predictors(written.path)
    source.layer(0)
    with refused(PredictorError, str(written.path), "holds fc2.bias beside"):
        source.layer(1)
    bias = {"blk.1.fc1.bias": stored(np.zeros(128), GGMLQuantizationType.F32)}
    file = rewritten(exact_bundle.model_file, tmp_path / "m.gguf", tensors=bias)
    with refused(PredictorError, str(file), "holds fc1.bias beside"):
        open_predictors(file).layer(1)


def test_a_file_without_predictors_or_damaged_is_refused(
    model_dir: Path, exact_bundle: Bundle, tmp_path: Path
) -> None:
    data = bytearray(exact_bundle.model_file.read_bytes())
    dense = tmp_path / "dense.gguf"
    dense.write_bytes(bytes(data).replace(b".fc1.weight", b".fcX.weight"))
    with refused(PredictorError, str(dense), "holds no predictors", "another file"):
        open_predictors(dense)
    short = tmp_path / "short.gguf"
    short.write_bytes(data[:1000])
    with refused(FormatError, str(short)):
        open_predictors(short)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (struct.pack("<If", GGUFValueType.FLOAT32, float("nan")), "sparse_threshold is nan"),
        (struct.pack("<Ii", GGUFValueType.INT32, 0), "is INT32, expected FLOAT32"),
    ],
)
def test_a_file_whose_threshold_is_none_is_refused(
    copy: Bundle, value: bytes, problem: str
) -> None:
    data, key = bytearray(copy.model_file.read_bytes()), b"powerinfer.sparse_threshold"
    at = data.index(key) + len(key)
    data[at : at + 8] = value
    copy.model_file.write_bytes(data)
    with refused(FormatError, str(copy.model_file), problem):
        open_predictors(copy.model_file)


def test_what_is_no_predictors_at_all_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with refused(PredictorError, str(tmp_path / "predictors.json"), "psp train-predictor"):
        open_predictors(tmp_path)


def test_our_own_directory_counts_before_powerinfer_s(exact_dir: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(exact_dir, tmp_path / "both"))
    torch.save({}, both / "model_0.pt")
    assert open_predictors(both).model is not None


def test_our_own_predictors_know_their_model(model_dir: Path, tmp_path: Path) -> None:
    write_predictors(model_dir, tmp_path / "own")
    source = open_predictors(tmp_path / "own")
    assert source.model is not None
    assert source.model[0] == str(model_dir)
    assert (source.n_layers, source.threshold, source.counted) == (2, 0.0, True)
