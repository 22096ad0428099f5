"""The export bundle: the PWRI file and what PowerInfer expects beside it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from architectures.checkpoint import Checkpoint
from architectures.registry import ARCHITECTURES
from architectures.tokenizer import load_sentencepiece
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
from gguf_export.gpu_index import index_path
from gguf_export.predictor_source import PredictorSource, open_predictors, read_ranks
from gguf_export.schema import (
    ACTIVATION_THRESHOLD_KEY,
    BLOCK,
    SMALLEST_D_FF,
    THRESHOLD_KEY,
)
from gguf_export.tensors import PlannedTensor, plan_model, plan_predictors
from gguf_export.vocabulary import Vocabulary, read_vocabulary
from gguf_export.writer import write_file

SUFFIX = ".powerinfer.gguf"
ACTIVATION_DIRECTORY = "activation"
"""PowerInfer looks for its statistics under this name beside the model file."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of an export.

    Attributes:
        model: checkpoint directory or hub id.
        predictors: see `predictor_source.open_predictors`.
        out: `NAME.powerinfer.gguf`.
        dense: write a dense file of the same model too, to time against.
        force: replace existing outputs.
    """

    model: str
    predictors: Path
    out: Path
    dense: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse names from which the bundle's other names could not be made."""
        if not self.out.name.endswith(SUFFIX) or self.out.name == SUFFIX:
            raise ExportError(f"--out {self.out}: expected a name that ends in {SUFFIX}")


@dataclass(frozen=True)
class Bundle:
    """Paths of an export.

    Attributes:
        model_file: the PWRI file.
        predictor_directory: `model_N.pt` and `config.json`, the form that PowerInfer's own
            converters read.
        activation_directory: `activation_N.pt`, hot/cold statistics; not there if imported
            predictors came without.
    """

    model_file: Path
    predictor_directory: Path
    activation_directory: Path

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

    def paths(self) -> tuple[Path, Path, Path]:
        """Return all outputs."""
        return self.model_file, self.predictor_directory, self.activation_directory


def export(config: ExportConfig) -> Bundle:
    """Write the bundle under temporary names; the model file gets its name last.

    Raises:
        PspError: the checkpoint or predictors are unusable or do not belong together, sizes that
            PowerInfer cannot run, existing outputs, or a refused write.
    """
    checkpoint = Checkpoint.open(config.model)
    predictors = open_predictors(config.predictors)
    _check_family(checkpoint)
    ranks = check_fit(checkpoint, predictors)
    vocab_size = checkpoint.shape.vocab_size
    vocabulary = read_vocabulary(load_sentencepiece(checkpoint.path, vocab_size), vocab_size)
    bundle = Bundle.beside(config.out)
    _check_directory(bundle)
    refuse_existing(bundle.model_file, force=config.force)
    refuse_existing(bundle.predictor_directory, force=config.force, marker="config.json")
    refuse_existing(bundle.activation_directory, force=config.force, marker="activation_0.pt")
    if config.dense:
        refuse_existing(bundle.dense_file, force=config.force)
    # PowerInfer would load the index of an earlier model without a look at its sizes.
    stale = index_path(bundle.model_file)
    refuse_existing(stale, force=config.force)
    tensors = [
        *plan_model(checkpoint, sparse=True),
        *plan_predictors(predictors, ranks, checkpoint.shape),
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
        _write(model_file, bundle.model_file, checkpoint, vocabulary, keys, tensors)
        if dense_file is not None:
            note: dict[str, float | str] = {"psp.note": dense_note(checkpoint)}
            dense = list(plan_model(checkpoint, sparse=False))
            _write(dense_file, bundle.dense_file, checkpoint, vocabulary, note, dense)
        remove_output(stale)
    return bundle


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
) -> None:
    """Write one of the two model files to `path`, whose final name `target` errors show."""
    try:
        write_file(
            path,
            architecture=checkpoint.architecture,
            model=checkpoint.shape,
            name=checkpoint.path.resolve().name,
            vocabulary=vocabulary,
            keys=keys | _provenance(checkpoint),
            tensors=tensors,
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
    """Return what a user must know of a dense file (PowerInfer@d3ebd7c build_llama_variants)."""
    if checkpoint.architecture.gguf_name == "bamboo":
        return "dense file for timing; PowerInfer computes dReLU, other programs may not"
    return (
        "dense file for timing only: llama.cpp and PowerInfer compute SiLU for arch llama in dense "
        "mode, so the text of this ReLU model is wrong"
    )


def _check_directory(bundle: Bundle) -> None:
    """Refuse to replace another model's statistics, whose name PowerInfer fixes.

    Raises:
        ExportError: another exported model lies in the directory.
    """
    directory = bundle.model_file.parent
    others = {path.name for path in directory.glob(f"*{SUFFIX}")} - {bundle.model_file.name}
    if others and bundle.activation_directory.exists():
        raise ExportError(
            f"{bundle.activation_directory}: belongs to {sorted(others)[0]}; "
            "give every model a directory of its own"
        )


def _check_family(checkpoint: Checkpoint) -> None:
    if checkpoint.architecture.gguf_name is None:
        families = sorted({family.name for family in ARCHITECTURES if family.gguf_name})
        raise ExportError(
            f"{checkpoint.path}: family {checkpoint.architecture.name} cannot be exported yet; "
            f"those that can: {', '.join(families)}"
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
            f"{shape.n_layers}; pass predictors of this model"
        )
    ranks = read_ranks(predictors, shape.d_model, shape.d_ff)
    if predictors.model is not None and predictors.model[1] != checkpoint.fingerprint:
        raise PredictorError(
            f"{predictors.path}: predictors were trained for {predictors.model[0]}, whose weights "
            f"or sizes differ from {checkpoint.path}; pass that model or collect and train for "
            "this one"
        )
    if shape.d_ff < SMALLEST_D_FF:
        raise ExportError(
            f"d_ff {shape.d_ff} is below {SMALLEST_D_FF}; PowerInfer computes smaller FFNs wrongly"
        )
    if shape.d_model != shape.n_heads * shape.head_dim:
        raise ExportError("heads times head size differ from d_model; PowerInfer cannot run it")
    for key, size in (("d_model", shape.d_model), *(("rank", rank) for rank in ranks)):
        if size % BLOCK or not size:
            raise ExportError(f"{key} {size} is no multiple of {BLOCK}; PowerInfer cannot run it")
    return ranks


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
