"""The checkpoint's own tokenizer: SentencePiece with byte fallback, read by the library itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import CheckpointError

if TYPE_CHECKING:
    import sentencepiece


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Load `tokenizer.model` from a checkpoint's directory.

    Raises:
        CheckpointError: the file is missing, damaged or has no begin-of-sequence piece.
    """
    import sentencepiece

    file = path / "tokenizer.model"
    if not file.is_file():
        raise CheckpointError(
            f"{file}: not found; psp needs the model's SentencePiece tokenizer.model"
        )
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: not a SentencePiece model; fetch the checkpoint again"
        ) from error
    if tokenizer.bos_id() < 0:
        raise CheckpointError(f"{file}: has no BOS piece, which PowerInfer puts before every text")
    return tokenizer
