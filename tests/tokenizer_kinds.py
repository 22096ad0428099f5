"""Tiny tokenizers of every kind, trained here and written as published checkpoints hold them."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from conftest import TEXT
from gguf import GGUFWriter
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from gguf_export.tokens.model_vocabulary import MIXED_TEXTS
from gguf_export.tokens.vocabulary import Vocabulary, add_vocabulary, read_file_vocabulary
from gguf_files.reader import GGUFFile

CORPUS = [TEXT * 20, *MIXED_TEXTS * 5]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write(path: Path, name: str, content: object) -> None:
    (path / name).write_text(json.dumps(content), encoding="utf-8")


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit tokenizer.json."""
    document = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    edit(document)
    write(path, "tokenizer.json", document)


def splitter(kind: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel
    if kind == "GPT-2":
        return byte_level(add_prefix_space=False)
    if kind == "Falcon":
        steps = [
            pre_tokenizers.Punctuation("contiguous"),
            byte_level(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    else:
        pattern = LLAMA_3 if kind == "Llama-3" else LLAMA_3.replace("{1,3}", "")
        steps = [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            byte_level(add_prefix_space=False, use_regex=False),
        ]
    return pre_tokenizers.Sequence(steps)


def byte_level(
    path: Path, kind: str, special: list[str], *, size: int = 600, pair: bool = False
) -> Path:
    """Write a byte-level BPE as tokenizer.json, or as OPT's vocab.json and merges.txt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter(kind), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    path.mkdir(exist_ok=True)
    if pair:
        tokenizer.model.save(str(path))
        settings: dict[str, Any] = {"eos_token": "</s>", "add_bos_token": True}
        settings |= {"bos_token": {"content": "</s>", "__type": "AddedToken"}}
        settings |= {"unk_token": "</s>", "pad_token": "<pad>"}
        write(path, "tokenizer_config.json", settings)
    else:
        tokenizer.save(str(path / "tokenizer.json"))
    return path


def opt(path: Path) -> Path:
    """Tokens 0 to 3 are OPT's, BOS is `</s>`."""
    return byte_level(path, "GPT-2", ["<s>", "<pad>", "</s>", "<unk>"], pair=True)


def pieces(path: Path, model: bytes) -> Path:
    """Write a SentencePiece model."""
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(model)
    return path


def ranked(path: Path, model: bytes, *, legacy: bool = True) -> Path:
    """Write a SentencePiece BPE as the tokenizer.json that is made from it, with added tokens."""
    source = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {source.id_to_piece(number): number for number in range(source.vocab_size())}
    merges = [
        (vocab[piece], vocab[piece[:at]], (piece[:at], piece[at:]))
        for piece in vocab
        for at in range(1, len(piece))
        if piece[:at] in vocab and piece[at:] in vocab
    ]
    pairs = [pair for _, _, pair in sorted(merges)]  # scores fall with ids
    model_ = models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model_)
    if legacy:
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<plain>"])
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    write(path, "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "<|im_end|>"})
    return path


def real_prompt_ids(program: Path, file: Path, text: str, directory: Path) -> list[int]:
    """Return the ids that PowerInfer's `main` makes of a prompt, which it prints."""
    (directory / "prompt").write_bytes(text.encode() + b"\n")  # it drops one final newline
    command = [str(program), "-m", str(file), "-f", "prompt", "--verbose-prompt", "-n", "1"]
    command += ["-t", "1", "-c", "512", "--temp", "0"]
    run = subprocess.run(command, cwd=directory, capture_output=True, timeout=60, check=True)
    printed = re.findall(rb"^ *(\d+) -> '", run.stderr, re.MULTILINE)
    return [int(number) for number in printed]


def file_of(vocabulary: Vocabulary, path: Path) -> Vocabulary:
    """Write a PWRI file that holds a vocabulary alone, and read it."""
    writer = GGUFWriter(path, "llama")
    add_vocabulary(writer, vocabulary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    path.write_bytes(b"PWRI" + path.read_bytes()[4:])
    return read_file_vocabulary(GGUFFile(path))
