"""The matrix that makes logits, as it is and as a file holds it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from architectures.checkpoint import Checkpoint
from common.errors import PredictorError
from common.rounding import to_q4_0

_HEAD, _NORM = "output.weight", "output_norm.weight"
_PART = 4096
_BATCH_NUMBERS = 1 << 23
_FAMILIES = ("llama", "smallthinker")
"""Models whose graph the second engine has; see `gguf_export.smallthinker.requirements`."""


def check_family(checkpoint: Checkpoint) -> None:
    """Refuse a model that the second engine has no graph for.

    Raises:
        PredictorError: naming the family.
    """
    family = checkpoint.architecture.gguf_name
    if family not in _FAMILIES:
        raise PredictorError(
            f"{checkpoint.path}: PowerInfer's second engine, which alone reads a head's predictor, "
            f"runs no {family} model",
            "pass a ReLU-gated LLaMA, Mistral or MiniCPM, or SmallThinker",
        )


def read_head(checkpoint: Checkpoint) -> torch.Tensor:
    """Return the head, (vocab_size, d_model) in its stored type, factors folded in."""
    return _read(checkpoint, _HEAD)


def _read(checkpoint: Checkpoint, target: str) -> torch.Tensor:
    rules = dict((name, rule) for rule, name in checkpoint.architecture.exported)
    return checkpoint.read(rules[target])


def head_digest(checkpoint: Checkpoint) -> str:
    """Return SHA-256 of the norm before the head and of the head, both in float16.

    `Checkpoint.fingerprint` looks at FFNs alone.
    """
    digest = hashlib.sha256()
    for target in (_NORM, _HEAD):
        for part in torch.split(_read(checkpoint, target), _PART):
            digest.update(part.half().contiguous().numpy().tobytes())
    return digest.hexdigest()


def exported_head(head: torch.Tensor, level: torch.Tensor | None) -> torch.Tensor:
    """Return a head as a Q4_0 file holds it, through float16: (vocab_size, d_model) float32.

    Args:
        head: (vocab_size, d_model), any floating type.
        level: (d_model,) float32, added to every row before; None adds nothing.
    """
    made = torch.empty(head.shape, dtype=torch.float32, device=head.device)
    for start in range(0, len(head), _PART):
        rows = head[start : start + _PART].float()
        rows = rows if level is None else rows + level
        made[start : start + _PART] = to_q4_0(rows.half().float())
    return made


def batches(rows: torch.Tensor, vocab_size: int) -> Iterator[torch.Tensor]:
    """Split (n,) row numbers so that a batch's logits are no more than 2^23 numbers, 32 MiB."""
    return iter(torch.split(rows, batch_rows(vocab_size)))


def batch_rows(vocab_size: int) -> int:
    """Return the rows of a batch."""
    return max(16, _BATCH_NUMBERS // vocab_size)
