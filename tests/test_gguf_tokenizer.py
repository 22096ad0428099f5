"""Tokenizer files made from a file's vocabulary give the ids of the tokenizer it was made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from conftest import TEXT, refused
from gguf import TokenType
from gguf_models import VOCAB, llama_keys, llama_tensors, write_gguf
from tokenizer_kinds import byte_level

from architectures.checkpoint import Checkpoint
from common.errors import PspError
from gguf_export.tokens.model_vocabulary import MIXED_TEXTS

TEXTS = (
    *(TEXT, *MIXED_TEXTS),
    "  two  spaces   and a tab\there\n\n\nand three newlines ",
    "a.b ('s') don't we'll 1234567 x² ½ Ⅷ ٣٤ 12a34",
    "naïve café, Ünïcödé, 日本語とEnglish, 🙂👩‍👩‍👧 \u200b\ufeff",
    "<s>[INST] </s> <|im_start|>user",
    "\t",
    " ",
)
PRE = {"GPT-2": "gpt-2", "Falcon": "falcon", "Llama-3": "llama-bpe", "Qwen-2": "qwen2"}
Keys = dict[str, Any]


def model(path: Path, keys: Keys) -> Checkpoint:
    """Open a small LLaMA with these keys of a tokenizer; None removes one."""
    kept = {key: value for key, value in (llama_keys() | keys).items() if value is not None}
    return Checkpoint.open(write_gguf(path / "model.gguf", kept, llama_tensors()))


def byte_level_keys(directory: Path, pre: str | None) -> Keys:
    """Return the keys of a tokenizer.json, as converters write them."""
    document = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    vocab: dict[str, int] = document["model"]["vocab"]
    special = {token["content"] for token in document["added_tokens"]}
    tokens = sorted(vocab, key=lambda token: vocab[token])
    kinds = [TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in document["model"]["merges"]],
        "tokenizer.ggml.scores": None,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def piece_keys(processor: sentencepiece.SentencePieceProcessor) -> Keys:
    """Return the keys of a SentencePiece model, as llama.cpp's converter writes them."""
    numbers = range(processor.vocab_size())

    def kind(number: int) -> TokenType:
        if processor.is_unknown(number):
            return TokenType.UNKNOWN
        if processor.is_control(number):
            return TokenType.CONTROL
        return TokenType.BYTE if processor.is_byte(number) else TokenType.NORMAL

    return {
        "tokenizer.ggml.tokens": [processor.id_to_piece(number) for number in numbers],
        "tokenizer.ggml.scores": [processor.get_score(number) for number in numbers],
        "tokenizer.ggml.token_type": [int(kind(number)) for number in numbers],
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
    }


def transformers_ids(directory: Path) -> Callable[[str], list[int]]:
    """Return what transformers makes of the files, special tokens it would add left out."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(directory)
    return lambda text: list(loaded(text, add_special_tokens=False).input_ids)


def test_pieces_come_back(tokenizer_bytes: bytes, tmp_path: Path) -> None:
    original = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_bytes)
    checkpoint = model(tmp_path, piece_keys(original))
    ours, theirs = checkpoint.tokenizer(), transformers_ids(checkpoint.directory)
    for text in TEXTS:
        assert ours.encode(text) == original.encode(text), text
        assert ours.decode(ours.encode(text)) == original.decode(original.encode(text))
        if "<" not in text:  # special tokens are whole to transformers
            assert theirs(text) == original.encode(text), text
    assert ours.bos_id() == original.bos_id()


def test_a_vocabulary_may_begin_texts_without_a_space(
    tokenizer_bytes: bytes, tmp_path: Path
) -> None:
    original = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_bytes)
    keys = piece_keys(original) | {"tokenizer.ggml.add_space_prefix": False}
    ours = model(tmp_path, keys).tokenizer()
    for text in ("the world", "a.b"):
        assert ours.encode(f" {text}") == original.encode(text) != ours.encode(text)
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("kind", PRE)
def test_byte_level_words_are_split_as_the_file_names_it(tmp_path: Path, kind: str) -> None:
    directory = byte_level(tmp_path / "hf", kind, ["<s>", "</s>"], size=299)
    original = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    checkpoint = model(tmp_path, byte_level_keys(directory, PRE[kind]))
    ours, theirs = checkpoint.tokenizer(), transformers_ids(checkpoint.directory)
    for text in TEXTS:
        wanted = original.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == wanted == theirs(text), text
    assert ours.bos_id() == 0


@pytest.mark.parametrize(
    ("pre", "told", "begun"),
    [("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True)],
)
def test_bos_begins_a_text_where_the_model_needs_it(
    tmp_path: Path, pre: str, told: bool | None, begun: bool
) -> None:
    from transformers import AutoTokenizer

    directory = byte_level(tmp_path / "hf", "GPT-2", ["<s>", "</s>"], size=299)
    keys = byte_level_keys(directory, pre) | {"tokenizer.ggml.add_bos_token": told}
    checkpoint = model(tmp_path, keys)
    loaded = AutoTokenizer.from_pretrained(checkpoint.directory)
    assert (loaded("the").input_ids[0] == 0) is begun
    assert (loaded.bos_token, loaded.eos_token) == ("<s>", "</s>")


def test_pieces_begin_with_bos_and_the_chat_template_comes_along(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    checkpoint = model(tmp_path, {"tokenizer.chat_template": template})
    loaded = AutoTokenizer.from_pretrained(checkpoint.directory)
    assert loaded("ab").input_ids[0] == 1
    chat = [{"role": "user", "content": "hi"}]
    assert loaded.apply_chat_template(chat, tokenize=False) == "<|user|>hi"


def test_the_files_are_gone_with_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = model(tmp_path, {})
    directory = checkpoint.directory
    assert (directory / "config.json").exists()
    del checkpoint
    assert not directory.parent.exists()


REFUSED: dict[str, tuple[Keys, str]] = {
    "no vocabulary": ({"tokenizer.ggml.tokens": None}, "holds no vocabulary"),
    "another kind": ({"tokenizer.ggml.model": "bert"}, "tokenizer 'bert' is not supported"),
    "no types": ({"tokenizer.ggml.token_type": None}, "token_type is missing"),
    "types of some": ({"tokenizer.ggml.token_type": [2, 3]}, f"{VOCAB} tokens have 2 types"),
    "scores of some": ({"tokenizer.ggml.scores": [0.5]}, f"{VOCAB} tokens have 1 scores"),
    "no scores": ({"tokenizer.ggml.scores": None}, "scores is missing"),
    "twice": ({"tokenizer.ggml.tokens": ["a"] * VOCAB}, "empty or appears twice"),
    "none is unknown": ({"tokenizer.ggml.token_type": [1] * VOCAB}, "0 tokens are of type UNKNOWN"),
    "a strange type": ({"tokenizer.ggml.token_type": [2] + [9] * (VOCAB - 1)}, "unknown type 9"),
    "BOS beyond the end": (
        {"tokenizer.ggml.bos_token_id": VOCAB},
        f"bos_token_id {VOCAB} is none of {VOCAB}",
    ),
    "words split in another way": (
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "new",
            "tokenizer.ggml.merges": ["a b"],
        },
        "tokenizer.ggml.pre is 'new'",
    ),
    "merges of what are no tokens": (
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["x y"]},
        "merges do not fit its tokens",
    ),
    "a merge of three": (
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a b a"]},
        "does not name two tokens",
    ),
    "no merges": ({"tokenizer.ggml.model": "gpt2"}, "merges is missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path, name: str) -> None:
    keys, part = REFUSED[name]
    checkpoint = model(tmp_path, keys)
    with refused(PspError, str(checkpoint.path), part):
        checkpoint.tokenizer()
