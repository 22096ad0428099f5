"""Published vocabularies: ids as their own libraries have them, in the checkpoint and in a file."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizer_kinds as kinds
from conftest import ModelMaker, exact, make_export, write_predictors
from gguf import GGUFReader
from tokenizers import Tokenizer, models

from architectures.tokenizer import load_tokenizer
from common.documents import sample_text
from gguf_export.tokens.encoders import spell, split_words
from gguf_export.tokens.model_vocabulary import MIXED_TEXTS, read_vocabulary, share_differing
from gguf_export.tokens.vocabulary import (
    BYTE_LEVEL,
    NONE,
    ORDINARY_BYTES,
    PIECES,
    Vocabulary,
    vocabulary_problems,
)
from prosparse.piece_conversion import as_rust

pytestmark = pytest.mark.published

TEXTS = (
    *MIXED_TEXTS,
    *sample_text()[:4000].splitlines(),
    *("   the", " the", "a  the   x", " " * 40, "\t\t \t", "\n\n\n", "</s> <s>x</s>"),
    "".join(random.Random(0).choices([chr(n) for n in range(32, 0x2FF)], k=500)),
)
JSON = {"gpt2-json": (50257, "GPT-2"), "llama3-json": (128256, "Llama-3")}
MODELS = {"llama2": 32000, "mistral-v1": 32000}
FILES = {
    "ggml-vocab-falcon": 28,
    "ggml-vocab-gpt-neox": 13,
    "ggml-vocab-mpt": 13,
    "ggml-vocab-refact": 14,
    "ggml-vocab-stablelm-3b-4e1t": 13,
    "ggml-vocab-starcoder": 14,
    "SmolLM2-135M-Instruct.Q4_1": 21,
    "ggml-vocab-llama": 0,
    "ggml-vocab-baichuan": 0,
}
"""Bytes without a token, counted in the files."""


@pytest.mark.parametrize("name", JSON)
def test_byte_level_ids_are_transformers_and_those_of_the_file_powerinfers(
    published_dir: Path, tmp_path: Path, name: str
) -> None:
    from transformers import AutoTokenizer

    path, (rows, splitter) = published_dir / name, JSON[name]
    tokenizer = load_tokenizer(path, rows)
    theirs = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert tokenizer.bos_id() == theirs.bos_token_id
    read = read_vocabulary(path, rows)
    vocabulary = kinds.file_of(read, tmp_path / "v.gguf")
    assert vocabulary.eos_id == theirs.eos_token_id
    words = sorted({word for text in TEXTS for word in split_words(text)})
    merged = dict(zip(words, tokenizer.merge(map(spell, words)), strict=True))  # type: ignore[union-attr]
    for text in TEXTS:
        ids = [number for word in split_words(text) for number in merged[word]]
        assert vocabulary.encode(text) == ids, text
    assert any(splitter in line for line in read.differences)
    assert 0 < share_differing(vocabulary.encode, tokenizer.encode) < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_pieces_are_sentencepieces_in_checkpoint_file_and_conversion(
    published_dir: Path, tmp_path: Path, name: str
) -> None:
    path, rows = published_dir / name, MODELS[name]
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    tokenizer = load_tokenizer(path, rows)
    read = read_vocabulary(path, rows)
    assert read.warnings == read.notes == ()
    vocabulary = kinds.file_of(read, tmp_path / "v.gguf")
    rust = as_rust(tokenizer)  # type: ignore[arg-type]
    for text in TEXTS:
        ids = plain.encode(text)
        assert tokenizer.encode(text) == vocabulary.encode(text) == ids, text
        if "<s>" not in text:
            assert rust.encode(text, add_special_tokens=False).ids == ids, text


def test_mistrals_tokenizer_json_alone_and_beside_its_model(
    published_dir: Path, tmp_path: Path
) -> None:
    alone, model = published_dir / "mistral-json", published_dir / "mistral-v1" / "tokenizer.model"
    plain = sentencepiece.SentencePieceProcessor(model_file=str(model))
    own, read = load_tokenizer(alone, 32000), read_vocabulary(alone, 32000)
    theirs = Tokenizer.from_file(str(alone / "tokenizer.json"))
    for text in TEXTS:
        ids = own.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        if "<s>" not in text:
            assert read.encode(text) == plain.encode(text), text
    both = tmp_path / "both"
    shutil.copytree(alone, both)
    shutil.copy(model, both)
    assert "tokenizer.model" in load_tokenizer(both, 32000).source


def file_vocabulary(path: Path) -> Vocabulary:
    """Read a vocabulary with gguf's own reader, whatever the file's version."""
    fields = GGUFReader(path).fields

    def value(name: str) -> object:
        field = fields.get(f"tokenizer.ggml.{name}")
        return None if field is None else field.contents()

    raw = fields["tokenizer.ggml.tokens"]
    tokens = [bytes(raw.parts[at]) for at in raw.data]
    kind, bos = value("model"), value("bos_token_id")
    merges, scores = value("merges") or [], value("scores") or []
    assert isinstance(kind, str)
    assert isinstance(merges, list)
    assert isinstance(scores, list)
    return Vocabulary(
        kind=kind,
        tokens=tokens,
        types=value("token_type"),  # type: ignore[arg-type]
        bos_id=bos if isinstance(bos, int) else 11,
        scores=scores if kind == PIECES else [],
        merges=[merge.encode() for merge in merges],
        eos_id=NONE,
    )


@pytest.mark.parametrize("name", FILES)
def test_vocabularies_of_files_are_read_and_give_their_merges(
    published_dir: Path, name: str
) -> None:
    vocabulary = file_vocabulary(published_dir / "ggml" / f"{name}.gguf")
    assert list(vocabulary_problems(vocabulary)) == []
    assert len(vocabulary.absent_bytes) == FILES[name]
    assert ORDINARY_BYTES.isdisjoint(vocabulary.absent_bytes)
    texts = [vocabulary.without_absent(text) for text in TEXTS]
    for text in texts:
        space = " " if text and vocabulary.kind == PIECES else ""
        assert vocabulary.decode(vocabulary.encode(text)).decode() == space + text
    if vocabulary.kind != BYTE_LEVEL:
        return
    vocab = {token.decode(): number for token, number in vocabulary.ids.items()}
    split = (merge.decode().partition(" ") for merge in vocabulary.merges)
    pairs = [(left, right) for left, _, right in split]
    document = Tokenizer(models.BPE(vocab, pairs))
    assert json.loads(document.to_str())["model"]["type"] == "BPE"
    for text in texts:
        words = (document.model.tokenize(spell(word)) for word in split_words(text))
        assert vocabulary.encode(text) == [token.id for word in words for token in word], text


@pytest.mark.powerinfer
@pytest.mark.parametrize("name", [*JSON, *MODELS])
def test_real_prompt_ids_are_the_files(
    published_dir: Path,
    powerinfer_bin: Path,
    make_model: ModelMaker,
    tmp_path: Path,
    name: str,
) -> None:
    rows = MODELS[name] if name in MODELS else JSON[name][0]
    model = make_model(tmp_path / "m", vocab_size=rows)
    (model / "tokenizer.model").unlink()
    for file in (published_dir / name).iterdir():
        shutil.copy(file, model)
    write_predictors(model, tmp_path / "predictors", exact)
    file = make_export(model, tmp_path / "predictors", tmp_path / "m.powerinfer.gguf").model_file
    vocabulary = read_vocabulary(model, rows)
    for text in ("".join(MIXED_TEXTS[8:13]), "a</s>b  x"):
        real = kinds.real_prompt_ids(powerinfer_bin / "main", file, text, tmp_path)
        assert real == vocabulary.prompt_ids(text), text
