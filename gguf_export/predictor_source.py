"""Predictors of a whole model as an export takes them, and the directory that it writes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from architectures.spec import ModelShape
from common.element_types import F16
from common.errors import PredictorError
from common.files import write_json
from common.hashing import HashedFile
from gguf_export.pwri.schema import BLOCK, DENSE_THRESHOLD
from gguf_export.pwri.statistics import statistics_file, write_saved
from gguf_files.reader import GGUFFile
from predictor.stored import LayerPredictor

NO_PREDICTORS = Path("none")
"""What a user passes for a file that computes every neuron."""


@dataclass(frozen=True, kw_only=True)
class PredictorSource:
    """Predictors of a whole model, read layer by layer.

    Attributes:
        path: directory or file, or `none`.
        n_layers: layers.
        threshold: a neuron is computed unless its logit is below this.
        recipe: how they were made, as JSON.
        layer: reads one layer.
        counted: whether every layer comes with activation counts.
        model: the model that they were made for and its fingerprint, where that is known.
        file: the file that holds them, from which they are copied as they are stored.
        model_files: the weights of that model, where they are known.
        kinds: type of each layer where they are stored in what they were trained for, from which
            they are copied; None where an export is free to choose.
        outtype: type of the model for which their bound was measured; None if there is none.
        dense: numbers of the dense layers, see `predictor.dense_layer`.
    """

    path: Path
    n_layers: int
    threshold: float
    recipe: str
    layer: Callable[[int], LayerPredictor]
    counted: bool = True
    model: tuple[str, str] | None = None
    file: GGUFFile | None = None
    model_files: tuple[HashedFile, ...] = ()
    kinds: tuple[str, ...] | None = None
    outtype: str | None = None
    dense: tuple[int, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether they skip no neuron, as `no_predictors`."""
        return self.threshold <= DENSE_THRESHOLD


def no_predictors(model: ModelShape) -> PredictorSource:
    """Return what PowerInfer needs in place of predictors: zeros, and a threshold below all logits.

    A sparse file without `fc1` and `fc2` it refuses, and densely it computes SiLU for arch llama.
    """
    fc1, fc2 = torch.zeros(BLOCK, model.d_model), torch.zeros(model.d_ff, BLOCK)
    zeros = LayerPredictor(fc1.half(), fc2.half(), None)
    return PredictorSource(
        path=NO_PREDICTORS,
        n_layers=model.n_layers,
        threshold=DENSE_THRESHOLD,
        recipe=json.dumps({"name": str(NO_PREDICTORS)}),
        layer=lambda number: zeros,
        counted=False,
    )


def read_ranks(predictors: PredictorSource, d_model: int, d_ff: int) -> list[int]:
    """Read every layer once, check its shapes and return the ranks.

    Raises:
        PredictorError: a layer that is damaged or does not fit the model.
    """
    ranks = []
    for number in range(predictors.n_layers):
        layer = predictors.layer(number)
        rank, (fc1, fc2) = layer.rank, layer.shapes
        counts = d_ff if layer.activation_counts is None else len(layer.activation_counts)
        if (fc1, fc2, counts) != ((rank, d_model), (d_ff, rank), d_ff):
            raise PredictorError(
                f"{predictors.path}: layer {number} has fc1 {fc1} and fc2 {fc2}, the model needs "
                f"(rank, {d_model}) and ({d_ff}, rank)",
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
        # Numbers of Q4_0 have more digits than float16.
        fc1, fc2 = (layer.fc1, layer.fc2) if layer.kind == F16 else layer.numbers()
        write_saved(predictor_file(directory, number), {"fc1.weight": fc1, "fc2.weight": fc2})
        if predictors.counted:
            write_saved(statistics_file(statistics, number), layer.activation_counts)
    write_json(directory / "config.json", {"sparse_threshold": predictors.threshold})


def predictor_file(directory: Path, layer: int) -> Path:
    """Return the file of a layer in PowerInfer's own form."""
    return directory / f"model_{layer}.pt"
