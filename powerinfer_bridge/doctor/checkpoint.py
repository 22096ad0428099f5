"""A model directory: whether psp knows it, and how large an export of it will be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from architectures.checkpoint import Checkpoint
from common.errors import CheckpointError, FormatError
from gguf_export.pwri.reader import GGUFFile
from powerinfer_bridge.doctor.finding import Finding, ok, size, warning

FINGERPRINT_KEY = "psp.model_fingerprint"
_F16_BYTES = 2
_SMALLEST_RANK = 32


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """A checkpoint that psp can use.

    Attributes:
        family: its architecture's name.
        activation: of its FFNs.
        n_layers: its blocks.
        d_model: its hidden size.
        d_ff: neurons of a layer.
        export_bytes: about what an F16 export writes.
        made_file: whether the file examined was made from it; None if that is not known.
    """

    family: str
    activation: str
    n_layers: int
    d_model: int
    d_ff: int
    export_bytes: int
    made_file: bool | None


def read_checkpoint(directory: Path, file: Path | None) -> CheckpointFacts:
    """Open a checkpoint; only a sample of its tensors is read.

    Args:
        directory: of a Hugging Face model; nothing is fetched.
        file: the exported file that is examined too, if there is one.

    Raises:
        CheckpointError: no such directory, an unsupported family, or damaged.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory", "pass a checkpoint's directory")
    found = Checkpoint.open(directory)
    return CheckpointFacts(
        family=found.architecture.name,
        activation=found.shape.activation,
        n_layers=found.shape.n_layers,
        d_model=found.shape.d_model,
        d_ff=found.shape.d_ff,
        export_bytes=_export_bytes(found),
        made_file=None if file is None else _made(found, file),
    )


def _export_bytes(checkpoint: Checkpoint) -> int:
    """Return about what an export takes: predictors of a usual rank are written twice."""
    shape, rules = checkpoint.shape, checkpoint.architecture.tensors
    numbers = sum(
        math.prod(rule.shape(shape)) * (shape.n_layers if rule.per_layer else 1) for rule in rules
    )
    rank = max(_SMALLEST_RANK, shape.d_model // 4)
    predictors = shape.n_layers * rank * (shape.d_model + shape.d_ff)
    return (numbers + 2 * predictors) * _F16_BYTES


def _made(checkpoint: Checkpoint, path: Path) -> bool | None:
    """Return whether a file says that it was made from a checkpoint; None if it does not say."""
    try:
        value = GGUFFile(path).values.get(FINGERPRINT_KEY)
    except FormatError:
        return None  # is a finding of its own
    return None if value is None else bool(value.data == checkpoint.fingerprint.encode())


def checkpoint_findings(facts: CheckpointFacts) -> Iterator[Finding]:
    """Describe a usable checkpoint, and tell whether the file is of it."""
    sizes = f"{facts.n_layers} layers, d_model {facts.d_model}, d_ff {facts.d_ff}"
    yield ok(
        "model",
        f"{facts.family}, {facts.activation}, {sizes}; F16 export about {size(facts.export_bytes)}",
    )
    if facts.made_file is False:
        found = "the file was made from another model than --model"
        yield warning("file's model", found, "pass the model that it was exported from")
    elif facts.made_file:
        yield ok("file's model", "the file was made from --model")
