"""Where predictors come from: our artifact, PowerInfer's own directory, or an existing file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFValueType

from architectures.tensor_files import TensorFiles
from common.errors import PredictorError
from common.files import read_json
from gguf_export.pwri.reader import GGUFFile
from gguf_export.pwri.schema import FC1, FC2, THRESHOLD_KEY
from gguf_export.pwri.statistics import has_statistics, layer_statistics
from gguf_export.tensor_file import is_plain, read_tensor_file
from predictor.artifact import LayerPredictor, PredictorArtifact

_FETCH = "fetch the predictors again"
_MOST_LAYERS = 10_000
_LARGEST = torch.finfo(torch.float32).max
_EMBEDDED = "model.layers.{layer}.mlp.predictor.{part}.weight"


@dataclass(frozen=True, kw_only=True)
class PredictorSource:
    """Predictors of a whole model, read layer by layer.

    Attributes:
        path: directory or file.
        n_layers: layers.
        threshold: a neuron is computed unless its logit is below this.
        recipe: how they were made, as JSON.
        layer: reads one layer.
        counted: whether every layer comes with activation counts.
        model: the model that they were made for and its fingerprint, where that is known.
    """

    path: Path
    n_layers: int
    threshold: float
    recipe: str
    layer: Callable[[int], LayerPredictor]
    counted: bool = True
    model: tuple[str, str] | None = None


def open_predictors(path: Path) -> PredictorSource:
    """Open predictors of any kind; only sizes and settings are read.

    Args:
        path: directory from `psp train-predictor`; directory with `model_N.pt` and `config.json` as
            PowerInfer's converters read it; a GGUF file with predictors in it; or a checkpoint that
            has some, as TurboSparse's do. For the middle two `activation/activation_N.pt` beside
            them is read where it is there.

    Raises:
        PredictorError: none of these, damaged or incomplete.
        FormatError: a damaged GGUF file.
    """
    if path.is_file():
        return _from_file(path)
    if (path / "model_0.pt").is_file() and not (path / "predictors.json").exists():
        return _from_directory(path)
    if (path / "config.json").is_file() and not (path / "predictors.json").exists():
        return _from_checkpoint(path)
    artifact = PredictorArtifact.open(path)
    artifact.require_complete()
    header = artifact.header
    return PredictorSource(
        path=path,
        n_layers=header.n_layers,
        threshold=header.threshold,
        recipe=json.dumps(header.recipe),
        layer=artifact.layer,
        model=(header.model, header.model_fingerprint),
    )


def _from_directory(path: Path) -> PredictorSource:
    config: dict[str, Any] = {}
    if (path / "config.json").exists():
        config = read_json(path / "config.json", PredictorError, _FETCH)
    threshold = config.get("sparse_threshold", 0.0)
    plain = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not plain or not abs(threshold) <= _LARGEST:
        raise PredictorError(
            f"{path}/config.json: sparse_threshold is {repr(threshold)[:40]}, expected a number "
            "that fits float32",
            _FETCH,
        )
    n_layers = 0
    while n_layers < _MOST_LAYERS and (path / f"model_{n_layers}.pt").is_file():
        n_layers += 1

    counted = has_statistics(path.parent, n_layers)

    def layer(number: int) -> LayerPredictor:
        file = path / f"model_{number}.pt"
        content = read_tensor_file(file)
        if not isinstance(content, dict):
            raise PredictorError(f"{file}: expected fc1.weight and fc2.weight", _FETCH)
        fc1, fc2 = (_half(file, name, content.get(name)) for name in ("fc1.weight", "fc2.weight"))
        return LayerPredictor(fc1, fc2, layer_statistics(path.parent, number) if counted else None)

    return PredictorSource(
        path=path,
        n_layers=n_layers,
        threshold=float(threshold),
        recipe=json.dumps({"name": "imported", "from": "PowerInfer predictor directory"}),
        layer=layer,
        counted=counted,
    )


def _from_checkpoint(path: Path) -> PredictorSource:
    """TurboSparse: `mlp.predictor.fc1` and `fc2` read the residual and keep logits above 0."""
    files = TensorFiles(path)
    n_layers = 0
    while _EMBEDDED.format(layer=n_layers, part="fc1") in files.shards:
        n_layers += 1
    if not n_layers:
        raise PredictorError(
            f"{path}: a checkpoint without predictors in it",
            "pass a directory made by 'psp train-predictor'",
        )

    def layer(number: int) -> LayerPredictor:
        names = (_EMBEDDED.format(layer=number, part=part) for part in ("fc1", "fc2"))
        fc1, fc2 = (_half(path, n, files.read(n) if n in files.shards else None) for n in names)
        return LayerPredictor(fc1, fc2, None)

    return PredictorSource(
        path=path,
        n_layers=n_layers,
        threshold=0.0,
        recipe=json.dumps({"name": "imported", "from": "checkpoint"}),
        layer=layer,
        counted=False,
    )


def _from_file(path: Path) -> PredictorSource:
    file = GGUFFile(path)
    n_layers = 0
    while FC1.format(layer=n_layers) in file.tensors:
        n_layers += 1
    if not n_layers:
        raise PredictorError(f"{path}: holds no predictors (blk.N.fc1.weight)", "pass another file")
    threshold = 0.0
    if THRESHOLD_KEY in file.values:
        threshold = file.value(THRESHOLD_KEY, GGUFValueType.FLOAT32)
        if not math.isfinite(threshold):
            raise file.error(f"{THRESHOLD_KEY} is {threshold}")

    counted = has_statistics(path.parent, n_layers)

    def layer(number: int) -> LayerPredictor:
        names = (FC1.format(layer=number), FC2.format(layer=number))
        fc1, fc2 = (_half(path, name, torch.tensor(file.tensor(name))) for name in names)
        return LayerPredictor(fc1, fc2, layer_statistics(path.parent, number) if counted else None)

    return PredictorSource(
        path=path,
        n_layers=n_layers,
        threshold=threshold,
        recipe=json.dumps({"name": "imported", "from": path.name}),
        layer=layer,
        counted=counted,
    )


def _half(file: Path, name: str, value: object) -> torch.Tensor:
    if not is_plain(value) or value.dim() != 2 or not value.is_floating_point():
        raise PredictorError(f"{file}: {name} is missing or no matrix", _FETCH)
    half = value.half()
    if not torch.isfinite(half).all():
        raise PredictorError(f"{file}: {name} does not fit float16", _FETCH)
    return half


def read_ranks(predictors: PredictorSource, d_model: int, d_ff: int) -> list[int]:
    """Read every layer once, check its shapes and return the ranks.

    Raises:
        PredictorError: a layer that is damaged or does not fit the model.
    """
    ranks = []
    for number in range(predictors.n_layers):
        layer = predictors.layer(number)
        rank = len(layer.fc1)
        counts = d_ff if layer.activation_counts is None else len(layer.activation_counts)
        shapes = (layer.fc1.shape, layer.fc2.shape, counts)
        if shapes != ((rank, d_model), (d_ff, rank), d_ff):
            raise PredictorError(
                f"{predictors.path}: layer {number} has fc1 {tuple(layer.fc1.shape)} and fc2 "
                f"{tuple(layer.fc2.shape)}, the model needs (rank, {d_model}) and ({d_ff}, rank)",
                "pass predictors of this model",
            )
        ranks.append(rank)
    return ranks
