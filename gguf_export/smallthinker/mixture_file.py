"""Writing a file of a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from architectures.checkpoint import Checkpoint
from common.hashing import HashedFile
from gguf_export.plan import PlannedTensor
from gguf_export.smallthinker.head_predictor import with_head_predictor
from gguf_export.smallthinker.mixture import mixture_sizes, mixture_tensors
from gguf_export.smallthinker.types import ExpertTypes
from gguf_export.tokens.splitting import bos_keys, bos_note, splitting_note
from gguf_export.tokens.vocabulary import Vocabulary
from gguf_export.writer import ModelFile
from gguf_files.names import SMALLTHINKER
from predictor.head.artifact import HeadArtifact


def plan_mixture(
    checkpoint: Checkpoint, types: ExpertTypes, *, transposed: bool
) -> Iterator[PlannedTensor]:
    """Yield the tensors in their types; see `mixture.mixture_tensors`."""
    for each in mixture_tensors(checkpoint, transposed=transposed):
        yield PlannedTensor(each.name, each.shape, types.of(each.name, each.shape), each.read)


def mixture_notes(checkpoint: Checkpoint, vocabulary: Vocabulary) -> Iterator[str]:
    """Yield what a user should know of such a file, a line each."""
    for note in (splitting_note, bos_note):
        if (said := note(checkpoint, vocabulary)) is not None:
            yield said
    if checkpoint.shape.d_model == checkpoint.shape.d_ff:
        yield (
            "experts have as many neurons as d_model: PowerInfer's second engine takes down "
            "matrices for transposed, llama.cpp for not, and neither knows a file of the other"
        )


def write_mixture(
    checkpoint: Checkpoint,
    vocabulary: Vocabulary,
    types: ExpertTypes,
    path: Path,
    target: Path,
    *,
    transposed: bool,
    head: HeadArtifact | None = None,
) -> HashedFile:
    """Write the file; see `ModelFile.write` and `plan_mixture`.

    Args:
        checkpoint: the model.
        vocabulary: its tokenizer.
        types: of its elements.
        path: where to write it, a temporary name.
        target: its final name, for messages.
        transposed: see `plan_mixture`.
        head: the output head's predictor, which goes into the file.

    Returns:
        What was written, by the target's name.

    Raises:
        PspError: see `ModelFile.write`.
    """
    tensors = list(plan_mixture(checkpoint, types, transposed=transposed))
    if head is not None:
        tensors = list(with_head_predictor(tensors, head, checkpoint))
    file = ModelFile(checkpoint, vocabulary, SMALLTHINKER, mixture_sizes(checkpoint))
    return file.write(path, target, bos_keys(checkpoint, vocabulary), tensors)
