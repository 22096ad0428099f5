"""A SentencePiece model from a file's pieces, scores and types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFValueType, TokenType

from architectures.gguf_model.tokenizer_files import FileVocabulary

FILE = "tokenizer.model"


def write(vocabulary: FileVocabulary, directory: Path) -> dict[str, Any]:
    """Write `tokenizer.model`.

    Types of GGUF are SentencePiece's. The normaliser is LLaMA's: spaces become U+2581, nothing else
    changes, and a text begins with one unless the file says otherwise.

    Returns:
        What tokenizer_config.json says of it.

    Raises:
        CheckpointError: scores are missing, or not one piece stands for what is unknown.
        FormatError: scores of another type.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    file, prefix = vocabulary.file, vocabulary.flag("add_space_prefix", True)
    scores = file.value("tokenizer.ggml.scores", GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
    if len(scores) != len(vocabulary.tokens):
        raise vocabulary.error(f"{len(vocabulary.tokens)} tokens have {len(scores)} scores")
    unknown = vocabulary.types.count(TokenType.UNKNOWN)
    if unknown != 1:
        raise vocabulary.error(f"{unknown} tokens are of type UNKNOWN, expected 1")
    rows = zip(vocabulary.tokens, scores.tolist(), vocabulary.types, strict=True)
    for piece, score, kind in rows:
        if kind not in sentencepiece_model_pb2.ModelProto.SentencePiece.Type.values():
            raise vocabulary.error(f"token {piece!r} has unknown type {kind}")
        model.pieces.add(piece=piece, score=score, type=kind)
    special = vocabulary.special
    model.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(vocabulary.tokens)
    model.trainer_spec.byte_fallback = TokenType.BYTE in vocabulary.types
    for name in ("bos", "eos", "unk", "pad"):
        number = special.get(name, -1)
        setattr(model.trainer_spec, f"{name}_id", number)
        if number >= 0:
            setattr(model.trainer_spec, f"{name}_piece", vocabulary.tokens[number])
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    (directory / FILE).write_bytes(model.SerializeToString())
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": vocabulary.flag("add_bos_token", True),
        "add_eos_token": vocabulary.flag("add_eos_token", False),
        "add_prefix_space": prefix,
        "legacy": True,
    }
