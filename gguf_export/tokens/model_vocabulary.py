"""The vocabulary of a checkpoint for PowerInfer, and how far its ids are the model's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from architectures.tokenizer import RustTokenizer, Tokenizer, load_sentencepiece, load_tokenizer
from common.errors import ExportError
from gguf_export.tokens.added_tokens import TokenizerFiles
from gguf_export.tokens.byte_level_encoder import ByteLevelEncoder
from gguf_export.tokens.byte_level_vocabulary import read_byte_level
from gguf_export.tokens.json_tokenizer import JsonTokenizer
from gguf_export.tokens.mixed_texts import share_differing
from gguf_export.tokens.piece_encoder import PieceEncoder
from gguf_export.tokens.ranked_vocabulary import read_ranked
from gguf_export.tokens.sentencepiece_vocabulary import read_sentencepiece
from gguf_export.tokens.vocabulary import BYTE_LEVEL, NONE, Vocabulary, vocabulary_problems


def read_vocabulary(path: Path, vocab_size: int, config: Mapping[str, Any] = {}) -> Vocabulary:
    """Read a checkpoint's tokenizer: tokenizer.model, tokenizer.json or vocab.json and merges.txt.

    Args:
        path: the checkpoint's directory.
        vocab_size: rows of the model's embedding; more than there are tokens are padded.
        config: its config.json.

    Returns:
        The vocabulary, with a warning for each way in which PowerInfer's ids will differ from the
        model's own, and the share that does on texts of many kinds.

    Raises:
        CheckpointError: no tokenizer or a damaged one.
        ExportError: one that PowerInfer cannot follow or would stop at.
    """
    tokenizer = load_tokenizer(path, vocab_size, config)
    files = TokenizerFiles(path, config)
    if isinstance(tokenizer, RustTokenizer):
        file = tokenizer.file
        source = JsonTokenizer(file, tokenizer.document())
        source.check()
        read = read_byte_level if source.byte_level else read_ranked
        vocabulary = read(source, tokenizer, files, vocab_size)
    else:
        file = path / "tokenizer.model"
        pieces = load_sentencepiece(path, vocab_size)
        vocabulary = read_sentencepiece(file, pieces, files, vocab_size)
    problem = next(vocabulary_problems(vocabulary), None)
    if problem is not None:
        raise ExportError(f"{file}: {problem}", "PowerInfer needs it, use another tokenizer")
    return _measured(vocabulary, tokenizer)


def text_encoder(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """Return PowerInfer's encoding of whole texts, without BOS, as its `perplexity` does it."""
    if vocabulary.kind == BYTE_LEVEL:
        return ByteLevelEncoder(vocabulary.ids, vocabulary.merges).encode
    encoder = PieceEncoder(vocabulary.ids, vocabulary.scores)
    return lambda text: encoder.encode(f" {text}".encode()) if text else []


def _measured(vocabulary: Vocabulary, tokenizer: Tokenizer) -> Vocabulary:
    """Add the share of ids that differ, on texts of many kinds."""
    share = share_differing(text_encoder(vocabulary), tokenizer.encode)
    reasons, warnings = list(vocabulary.differences), list(vocabulary.warnings)
    if share and not reasons:
        reasons = ["PowerInfer's ids differ from those of the model's tokenizer"]
    if reasons:
        said = f"{share:.2%} of the ids of texts of many kinds differ from the model's tokenizer"
        warnings = [*reasons, said, *warnings]
    if vocabulary.eos_id == NONE:
        default = 11 if vocabulary.kind == BYTE_LEVEL else 2
        warnings.append(
            f"no end-of-sequence id is known, PowerInfer takes {default}; add it to config.json"
        )
    return replace(vocabulary, differences=tuple(reasons), warnings=tuple(warnings))
