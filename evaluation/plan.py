"""Which arms settings ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evaluation.arms import DENSE, Arm
from evaluation.settings import EvaluateConfig


def arms_of(config: EvaluateConfig) -> list[Arm]:
    """Return the arms that settings ask for; the first checkpoint as it is comes first."""
    first = config.model[0]
    arms = [Arm(name=DENSE, kind="dense", model=first)]
    for threshold in config.thresholds:
        name = f"fatrelu_{threshold:g}" if threshold else "relu"
        arms.append(Arm(name=name, kind="fatrelu", model=first, fatrelu=threshold))
    for path in config.predictors:
        name = _name("predictors", path, config.predictors)
        arms.append(Arm(name=name, kind="predictors", model=first, predictors=path))
    arms += [Arm(name=_last(name), kind="dense", model=name) for name in config.model[1:]]
    for path in config.gguf:
        name = _name("engine", path, config.gguf)
        arms.append(Arm(name=name, kind="engine", model=first, file=path))
        if config.powerinfer_bin is not None:
            name, programs = _name("powerinfer", path, config.gguf), config.powerinfer_bin
            arm = Arm(name=name, kind="powerinfer", model=first, file=path, programs=programs)
            arms.append(arm)
    return arms


def _name(kind: str, path: Path, every: Sequence[Path]) -> str:
    return kind if len(every) == 1 else f"{kind} {_last(str(path))}"


def _last(name: str) -> str:
    """Return the last part of a model's or file's name, without the ending of a file."""
    return Path(name).name.removesuffix(".gguf").removesuffix(".powerinfer") or name
