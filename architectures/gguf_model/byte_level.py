r"""A tokenizer.json from a file's byte-level BPE.

How texts are split into words the file says by a name alone, `tokenizer.ggml.pre`. Each name's
expression is llama.cpp's (src/llama-vocab.cpp); files from before there was the key get GPT-2's,
which is what their programs, PowerInfer among them, meant to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFValueType

from architectures.gguf_model.rust_tokenizer import bpe, save
from architectures.gguf_model.tokenizer_files import FileVocabulary
from common.errors import CheckpointError
from gguf_files.reader import GGUFFile

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace("{1,3}", "")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


_LLAMA_3_NAMES = ("llama-bpe", "llama3", "llama-v3")


def _gpt2() -> list[Any]:
    from tokenizers.pre_tokenizers import ByteLevel

    return [ByteLevel(add_prefix_space=False)]


def _single_digits() -> list[Any]:
    from tokenizers.pre_tokenizers import Digits

    return [Digits(individual_digits=True), *_gpt2()]


def _falcon() -> list[Any]:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Digits, Punctuation, Split

    thousands = Split(Regex("[0-9][0-9][0-9]"), "isolated")
    return [Punctuation("contiguous"), *_gpt2(), Digits(individual_digits=False), thousands]


def _expression(pattern: str) -> Callable[[], list[Any]]:
    def steps() -> list[Any]:
        from tokenizers import Regex
        from tokenizers.pre_tokenizers import ByteLevel, Split

        split = Split(Regex(pattern), "isolated")
        return [split, ByteLevel(add_prefix_space=False, use_regex=False)]

    return steps


_WORDS: dict[str, Callable[[], list[Any]]] = {
    **dict.fromkeys(("", "gpt-2", "phi-2", "mpt", "olmo"), _gpt2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _single_digits),
    "falcon": _falcon,
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), _expression(_LLAMA_3)
    ),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), _expression(_QWEN_2)),
    "tekken": _expression(_TEKKEN),
}
_NEWER = (*_LLAMA_3_NAMES, "tekken")
"""Those that take a word that is a token whole, whatever the merges say, and that put BOS before a
text unless the file says otherwise."""


def puts_bos(pre: str) -> bool:
    """Whether llama.cpp puts BOS before a text of a file that does not say, by its way's name."""
    return pre in _NEWER


_TOLD = ("gpt-2", "smollm", "falcon", "llama-bpe", "qwen2", "tekken")
"""One name of each way."""


def splits_like(split: Callable[[str], list[str]], texts: Sequence[str]) -> str | None:
    """Return the name of the way in which texts are split into words; None if it has none.

    Args:
        split: gives the words of a text, spelt in GPT-2's bytes.
        texts: of many kinds.
    """
    from tokenizers import pre_tokenizers

    expected = [split(text) for text in texts]
    for name in _TOLD:
        splitter = pre_tokenizers.Sequence(_WORDS[name]())
        found = ([word for word, _ in splitter.pre_tokenize_str(text)] for text in texts)
        if all(a == b for a, b in zip(found, expected, strict=True)):
            return name
    return None


def splitting_notes(file: GGUFFile) -> tuple[str, ...]:
    """Return a line if texts are split into words in a way that a file does not name."""
    silent = "tokenizer.ggml.merges" in file.values and "tokenizer.ggml.pre" not in file.values
    said = f"{file.path}: does not say how its tokenizer splits texts into words"
    return (f"{said} (tokenizer.ggml.pre), GPT-2's way is taken",) if silent else ()


def write(vocabulary: FileVocabulary, directory: Path) -> dict[str, Any]:
    """Write `tokenizer.json`.

    Returns:
        What tokenizer_config.json says of it.

    Raises:
        CheckpointError: an unknown way of splitting words, or merges that do not fit the tokens.
        FormatError: merges of another type.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    pre = vocabulary.file.optional("tokenizer.ggml.pre", GGUFValueType.STRING, "")
    if pre not in _WORDS:
        raise CheckpointError(
            f"{vocabulary.file.path}: tokenizer.ggml.pre is {pre!r}, a way of splitting words that "
            f"psp does not know (known: {', '.join(filter(None, _WORDS))})",
            "pass the model's Hugging Face directory",
        )
    model = bpe(vocabulary, _merges(vocabulary), ignore_merges=pre in _NEWER)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_WORDS[pre]())
    tokenizer.decoder = decoders.ByteLevel()
    return save(tokenizer, vocabulary, directory, begun=pre in _NEWER)


def _merges(vocabulary: FileVocabulary) -> list[tuple[str, str]]:
    raw = vocabulary.file.value("tokenizer.ggml.merges", GGUFValueType.ARRAY, GGUFValueType.STRING)
    pairs = [merge.decode("utf-8", "replace").split(" ") for merge in raw]
    if any(len(pair) != 2 for pair in pairs):
        raise vocabulary.error("a merge does not name two tokens")
    return [(left, right) for left, right in pairs]
