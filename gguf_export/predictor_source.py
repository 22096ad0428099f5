"""Predictors from our artifact, PowerInfer's directory or an existing file, and that directory."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGUFValueType

from architectures.tensor_files import TensorFiles, is_plain
from common.errors import PredictorError
from common.files import read_json, write_bytes, write_json
from gguf_export.pwri.schema import FC1, FC2, THRESHOLD_KEY
from gguf_export.pwri.statistics import (
    has_statistics,
    layer_statistics,
    read_saved,
    statistics_file,
)
from gguf_files.reader import GGUFFile
from predictor.artifact import LayerPredictor, PredictorArtifact

_PARTS = ("fc1.weight", "fc2.weight")
_FETCH = "fetch the predictors again"
_MOST_LAYERS = 10_000
_LARGEST = torch.finfo(torch.float32).max
_EMBEDDED = "model.layers.{layer}.mlp.predictor."


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


Parts = Iterable[tuple[Path, str, object]]
"""What should be `fc1` and `fc2` of a layer: file and name for messages, and the value."""


def _imported(
    path: Path,
    origin: str,
    n_layers: int,
    read: Callable[[int], Parts],
    *,
    threshold: float = 0.0,
    statistics: Path | None = None,
) -> PredictorSource:
    """Return predictors that others made.

    Args:
        path: where they are.
        origin: what they came from, for their recipe.
        n_layers: layers.
        read: returns the parts of a layer.
        threshold: theirs.
        statistics: a directory in which there may be `activation/`.
    """
    if statistics is not None and not has_statistics(statistics, n_layers):
        statistics = None

    def layer(number: int) -> LayerPredictor:
        fc1, fc2 = (_half(*part) for part in read(number))
        counts = None if statistics is None else layer_statistics(statistics, number)
        return LayerPredictor(fc1, fc2, counts)

    return PredictorSource(
        path=path,
        n_layers=n_layers,
        threshold=threshold,
        recipe=json.dumps({"name": "imported", "from": origin}),
        layer=layer,
        counted=statistics is not None,
    )


def _count(present: Callable[[int], bool]) -> int:
    """Return how many layers are there, from the first on."""
    return next((n for n in range(_MOST_LAYERS) if not present(n)), _MOST_LAYERS)


def _half(file: Path, name: str, value: object) -> torch.Tensor:
    if not is_plain(value) or value.dim() != 2 or not value.is_floating_point():
        raise PredictorError(f"{file}: {name} is missing or no matrix", _FETCH)
    half = value.half()
    if not torch.isfinite(half).all():
        raise PredictorError(f"{file}: {name} does not fit float16", _FETCH)
    return half


def _from_directory(path: Path) -> PredictorSource:
    config = path / "config.json"
    values = read_json(config, PredictorError, _FETCH) if config.exists() else {}
    threshold = values.get("sparse_threshold", 0.0)
    plain = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not plain or not abs(threshold) <= _LARGEST:
        raise PredictorError(
            f"{config}: sparse_threshold is {repr(threshold)[:40]}, expected a number that fits "
            "float32",
            _FETCH,
        )

    def read(layer: int) -> Parts:
        file = _layer_file(path, layer)
        content = read_saved(file)
        if not isinstance(content, dict):
            raise PredictorError(f"{file}: expected fc1.weight and fc2.weight", _FETCH)
        _refuse_others(file, content)
        return [(file, name, content.get(name)) for name in _PARTS]

    return _imported(
        path,
        "PowerInfer predictor directory",
        _count(lambda layer: _layer_file(path, layer).is_file()),
        read,
        threshold=float(threshold),
        statistics=path.parent,
    )


def _refuse_others(where: Path, names: Iterable[object]) -> None:
    """Refuse what PowerInfer's predictors cannot hold, such as a bias."""
    others = sorted(map(str, set(names) - set(_PARTS)))
    if others:
        raise PredictorError(
            f"{where}: holds {', '.join(others[:5])} beside {' and '.join(_PARTS)}; PowerInfer's "
            "predictors have two matrices and no bias",
            "train predictors with psp train-predictor",
        )


def _from_checkpoint(path: Path) -> PredictorSource:
    """TurboSparse: `mlp.predictor.fc1` and `fc2` read the residual and keep logits above 0."""
    files = TensorFiles(path)
    n_layers = _count(lambda layer: _EMBEDDED.format(layer=layer) + _PARTS[0] in files.shards)
    if not n_layers:
        raise PredictorError(
            f"{path}: a checkpoint without predictors in it",
            "pass a directory made by 'psp train-predictor'",
        )

    def read(layer: int) -> Parts:
        prefix = _EMBEDDED.format(layer=layer)
        held = [name for name in files.shards if name.startswith(prefix)]
        _refuse_others(path, (name.removeprefix(prefix) for name in held))
        return (
            (path, n, files.read(n) if n in held else None) for n in map(prefix.__add__, _PARTS)
        )

    return _imported(path, "checkpoint", n_layers, read)


def _from_file(path: Path) -> PredictorSource:
    file = GGUFFile(path)
    n_layers = _count(lambda layer: FC1.format(layer=layer) in file.tensors)
    if not n_layers:
        raise PredictorError(f"{path}: holds no predictors (blk.N.fc1.weight)", "pass another file")
    threshold = file.optional(THRESHOLD_KEY, GGUFValueType.FLOAT32, 0.0)
    if not math.isfinite(threshold):
        raise file.error(f"{THRESHOLD_KEY} is {threshold}")

    def read(layer: int) -> Parts:
        prefix = FC1.format(layer=layer).removesuffix(_PARTS[0])
        held = (name.removeprefix(prefix) for name in file.tensors if name.startswith(prefix))
        _refuse_others(path, (name for name in held if name.startswith(("fc1.", "fc2."))))
        names = (name.format(layer=layer) for name in (FC1, FC2))
        return ((path, name, torch.tensor(file.tensor(name))) for name in names)

    return _imported(path, path.name, n_layers, read, threshold=threshold, statistics=path.parent)


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


def write_directories(predictors: PredictorSource, directory: Path, statistics: Path) -> None:
    """Write predictors as PowerInfer's own converters read them, and the counts that they have.

    Args:
        predictors: what to write.
        directory: takes `model_N.pt` and `config.json`.
        statistics: takes `activation_N.pt`, if the predictors come with counts.

    Raises:
        OutputError: the system refused a write.
    """
    for number in range(predictors.n_layers):
        layer = predictors.layer(number)
        _save(_layer_file(directory, number), {"fc1.weight": layer.fc1, "fc2.weight": layer.fc2})
        if predictors.counted:
            _save(statistics_file(statistics, number), layer.activation_counts)
    write_json(directory / "config.json", {"sparse_threshold": predictors.threshold})


def _layer_file(directory: Path, layer: int) -> Path:
    return directory / f"model_{layer}.pt"


def _save(file: Path, content: object) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(file, buffer.getvalue())
