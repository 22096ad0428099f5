"""Predictors of every kind: our own artifact, PowerInfer's directory, a checkpoint's, a file's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from gguf import GGUFValueType

from architectures.spec import ModelShape
from architectures.tensor_files import TensorFiles, is_plain
from common.element_types import F16
from common.errors import PredictorError
from common.files import read_json
from gguf_export.predictor_source import (
    NO_PREDICTORS,
    PredictorSource,
    no_predictors,
    predictor_file,
)
from gguf_export.pwri.dense_layers import dense_layers
from gguf_export.pwri.element_types import check_predictor_types
from gguf_export.pwri.schema import FC1, FC2, THRESHOLD_KEY
from gguf_export.pwri.statistics import has_statistics, layer_statistics, read_saved
from gguf_files.names import FINGERPRINT_KEY, RECIPE_KEY
from gguf_files.reader import GGUFFile
from gguf_files.split_set import open_gguf
from predictor.artifact import PredictorArtifact
from predictor.stored import LayerPredictor

_PARTS = ("fc1.weight", "fc2.weight")
_FETCH = "fetch the predictors again"
_MOST_LAYERS = 10_000
_LARGEST = torch.finfo(torch.float32).max
_EMBEDDED = "model.layers.{layer}.mlp.predictor."


def open_predictors(path: Path, model: ModelShape | None = None) -> PredictorSource:
    """Open predictors of any kind; only sizes and settings are read.

    Args:
        path: directory from `psp train-predictor`; directory with `model_N.pt` and `config.json` as
            PowerInfer's converters read it; a GGUF file with predictors in it; or a checkpoint that
            has some, as TurboSparse's do. For the middle two `activation/activation_N.pt` beside
            them is read where it is there. Or `none`: every neuron is computed.
        model: sizes of the model, which `none` needs.

    Raises:
        PredictorError: none of these, damaged or incomplete.
        FormatError: a damaged GGUF file.
    """
    if path == NO_PREDICTORS and model is not None:
        return no_predictors(model)
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
        model_files=artifact.model_files,
        kinds=_kinds(artifact),
        outtype=header.outtype if header.own_thresholds else None,
        dense=tuple(sorted(artifact.dense)),
    )


def _kinds(artifact: PredictorArtifact) -> tuple[str, ...] | None:
    """Return the type of each layer; None if all are float16 and have no bound to keep."""
    kinds = tuple(artifact.exported_size(layer).kind for layer in range(artifact.header.n_layers))
    return kinds if artifact.header.own_thresholds or set(kinds) != {F16} else None


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
        file = predictor_file(path, layer)
        content = read_saved(file)
        if not isinstance(content, dict):
            raise PredictorError(f"{file}: expected fc1.weight and fc2.weight", _FETCH)
        _refuse_others(file, content)
        return [(file, name, content.get(name)) for name in _PARTS]

    return _imported(
        path,
        "PowerInfer predictor directory",
        _count(lambda layer: predictor_file(path, layer).is_file()),
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
    file = open_gguf(path)
    n_layers = _count(lambda layer: FC1.format(layer=layer) in file.tensors)
    if not n_layers:
        raise PredictorError(
            f"{path}: holds no predictors (blk.N.fc1.weight)",
            "pass another file, or --predictors none to compute every neuron",
        )
    threshold = file.optional(THRESHOLD_KEY, GGUFValueType.FLOAT32, 0.0)
    if not math.isfinite(threshold):
        raise file.error(f"{THRESHOLD_KEY} is {threshold}")
    check_predictor_types(file)

    def read(layer: int) -> Parts:
        prefix = FC1.format(layer=layer).removesuffix(_PARTS[0])
        held = (name.removeprefix(prefix) for name in file.tensors if name.startswith(prefix))
        _refuse_others(path, (name for name in held if name.startswith(("fc1.", "fc2."))))
        names = (name.format(layer=layer) for name in (FC1, FC2))
        return ((path, name, torch.tensor(file.tensor(name))) for name in names)

    found = _imported(path, path.name, n_layers, read, threshold=threshold, statistics=path.parent)
    return replace(
        found,
        file=file,
        recipe=file.optional(RECIPE_KEY, GGUFValueType.STRING, found.recipe),
        model=_made_for(file),
        dense=dense_layers(file),
    )


def _made_for(file: GGUFFile) -> tuple[str, str] | None:
    """Return the model of a file that psp made, the only one that its predictors are for."""
    fingerprint = file.optional(FINGERPRINT_KEY, GGUFValueType.STRING, None)
    name = file.optional("general.name", GGUFValueType.STRING, "another model")
    return None if fingerprint is None else (name, fingerprint)
