"""What llama.cpp must be told of a tokenizer and PowerInfer does not ask: splitting, templates."""

from __future__ import annotations

from architectures.checkpoint import Checkpoint
from architectures.gguf_model.byte_level import splits_like
from architectures.gguf_model.source import GGUFSource
from architectures.rust_tokenizer import RustTokenizer
from architectures.tokenizer import chat_template_of
from gguf_export.tokens.model_vocabulary import MIXED_TEXTS
from gguf_export.tokens.vocabulary import BYTE_LEVEL, Vocabulary

PRE_KEY = "tokenizer.ggml.pre"
TEMPLATE_KEY = "tokenizer.chat_template"


def splitting_keys(checkpoint: Checkpoint, vocabulary: Vocabulary) -> dict[str, float | str]:
    """Return the keys; a GGUF model's own are copied with all others, and not among them."""
    origin, keys = checkpoint.origin, dict[str, float | str]()
    own = origin.file.values if isinstance(origin, GGUFSource) else {}
    name = None if PRE_KEY in own else splitting_name(checkpoint, vocabulary)
    if name is not None:
        keys[PRE_KEY] = name
    if own:
        return keys
    template = chat_template_of(checkpoint.directory)
    if template is not None:
        keys[TEMPLATE_KEY] = template
    return keys


def splitting_name(checkpoint: Checkpoint, vocabulary: Vocabulary) -> str | None:
    """Return llama.cpp's name for how a byte-level tokenizer splits texts; None if it has none."""
    tokenizer = checkpoint.tokenizer()
    if vocabulary.kind != BYTE_LEVEL or not isinstance(tokenizer, RustTokenizer):
        return None
    return splits_like(tokenizer.split, MIXED_TEXTS)


def splitting_note(checkpoint: Checkpoint, vocabulary: Vocabulary) -> str | None:
    """Return a warning where llama.cpp will not split texts as the model does; None elsewhere."""
    origin = checkpoint.origin
    told = isinstance(origin, GGUFSource) and PRE_KEY in origin.file.values
    known = told or vocabulary.kind != BYTE_LEVEL
    if known or splitting_name(checkpoint, vocabulary) is not None:
        return None
    return (
        f"llama.cpp has no name for how this tokenizer splits texts into words ({PRE_KEY}) and "
        "takes its default: some ids differ from the model's"
    )
