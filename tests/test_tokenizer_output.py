"""The tokenizer of a written checkpoint: transformers finds psp's ids and BOS, or it is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizer_kinds as kinds
from conftest import TEXT, ModelMaker
from tokenizer_kinds import write
from tokenizers.processors import TemplateProcessing

from architectures.checkpoint import Checkpoint
from architectures.tokenizer import load_tokenizer
from prosparse.piece_conversion import as_rust
from prosparse.tokenizer_output import TOKENIZER_FILES, write_tokenizer

TEXTS = ("the", " the", "a  the   fox ", "x\n\n y\t z", "naïve 中文 😀 ½ \x07", TEXT)


@pytest.fixture
def model(make_model: ModelMaker, tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", vocab_size=640)


def written(model: Path, out: Path) -> tuple[Path, list[str]]:
    """Write the tokenizer of a model; return where, and what was said."""
    out.mkdir()
    said: list[str] = []
    checkpoint = Checkpoint.open(model)
    write_tokenizer(
        checkpoint.directory, checkpoint.tokenizer(), checkpoint.config, out, said.append
    )
    write(out, "config.json", dict(checkpoint.config))
    return out, said


def loaded(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path), local_files_only=True)


def settings(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "tokenizer_config.json").read_text())
    return found


@pytest.mark.parametrize("named", [None, "LlamaTokenizer", "LlamaTokenizerFast"])
def test_pieces_get_bos_and_sentencepieces_ids(
    model: Path, tokenizer_bytes: bytes, tmp_path: Path, named: str | None
) -> None:
    if named is not None:
        write(model, "tokenizer_config.json", {"tokenizer_class": named, "model_max_length": 99})
    out, said = written(model, tmp_path / "out")
    assert said == []
    plain, theirs = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_bytes), loaded(out)
    for text in TEXTS:
        assert theirs.encode(text) == [1, *plain.encode(text)], text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert settings(out)["tokenizer_class"] == "PreTrainedTokenizerFast", "transformers 4 has it"
    assert settings(out).get("model_max_length") == (None if named is None else 99)
    # What psp reads stays what it was.
    assert (out / "tokenizer.model").read_bytes() == tokenizer_bytes
    again = load_tokenizer(out, 640)
    assert [again.encode(text) for text in TEXTS] == [plain.encode(text) for text in TEXTS]
    assert again.bos_id() == 1
    # And the second time nothing is left to mend.
    for name in TOKENIZER_FILES:
        if (out / name).is_file():
            (model / name).write_bytes((out / name).read_bytes())
    second, _ = written(model, tmp_path / "second")
    assert (second / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()


def test_ranks_follow_scores_not_ids(tokenizer_bytes: bytes, tmp_path: Path) -> None:
    """As LLaMA 2's runs of spaces, which have small ids and the worst scores."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer_bytes)
    proto.pieces[259].score = -1e9
    path = kinds.pieces(tmp_path, proto.SerializeToString())
    tokenizer = load_tokenizer(path, 640)
    rust = as_rust(tokenizer)  # type: ignore[arg-type]
    by_id = as_rust(load_tokenizer(kinds.pieces(tmp_path / "b", tokenizer_bytes), 640))  # type: ignore[arg-type]
    for text in TEXTS:
        assert rust.encode(text, add_special_tokens=False).ids == tokenizer.encode(text), text
    assert any(rust.encode(text).ids != by_id.encode(text).ids for text in TEXTS)


def test_a_tokenizer_that_puts_no_bos_is_left_without(model: Path, tmp_path: Path) -> None:
    write(model, "tokenizer_config.json", {"add_bos_token": False})
    out, _ = written(model, tmp_path / "out")
    assert loaded(out).encode("the") == load_tokenizer(model, 640).encode("the")
    assert settings(out)["add_bos_token"] is False


def test_files_that_are_right_are_kept(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.model").unlink()
    kinds.byte_level(model, "Llama-3", ["<s>", "</s>"])
    rust = load_tokenizer(model, 640, {"bos_token_id": 0}).rust  # type: ignore[union-attr]
    rust.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    rust.save(str(model / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    write(model, "tokenizer_config.json", {**named, "tokenizer_class": "PreTrainedTokenizerFast"})
    out, said = written(model, tmp_path / "out")
    assert said == []
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert loaded(out).encode("the")[0] == 0


def test_the_class_of_transformers_5_alone_is_replaced(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.model").unlink()
    kinds.byte_level(model, "GPT-2", ["<s>", "</s>", "<x>"])
    write(
        model,
        "tokenizer_config.json",
        {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "bos_token": "<s>"}
        | {"extra_special_tokens": ["<x>"]},
    )
    out, _ = written(model, tmp_path / "out")
    found = settings(out)
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert found["additional_special_tokens"] == ["<x>"]
    assert {"backend", "extra_special_tokens"}.isdisjoint(found)
    own = load_tokenizer(model, 640)
    assert [loaded(out).encode(text) for text in TEXTS] == [own.encode(text) for text in TEXTS]


def test_what_cannot_be_mended_is_said(model: Path, tmp_path: Path) -> None:
    """Added tokens, and no space behind them: transformers then drops a leading one."""
    write(model, "added_tokens.json", {"<|im_start|>": 600})
    out, said = written(model, tmp_path / "out")
    assert said == [f"transformers reads the tokenizer in {out} otherwise than psp does"]
    ids = load_tokenizer(model, 640).encode("<|im_start|>user\nthe")
    assert loaded(out).encode("<|im_start|>user\nthe") == [1, *ids]
