"""The predictor directory beside a file, which other converters read and PowerInfer does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import PredictorError
from common.files import read_json
from powerinfer_bridge.doctor.finding import Finding, note, ok, warning

_SUFFIX = ".powerinfer.gguf"
_AGAIN = "export again"


@dataclass(frozen=True, kw_only=True)
class DirectoryFacts:
    """What the directory holds.

    Attributes:
        name: of the directory.
        layers: numbered `model_N.pt` without a gap, from 0 on; None if there is no directory.
        threshold: of its config.json; None without one.
    """

    name: str
    layers: int | None
    threshold: object = None


def read_directory(file: Path) -> DirectoryFacts:
    """Count files and read the threshold.

    Raises:
        PredictorError: a config.json that is no JSON object.
    """
    path = file.with_name(f"{file.name.removesuffix(_SUFFIX)}.predictors")
    if not path.is_dir():
        return DirectoryFacts(name=path.name, layers=None)
    names = {entry.name for entry in path.iterdir()}
    layers = next(n for n in range(len(names) + 1) if f"model_{n}.pt" not in names)
    config = {}
    if "config.json" in names:
        config = read_json(path / "config.json", PredictorError, _AGAIN)
    return DirectoryFacts(name=path.name, layers=layers, threshold=config.get("sparse_threshold"))


def directory_findings(facts: DirectoryFacts, n_layers: int, threshold: float) -> Iterator[Finding]:
    """Judge the directory against the file's layers and threshold."""
    if facts.layers is None:
        found = f"no {facts.name} beside the file; PowerInfer does not need it"
        yield note("predictors", found)
    elif facts.layers != n_layers:
        found = f"{facts.name} holds {facts.layers} layers, the file {n_layers}"
        yield warning("predictors", found, _AGAIN)
    elif not _same(facts.threshold, threshold):
        found = f"{facts.name} says threshold {facts.threshold}, the file {threshold:g}"
        yield warning("predictors", found, _AGAIN)
    else:
        yield ok("predictors", f"{facts.name}: {n_layers} layers, threshold {threshold:g}")


def _same(found: object, threshold: float) -> bool:
    """Compare as the file stores it, in float32."""
    number = isinstance(found, int | float) and not isinstance(found, bool)
    return number and bool(np.float32(str(found)) == np.float32(threshold))
