"""What llama.cpp must be told of a tokenizer and PowerInfer does not ask: splitting, BOS, template.

PowerInfer's files have the first and the last too: read as a model again they are their model's.
"""

from __future__ import annotations

from collections.abc import Mapping

from architectures.checkpoint import Checkpoint
from architectures.gguf_model.byte_level import splits_like
from architectures.gguf_model.source import GGUFSource
from architectures.rust_tokenizer import RustTokenizer
from architectures.tokenizer import chat_template_of
from gguf_export.tokens.model_vocabulary import MIXED_TEXTS
from gguf_export.tokens.vocabulary import ADD_BOS_KEY, BYTE_LEVEL, Vocabulary
from gguf_files.reader import Value

PRE_KEY = "tokenizer.ggml.pre"
TEMPLATE_KEY = "tokenizer.chat_template"


def splitting_keys(checkpoint: Checkpoint, vocabulary: Vocabulary) -> dict[str, float | str]:
    """Return the keys; a GGUF model's own are copied with all others, and not among them."""
    own, keys = _copied(checkpoint), dict[str, float | str]()
    name = None if PRE_KEY in own else splitting_name(checkpoint, vocabulary)
    if name is not None:
        keys[PRE_KEY] = name
    if own:
        return keys
    template = chat_template_of(checkpoint.directory)
    if template is not None:
        keys[TEMPLATE_KEY] = template
    return keys


def bos_keys(checkpoint: Checkpoint, vocabulary: Vocabulary) -> dict[str, float | str]:
    """Return the key that says whether BOS goes before a text, if no other code writes it.

    Without it llama.cpp goes by the kind of tokenizer. A checkpoint that says nothing gets BOS,
    with which all ids of psp's begin; a GGUF model's file that does not, what llama.cpp takes.
    """
    own = _copied(checkpoint)
    if ADD_BOS_KEY in own or not (own or vocabulary.add_bos is None):
        return {}
    return {ADD_BOS_KEY: vocabulary.add_bos is not False}


def bos_note(checkpoint: Checkpoint, vocabulary: Vocabulary) -> str | None:
    """Return that BOS goes before a text though no file of a byte-level tokenizer says so."""
    if vocabulary.kind != BYTE_LEVEL or not any(bos_keys(checkpoint, vocabulary).values()):
        return None
    token = vocabulary.tokens[vocabulary.bos_id].decode("utf-8", "replace")
    return (
        f"no file of the model says whether BOS goes before a text: the file tells llama.cpp to "
        f"put {token!r} there, as psp does ({ADD_BOS_KEY})"
    )


def _copied(checkpoint: Checkpoint) -> Mapping[str, Value]:
    """Return the keys that an export copies: a GGUF model's."""
    origin = checkpoint.origin
    return origin.file.values if isinstance(origin, GGUFSource) else {}


def splitting_name(checkpoint: Checkpoint, vocabulary: Vocabulary) -> str | None:
    """Return llama.cpp's name for how a byte-level tokenizer splits texts; None if it has none."""
    tokenizer = checkpoint.tokenizer()
    if vocabulary.kind != BYTE_LEVEL or not isinstance(tokenizer, RustTokenizer):
        return None
    return splits_like(tokenizer.split, MIXED_TEXTS)


def splitting_note(checkpoint: Checkpoint, vocabulary: Vocabulary) -> str | None:
    """Return a warning where llama.cpp will not split texts as the model does; None elsewhere."""
    known = PRE_KEY in _copied(checkpoint) or vocabulary.kind != BYTE_LEVEL
    if known or splitting_name(checkpoint, vocabulary) is not None:
        return None
    return (
        f"llama.cpp has no name for how this tokenizer splits texts into words ({PRE_KEY}) and "
        "takes its default: some ids differ from the model's"
    )
