"""The export bundle: the PWRI file and what PowerInfer expects beside it."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from architectures.checkpoint import Checkpoint
from architectures.spec import ModelShape
from common.errors import ExportError, PredictorError
from common.files import (
    atomic_directory,
    atomic_path,
    refuse_existing,
    remove_output,
    write_bytes,
    write_error,
    write_json,
)
from common.version import tool_version
from gguf_export.predictor_source import PredictorSource, open_predictors, read_ranks
from gguf_export.pwri.element_types import OUTTYPES, FileTypes, row_block
from gguf_export.pwri.gpu_index import index_path
from gguf_export.pwri.schema import (
    ACTIVATION_THRESHOLD_KEY,
    BLOCK,
    SMALLEST_D_FF,
    THRESHOLD_KEY,
)
from gguf_export.settings import SUFFIX, ExportConfig
from gguf_export.tensors import PlannedTensor, plan_model, plan_predictors
from gguf_export.tokens.model_vocabulary import read_vocabulary
from gguf_export.tokens.vocabulary import Vocabulary
from gguf_export.writer import write_file

Check = Callable[[Path], None]
"""Looks at the model file before it gets its name; raises if it must not get it."""

ACTIVATION_DIRECTORY = "activation"
"""PowerInfer looks for its statistics under this name beside the model file."""


@dataclass(frozen=True)
class Bundle:
    """Paths of an export.

    Attributes:
        model_file: the PWRI file.
        predictor_directory: `model_N.pt` and `config.json`, the form that PowerInfer's own
            converters read.
        activation_directory: `activation_N.pt`, hot/cold statistics; not there if imported
            predictors came without.
        warnings: what a user should know of the files, a line each.
    """

    model_file: Path
    predictor_directory: Path
    activation_directory: Path
    warnings: tuple[str, ...] = ()

    @classmethod
    def beside(cls, model_file: Path) -> Bundle:
        """Return the bundle of a model file."""
        stem = model_file.name.removesuffix(SUFFIX)
        return cls(
            model_file,
            model_file.with_name(f"{stem}.predictors"),
            model_file.with_name(ACTIVATION_DIRECTORY),
        )

    @property
    def dense_file(self) -> Path:
        """The dense file, which is only written on demand."""
        return self.model_file.with_name(f"{self.model_file.name.removesuffix(SUFFIX)}.dense.gguf")

    def document(self) -> dict[str, Any]:
        """Return the outputs that are there and the warnings, ready for JSON."""
        names = ("model_file", "predictor_directory", "activation_directory", "dense_file")
        paths = {name: getattr(self, name) for name in names}
        outputs = {name: str(path) for name, path in paths.items() if path.exists()}
        return {**outputs, "warnings": list(self.warnings)}


def export(config: ExportConfig, check: Check | None = None) -> Bundle:
    """Write the bundle under temporary names; the model file gets its name last.

    Args:
        config: what to write.
        check: looks at the model file before anything gets its name. If it raises, nothing does,
            and existing outputs stay as they are.

    Raises:
        PspError: the checkpoint or predictors are unusable or do not belong together, sizes that
            PowerInfer cannot run, existing outputs, or a refused write.
    """
    checkpoint = Checkpoint.open(config.model)
    predictors = open_predictors(config.predictors)
    _check_family(checkpoint, config.dense)
    ranks = check_fit(checkpoint, predictors)
    types = config.types
    check_rows(checkpoint.shape, types)
    check_precision(predictors, types)
    vocab_size = checkpoint.shape.vocab_size
    vocabulary = read_vocabulary(checkpoint.path, vocab_size, checkpoint.config)
    if config.vram_budget is not None and not predictors.counted:
        raise ExportError(
            f"{predictors.path}: comes without activation statistics, by which --vram-budget "
            "chooses neurons",
            "leave that out, or train predictors with psp train-predictor",
        )
    notes = (dense_note(checkpoint),) if config.dense else ()
    bundle = replace(Bundle.beside(config.out), warnings=(*vocabulary.warnings, *notes))
    _check_directory(bundle)
    refuse_existing(bundle.model_file, force=config.force)
    refuse_existing(bundle.predictor_directory, force=config.force, marker="config.json")
    refuse_existing(bundle.activation_directory, force=config.force, marker="activation_0.pt")
    refuse_existing(bundle.dense_file, force=config.force)
    refuse_existing(index_path(bundle.model_file), force=config.force)
    tensors = [
        *plan_model(checkpoint, sparse=True, types=types),
        *plan_predictors(predictors, ranks, checkpoint.shape, types),
    ]
    with (
        atomic_path(bundle.model_file) as model_file,
        _dense_path(bundle, config.dense) as dense_file,
        atomic_directory(bundle.predictor_directory) as predictor_directory,
        _activation_directory(bundle, predictors) as activation_directory,
    ):
        _write_predictors(predictor_directory, predictors)
        if activation_directory is not None:
            _write_activation(activation_directory, predictors)
        keys = _sparse_keys(checkpoint, predictors)
        _write(model_file, bundle.model_file, checkpoint, vocabulary, keys, tensors, types)
        if check is not None:
            check(model_file)
        if dense_file is not None:
            note: dict[str, float | str] = {"psp.note": dense_note(checkpoint)}
            dense = list(plan_model(checkpoint, sparse=False, types=types))
            _write(dense_file, bundle.dense_file, checkpoint, vocabulary, note, dense, types)
        _remove_stale(bundle, config)
    return bundle


def _remove_stale(bundle: Bundle, config: ExportConfig) -> None:
    """Remove what an earlier model left: its index, which PowerInfer would load, its dense file."""
    remove_output(index_path(bundle.model_file))
    if not config.dense:
        remove_output(bundle.dense_file)


@contextmanager
def _dense_path(bundle: Bundle, wanted: bool) -> Iterator[Path | None]:
    if not wanted:
        yield None
        return
    with atomic_path(bundle.dense_file) as path:
        yield path


@contextmanager
def _activation_directory(bundle: Bundle, predictors: PredictorSource) -> Iterator[Path | None]:
    """Yield where statistics go, or None without any; those of an earlier export go then."""
    if not predictors.counted:
        yield None
        remove_output(bundle.activation_directory)
        return
    with atomic_directory(bundle.activation_directory) as directory:
        yield directory


def _sparse_keys(checkpoint: Checkpoint, predictors: PredictorSource) -> dict[str, float | str]:
    return {
        THRESHOLD_KEY: predictors.threshold,
        ACTIVATION_THRESHOLD_KEY: checkpoint.shape.activation_threshold,
        "psp.recipe": predictors.recipe,
    }


def _write(
    path: Path,
    target: Path,
    checkpoint: Checkpoint,
    vocabulary: Vocabulary,
    keys: dict[str, float | str],
    tensors: list[PlannedTensor],
    types: FileTypes,
) -> None:
    """Write one of the two model files to `path`, whose final name `target` errors show."""
    try:
        write_file(
            path,
            architecture=checkpoint.architecture,
            model=checkpoint.shape,
            name=os.fsencode(checkpoint.path.resolve().name).decode("utf-8", "replace"),
            vocabulary=vocabulary,
            keys=keys | _provenance(checkpoint),
            tensors=tensors,
            types=types,
            sparse=THRESHOLD_KEY in keys,
        )
    except OSError as error:
        raise write_error(target, error) from error


def _provenance(checkpoint: Checkpoint) -> dict[str, str]:
    return {
        "psp.version": tool_version(),
        "psp.model_fingerprint": checkpoint.fingerprint,
        "psp.activation": checkpoint.shape.activation,
    }


def dense_note(checkpoint: Checkpoint) -> str:
    """Return what a user must know of a dense file."""
    note = checkpoint.architecture.dense_note
    assert note is not None, "refused before"
    return note


def _check_directory(bundle: Bundle) -> None:
    """Refuse to replace another model's statistics, whose name PowerInfer fixes.

    Raises:
        ExportError: another exported model lies in the directory.
    """
    directory = bundle.model_file.parent
    others = {path.name for path in directory.glob(f"*{SUFFIX}")} - {bundle.model_file.name}
    if others and bundle.activation_directory.exists():
        raise ExportError(
            f"{bundle.activation_directory}: belongs to {sorted(others)[0]}",
            "give every model a directory of its own",
        )


def _check_family(checkpoint: Checkpoint, dense: bool) -> None:
    """Refuse a sound model for which PowerInfer has no graph.

    Raises:
        ExportError: another context than the graph's, a head that the graph does not read, or a
            dense file that PowerInfer cannot run.
    """
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


def check_fit(checkpoint: Checkpoint, predictors: PredictorSource) -> list[int]:
    """Refuse predictors of another model and sizes that PowerInfer cannot run.

    Returns:
        The rank of every layer.

    Raises:
        PredictorError: incomplete, of another model, or with other shapes.
        ExportError: a row size that is no multiple of 32.
    """
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


def check_rows(shape: ModelShape, types: FileTypes) -> None:
    """Refuse sizes that do not go into the blocks of a type.

    Q4_0's hold for d_model, the row size of most matrices, and for d_ff: activations that multiply
    the down matrix are rounded in blocks too (ggml.c:ggml_compute_forward_mul_mat_axpy_q4_0).

    Raises:
        ExportError: a size that is no multiple of the block.
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


def check_precision(predictors: PredictorSource, types: FileTypes) -> None:
    """Refuse to round predictors whose units differ from a constant by little.

    Raises:
        ExportError: a coarse type for predictors that were trained for float16.
    """
    if types.predictors != "f16" and json.loads(predictors.recipe).get("start") == "constant":
        raise ExportError(
            f"{predictors.path}: was trained for float16, {types.predictors} would spoil it",
            f"pass --predictor-type f16, or train with --predictor-type {types.predictors}",
        )


def _write_tensor_file(path: Path, content: object) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getvalue())


def _write_predictors(directory: Path, predictors: PredictorSource) -> None:
    for number in range(predictors.n_layers):
        layer = predictors.layer(number)
        content = {"fc1.weight": layer.fc1, "fc2.weight": layer.fc2}
        _write_tensor_file(directory / f"model_{number}.pt", content)
    threshold = predictors.threshold
    write_json(directory / "config.json", {"sparse_threshold": threshold})


def _write_activation(directory: Path, predictors: PredictorSource) -> None:
    for number in range(predictors.n_layers):
        counts = predictors.layer(number).activation_counts
        _write_tensor_file(directory / f"activation_{number}.pt", counts)
