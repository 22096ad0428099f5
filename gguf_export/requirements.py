"""What a model, its predictors and the element types must be for PowerInfer to run their file."""

from __future__ import annotations

import json

from architectures.checkpoint import Checkpoint
from architectures.spec import ModelShape
from common.errors import ExportError, PredictorError
from gguf_export.predictor_source import PredictorSource, read_ranks
from gguf_export.pwri.element_types import OUTTYPES, FileTypes, row_block
from gguf_export.pwri.schema import BLOCK, SMALLEST_D_FF
from gguf_export.settings import ExportConfig


def check_requirements(
    config: ExportConfig, checkpoint: Checkpoint, predictors: PredictorSource
) -> list[int]:
    """Refuse what PowerInfer could not run, before anything is written.

    Returns:
        The rank of every layer's predictor.

    Raises:
        PredictorError: predictors that are incomplete, of another model, or with other shapes.
        ExportError: a family, sizes or types that PowerInfer has no graph or kernels for; no
            statistics to split neurons by.
    """
    _check_family(checkpoint, config.dense)
    ranks = _check_fit(checkpoint, predictors)
    _check_rows(checkpoint.shape, config.types)
    _check_precision(predictors, config.types)
    if config.vram_budget is not None and not predictors.counted:
        raise ExportError(
            f"{predictors.path}: comes without activation statistics, by which --vram-budget "
            "chooses neurons",
            "leave that out, or train predictors with psp train-predictor",
        )
    return ranks


def _check_family(checkpoint: Checkpoint, dense: bool) -> None:
    """Refuse a sound model for which PowerInfer has no graph."""
    family, shape = checkpoint.architecture, checkpoint.shape
    if family.context_length not in (None, shape.context_length):
        raise ExportError(
            f"{checkpoint.path}: context of {shape.context_length} tokens",
            f"PowerInfer's {family.gguf_name} graph has exactly {family.context_length} positions",
        )
    for rule in family.tensors:
        if rule.target is None and not shape.tied_embeddings:
            raise ExportError(
                f"{checkpoint.path}: {rule.source} is not tied to {rule.tied_to}, which is the "
                f"only head in PowerInfer's {family.gguf_name} graph",
                "tie_word_embeddings must be true",
            )
    if dense and family.dense_note is None:
        raise ExportError(
            f"--dense: PowerInfer cannot run a dense {family.gguf_name} file, because its graph "
            "reads a tensor that its loader never makes",
            "leave --dense out",
        )


def _check_fit(checkpoint: Checkpoint, predictors: PredictorSource) -> list[int]:
    """Refuse predictors of another model and sizes that PowerInfer cannot run; give the ranks."""
    shape = checkpoint.shape
    if predictors.n_layers != shape.n_layers:
        raise PredictorError(
            f"{predictors.path}: predictors have {predictors.n_layers} layers, the model has "
            f"{shape.n_layers}",
            "pass predictors of this model",
        )
    ranks = read_ranks(predictors, shape.d_model, shape.d_ff)
    if predictors.model is not None and predictors.model[1] != checkpoint.fingerprint:
        raise PredictorError(
            f"{predictors.path}: predictors were trained for {predictors.model[0]}, whose weights "
            f"or sizes differ from {checkpoint.path}",
            "pass that model or collect and train for this one",
        )
    if shape.d_ff < SMALLEST_D_FF:
        raise ExportError(
            f"d_ff {shape.d_ff} is below {SMALLEST_D_FF}",
            "PowerInfer computes smaller FFNs wrongly",
        )
    if shape.d_model != shape.n_heads * shape.head_dim:
        raise ExportError("heads times head size differ from d_model", "PowerInfer cannot run it")
    for key, size in (("d_model", shape.d_model), *(("rank", rank) for rank in ranks)):
        if size % BLOCK or not size:
            raise ExportError(f"{key} {size} is no multiple of {BLOCK}", "PowerInfer cannot run it")
    return ranks


def _check_rows(shape: ModelShape, types: FileTypes) -> None:
    """Refuse sizes that do not go into the blocks of a type.

    Q4_0's hold for d_model, the row size of most matrices, and for d_ff: activations that multiply
    the down matrix are rounded in blocks too (ggml.c:ggml_compute_forward_mul_mat_axpy_q4_0).
    """
    for key, option, name in (
        ("d_model", "outtype", types.weights),
        ("d_ff", "outtype", types.weights),
        ("d_model", "predictor-type", types.predictors),
    ):
        size, block = getattr(shape, key), row_block(OUTTYPES[name])
        if name == "q4_0" and size % block:
            raise ExportError(
                f"{key} {size} is no multiple of {block}, as --{option} q4_0 needs", "choose f16"
            )


def _check_precision(predictors: PredictorSource, types: FileTypes) -> None:
    """Refuse to round predictors whose units differ from a constant by little."""
    if types.predictors != "f16" and json.loads(predictors.recipe).get("start") == "constant":
        raise ExportError(
            f"{predictors.path}: was trained for float16, {types.predictors} would spoil it",
            f"pass --predictor-type f16, or train with --predictor-type {types.predictors}",
        )
