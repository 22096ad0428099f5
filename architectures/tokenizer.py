"""The checkpoint's own tokenizer: SentencePiece with byte fallback, read by the library itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import CheckpointError

if TYPE_CHECKING:
    import sentencepiece


def load_tokenizer(path: Path, vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    """Load `tokenizer.model` from a checkpoint's directory.

    Args:
        path: the directory.
        vocab_size: rows of the model's embedding, at least as many as there are pieces.

    Raises:
        CheckpointError: the file is missing, damaged, has no begin-of-sequence piece or more
            pieces than the model has rows.
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
        raise CheckpointError(
            f"{file}: has no BOS piece, which PowerInfer needs; use another tokenizer.model"
        )
    if tokenizer.vocab_size() > vocab_size:
        raise CheckpointError(
            f"{file}: has {tokenizer.vocab_size()} pieces, the model {vocab_size} rows; "
            "use the model's own tokenizer.model"
        )
    return tokenizer
