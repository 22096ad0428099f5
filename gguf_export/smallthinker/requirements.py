"""Which models are, written as one expert, models of arch `smallthinker`."""

from __future__ import annotations

from architectures.checkpoint import Checkpoint
from common.errors import ExportError
from gguf_files.names import SMALLTHINKER

_LACKS = {
    "bamboo": "its ReLU comes after the up projection too (dReLU), and an expert's only after the "
    "gate",
    "opt": "its FFN has no gate, and its positions are learned",
    "falcon": "its FFN has no gate, and it is computed beside attention",
}


def is_one_expert(checkpoint: Checkpoint) -> bool:
    """Whether a model's graph is that of one expert with a ReLU gate, FATReLU's shift aside."""
    return checkpoint.architecture.gguf_name == "llama"


def check_one_expert(checkpoint: Checkpoint, option: str) -> None:
    """Refuse a model that would be another one.

    Args:
        checkpoint: the model.
        option: that asked for it, for messages.

    Raises:
        ExportError: saying what the graph lacks.
    """
    if not is_one_expert(checkpoint):
        name = checkpoint.architecture.gguf_name
        raise ExportError(
            f"{option}: a {name} model is none of arch {SMALLTHINKER}, because {_LACKS[name]}",
            "only ReLU-gated LLaMA, Mistral and MiniCPM are",
        )


def shift_note(checkpoint: Checkpoint) -> str | None:
    """Return what such a file computes otherwise than its model, None if nothing."""
    shape = checkpoint.shape
    if not shape.activation_threshold:
        return None
    return (
        f"arch {SMALLTHINKER} computes ReLU: gates between 0 and {shape.activation_threshold:g}, "
        "which the model's FATReLU makes 0, count"
    )
