"""Element types that predictors were trained for, which an export follows."""

from __future__ import annotations

from dataclasses import replace

from architectures.checkpoint import Checkpoint
from architectures.rounded import own_type
from common.errors import ExportError
from gguf_export.plan import keeps_types
from gguf_export.predictor_source import PredictorSource
from gguf_export.pwri.element_types import FileTypes, intended_type, recipe_allows
from gguf_export.settings import ExportConfig


def following(
    config: ExportConfig, checkpoint: Checkpoint, predictors: PredictorSource
) -> ExportConfig:
    """Return settings with the model's type that predictors were trained for, if none is given.

    Raises:
        ExportError: another type is asked for than the one in which predictors keep their bound.
    """
    _check_precision(config, predictors)
    wanted = predictors.outtype
    if wanted is None:
        return config
    if config.outtype is not None and config.outtype != wanted:
        raise ExportError(
            f"{predictors.path}: keeps its bound for a model in {wanted}, not in {config.outtype}",
            f"leave --outtype out, or first choose thresholds again: psp train-predictor ... "
            f"--resume --outtype {config.outtype}",
        )
    if config.outtype is None and own_type(checkpoint) != wanted:
        return replace(config, outtype=wanted)
    return config


def _check_precision(config: ExportConfig, predictors: PredictorSource) -> None:
    """Refuse to store predictors in another type than they were trained for."""
    types = config.types
    if keeps_types(predictors, types):
        return
    trained = sorted(set(predictors.kinds or ()))
    if types.predictors_chosen and trained not in ([], [types.predictors]):
        raise ExportError(
            f"{predictors.path}: was trained for {' and '.join(trained)}, not {types.predictors}",
            f"leave --predictor-type out, or train with --predictor-type {types.predictors}",
        )
    if predictors.kinds is None and not recipe_allows(predictors.recipe, types.predictors):
        raise ExportError(
            f"{predictors.path}: was trained for float16, {types.predictors} would spoil it",
            f"pass --predictor-type f16, or train with --predictor-type {types.predictors}",
        )


def predictor_types(predictors: PredictorSource, types: FileTypes) -> str | None:
    """Return what a file says of its predictors' types, such as `q4_0`, or one for each layer.

    None where predictors are copied out of a file that does not say it.
    """
    if keeps_types(predictors, types):
        assert predictors.file is not None
        return intended_type(predictors.file)
    if predictors.kinds is None:
        return types.predictors
    kinds = set(predictors.kinds)
    return ",".join(predictors.kinds) if len(kinds) > 1 else kinds.pop()
