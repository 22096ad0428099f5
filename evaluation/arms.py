"""Arms: what answers, checked before anything is loaded and opened one after another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from architectures.checkpoint import Checkpoint
from architectures.model import OutOfMemory
from architectures.tokenizer import OwnTokenizer
from common.errors import PredictorError, SettingsError
from common.files import sha256
from evaluation.answers import file_name
from evaluation.backends.backend import Backend
from evaluation.backends.transformers_model import Placed, TransformersBackend, TransformersModel
from predictor.artifact import PredictorArtifact
from prosparse.activation import Opened, Setting, has_one_gate, open_any, shifted
from prosparse.sparsity import refuse_fatrelu
from results.evaluation import ArmKind

DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Something that answers.

    Attributes:
        name: for tables.
        kind: what it is.
        model: the checkpoint as the user named it; of a file's arm the first one.
        fatrelu: threshold of FATReLU in place of the checkpoint's own activation, 0 is ReLU; None
            keeps that.
        predictors: directory of predictors; None without.
        file: exported file; None for checkpoints.
        programs: directory of PowerInfer's programs; None for all others.
    """

    name: str
    kind: ArmKind
    model: str
    fatrelu: float | None = None
    predictors: Path | None = None
    file: Path | None = None
    programs: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ArmFacts:
    """What results say of an arm beside its name.

    Attributes:
        model_hash: fingerprint of the checkpoint, or XXH3-128 of the file.
        predictors_hash: SHA-256 over the predictors' weights; None without.
        threshold: of the predictors or of FATReLU; None without.
        element_type: in which it computes, or type of most of the file's bytes.
        device: where it runs.
    """

    model_hash: str
    predictors_hash: str | None = None
    threshold: float | None = None
    element_type: str
    device: str


@dataclass(frozen=True)
class CheckedModel:
    """A checkpoint that has been opened; nothing of its weights is loaded.

    Attributes:
        name: as the user named it.
        opened: the checkpoint.
    """

    name: str
    opened: Opened

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint."""
        return self.opened.checkpoint

    @cached_property
    def tokenizer(self) -> OwnTokenizer:
        """Its own tokenizer."""
        return self.checkpoint.tokenizer()


def check_model(name: str) -> CheckedModel:
    """Open a checkpoint of any activation.

    Raises:
        CheckpointError: it cannot be used.
    """
    return CheckedModel(name, open_any(name))


def fatrelu(model: CheckedModel, threshold: float) -> Setting:
    """Return FATReLU of a threshold for all layers of a model.

    Raises:
        SparsityError: its FFN has no one gate.
    """
    if not has_one_gate(model.checkpoint):
        refuse_fatrelu(model.checkpoint)
    return shifted((threshold,) * model.checkpoint.shape.n_layers)


def check_predictors(path: Path, model: CheckedModel) -> PredictorArtifact:
    """Open predictors and demand that they are a model's.

    Raises:
        PredictorError: damaged, unfinished, or another model's.
    """
    artifact = PredictorArtifact.open(path)
    artifact.require_complete()
    if artifact.header.model_fingerprint != model.checkpoint.fingerprint:
        raise PredictorError(
            f"{path}: are predictors of {artifact.header.model}, not of {model.name}",
            "pass predictors that were trained from traces of this model",
        )
    return artifact


@dataclass(frozen=True)
class _Read:
    placed: Placed
    digest: str


def _read(artifact: PredictorArtifact) -> _Read:
    """Read all layers' predictors as they are exported, and what tells them from others."""
    predictors, parts = {}, [str(artifact.header.threshold).encode()]
    for number in range(artifact.header.n_layers):
        layer = artifact.layer(number)
        predictors[number] = layer.predictor()
        parts += [layer.fc1.numpy().tobytes(), layer.fc2.numpy().tobytes()]
    return _Read(Placed(predictors, artifact.header.threshold), sha256(b"".join(parts)))


def _loaded(opened: Opened, device: str, dtype: torch.dtype | None) -> TransformersModel:
    try:
        return TransformersModel(opened, device=device, dtype=dtype)
    except OutOfMemory as error:
        remedy = "free some memory, or pass another --device or --dtype"
        raise OutOfMemory(error.problem, remedy) from error


class Arms:
    """The arms of an evaluation; one model is in memory at a time."""

    def __init__(
        self,
        arms: list[Arm],
        *,
        device: str,
        dtype: str,
        timeout: float = 3600.0,
    ) -> None:
        """Check all of them.

        Args:
            arms: the first is what the others are compared with.
            device: torch device or `auto`, of checkpoints.
            dtype: name of a type, or `auto`, of checkpoints.
            timeout: longest that PowerInfer may take for one answer or to load, seconds.

        Raises:
            PspError: one cannot be used, or two have the same name.
        """
        names = [arm.name for arm in arms]
        for name in names:
            if [file_name(each) for each in names].count(file_name(name)) > 1:
                raise SettingsError(f"two arms are named {name}", "rename a directory or a file")
        self.arms = arms
        self._device, self._timeout = device, timeout
        self._dtype = None if dtype == "auto" else getattr(torch, dtype)
        self._models = {name: check_model(name) for name in {arm.model: None for arm in arms}}
        self._predictors: dict[Path, PredictorArtifact] = {}
        self._loaded: tuple[str, TransformersModel] | None = None
        for arm in arms:
            self._check(arm)

    def _check(self, arm: Arm) -> None:
        model = self._models[arm.model]
        if arm.fatrelu is not None:
            fatrelu(model, arm.fatrelu)
        if arm.predictors is not None:
            self._predictors[arm.predictors] = check_predictors(arm.predictors, model)
        if arm.file is not None:
            from evaluation.backends.fit import check_fit

            check_fit(arm.file, model.checkpoint)
        if arm.programs is not None:
            from evaluation.backends.powerinfer import find_programs

            find_programs(arm.programs)

    @property
    def first(self) -> CheckedModel:
        """The model that gives the tokenizer and the context."""
        return self._models[self.arms[0].model]

    def model(self, arm: Arm) -> CheckedModel:
        """Return an arm's checkpoint."""
        return self._models[arm.model]

    @property
    def notes(self) -> Iterator[str]:
        """What a user may not expect of the checkpoints, in lines."""
        for model in self._models.values():
            yield from model.checkpoint.notes
            yield from model.tokenizer.notes

    def open(self, arm: Arm) -> tuple[Backend, ArmFacts]:
        """Load what an arm needs; a model that the last arm had stays.

        Raises:
            PspError: it cannot be loaded.
        """
        if arm.file is not None:
            self.close()
            return self._open_file(arm, arm.file)
        if self._loaded is None or self._loaded[0] != arm.model:
            self.close()
            opened = self._models[arm.model].opened
            loaded = _loaded(opened, self._device, self._dtype)
            self._loaded = arm.model, loaded
        model = self._loaded[1]
        read = None if arm.predictors is None else _read(self._predictors[arm.predictors])
        setting = model.own
        if arm.fatrelu is not None:
            setting = fatrelu(self._models[arm.model], arm.fatrelu)
        thresholds = set(setting.thresholds)
        threshold = thresholds.pop() if len(thresholds) == 1 else None
        facts = ArmFacts(
            model_hash=self._models[arm.model].checkpoint.fingerprint,
            predictors_hash=None if read is None else read.digest,
            threshold=threshold if read is None else read.placed.threshold,
            element_type=str(model.dtype).removeprefix("torch."),
            device=model.loaded.device,
        )
        placed = None if read is None else read.placed
        return TransformersBackend(model, setting, placed), facts

    def _open_file(self, arm: Arm, file: Path) -> tuple[Backend, ArmFacts]:
        from common.hashing import hash_file
        from evaluation.backends.embedded import EmbeddedBackend
        from evaluation.backends.powerinfer import PowerInferBackend
        from gguf_files.reader import GGUFFile
        from powerinfer_bridge.benchmark.beside import element_type

        backend: Any
        if arm.programs is None:
            backend = EmbeddedBackend(file)
        else:
            backend = PowerInferBackend(file, arm.programs, timeout=self._timeout)
        return backend, ArmFacts(
            model_hash=hash_file(file)[1],
            element_type=element_type(GGUFFile(file)),
            device="cpu",
        )

    def close(self) -> None:
        """Drop what is loaded."""
        self._loaded = None
