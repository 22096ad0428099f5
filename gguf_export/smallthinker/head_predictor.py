"""The head's predictor in a file for PowerInfer's second engine; see docs/head-predictor.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from gguf import GGMLQuantizationType

from architectures.checkpoint import Checkpoint
from common.errors import PredictorError
from common.head_sizes import misfit
from gguf_export.plan import PlannedTensor
from gguf_export.pwri.schema import HEAD
from gguf_files.names import PROFILER
from predictor.head.artifact import HeadArtifact
from predictor.head.output_head import head_digest, read_head


def open_head_predictor(path: Path, checkpoint: Checkpoint) -> HeadArtifact:
    """Open a head's predictor for an export.

    Args:
        path: from `psp train-predictor --head`.
        checkpoint: the model that is exported.

    Raises:
        PredictorError: damaged, of another model or head, or of sizes that the engine cannot take.
    """
    artifact = HeadArtifact.open(path)
    header, shape = artifact.header, checkpoint.shape
    if header.model_fingerprint != checkpoint.fingerprint:
        raise PredictorError(
            f"{path}: was made for another model ({header.model})", "pass a predictor of this one"
        )
    if header.head_sha256 != head_digest(checkpoint):
        raise PredictorError(
            f"{path}: was made for another output head or norm than {checkpoint.path} has",
            "train it again with 'psp train-predictor --head'",
        )
    if (problem := misfit(shape.d_model, shape.vocab_size, header.rank)) is not None:
        raise PredictorError(
            f"{path}: {problem}, so PowerInfer's second engine stops at the first single token",
            "leave --head-predictor out",
        )
    artifact.read()
    return artifact


def with_head_predictor(
    tensors: Iterable[PlannedTensor], artifact: HeadArtifact, checkpoint: Checkpoint
) -> Iterator[PlannedTensor]:
    """Yield a file's tensors with the predictor, and the head as it goes with that.

    The engine takes a head in Q4_0 only, and a head of its own, because the predictor's level is in
    it. What a GGUF model stores is not copied.

    Args:
        tensors: of `plan_expert` or `plan_mixture`.
        artifact: from `open_head_predictor`.
        checkpoint: the model.
    """
    kind, header = GGMLQuantizationType.Q4_0, artifact.header
    yield from (tensor for tensor in tensors if tensor.name != HEAD)
    read = partial(_levelled, checkpoint, artifact)
    yield PlannedTensor(HEAD, (header.vocab_size, header.d_model), kind, read)
    numbers = header.rank * (header.d_model + header.vocab_size)
    yield PlannedTensor(PROFILER, (1, numbers), kind, partial(_profiler, artifact))


def _levelled(checkpoint: Checkpoint, artifact: HeadArtifact) -> torch.Tensor:
    """Return the head with the level in every row, (vocab_size, d_model) float32."""
    return read_head(checkpoint).float() + artifact.read()[1]


def _profiler(artifact: HeadArtifact) -> torch.Tensor:
    """Return fc1 and, after it, fc2, (1, numbers) float32."""
    predictor = artifact.read()[0]
    return torch.cat([predictor.fc1.reshape(-1), predictor.fc2.reshape(-1)])[None]
