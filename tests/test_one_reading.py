"""Files around a tokenizer change its ids as they do in transformers; what disagrees is named."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import conftest
import pytest
import sentencepiece
import tokenizer_kinds as kinds
from conftest import TEXT
from tokenizer_kinds import change, write
from tokenizers.processors import TemplateProcessing

from architectures.tokenizer import load_tokenizer
from common.errors import CheckpointError
from gguf_export.tokens.model_vocabulary import MIXED_TEXTS

refused = partial(conftest.refused, CheckpointError)

ROWS = 640
CHATML = {"<|im_end|>": 600, "<|im_start|>": 601}
CHATML_OF_RANKED = 320
"""`<|im_start|>` in the tokenizer.json of `tokenizer_kinds.ranked`, behind 320 pieces."""
CHAT = "<|im_start|>user\nIt is late.<|im_end|> x <|im_start|>the"
TEXTS = (CHAT, " the", TEXT, *MIXED_TEXTS)


def decoder(tokens: dict[str, int]) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {str(n): {"content": text, "special": True, **flags} for text, n in tokens.items()}


def ids_of_transformers(path: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def byte_level(path: Path, **settings: Any) -> Path:
    """A pair of vocab.json and merges.txt, 600 tokens and no more files than tokenizer_config."""
    path = kinds.byte_level(path, "GPT-2", ["</s>"], pair=True)
    named = {"bos_token": "</s>", "eos_token": "</s>", "tokenizer_class": "GPT2Tokenizer"}
    write(path, "tokenizer_config.json", named | settings)
    write(path, "config.json", {"model_type": "opt"})
    return path


@pytest.mark.parametrize("layout", ["pair", "json"])
@pytest.mark.parametrize("where", ["added_tokens.json", "added_tokens_decoder"])
def test_added_tokens_are_one_id_as_in_transformers(
    tmp_path: Path, layout: str, where: str
) -> None:
    settings: dict[str, Any] = {"added_tokens_decoder": decoder({"</s>": 0, **CHATML})}
    if where == "added_tokens.json":
        settings = {"additional_special_tokens": list(CHATML)}
    path = byte_level(tmp_path, **settings)
    if where == "added_tokens.json":
        write(path, where, CHATML)
    if layout == "json":
        kinds.byte_level(path, "GPT-2", ["</s>"])
        (path / "vocab.json").unlink()
    tokenizer = load_tokenizer(path, ROWS)
    assert tokenizer.encode(CHAT).count(601) == 2
    for text in TEXTS:
        assert tokenizer.encode(text) == ids_of_transformers(path, text), text
    assert tokenizer.decode(tokenizer.encode(CHAT)) == CHAT


@pytest.mark.parametrize("layout", ["pair", "json"])
@pytest.mark.parametrize("space", [True, False])
def test_a_space_goes_in_front_where_the_settings_ask_for_it(
    tmp_path: Path, layout: str, space: bool
) -> None:
    path = byte_level(tmp_path, add_prefix_space=space)
    if layout == "json":
        kinds.byte_level(path, "GPT-2", ["</s>"])
    tokenizer = load_tokenizer(path, ROWS)
    assert (tokenizer.encode("the") == tokenizer.encode(" the")) is space
    for text in TEXTS:
        assert tokenizer.encode(text) == ids_of_transformers(path, text), text


def test_pieces_have_added_tokens_whole_and_what_is_between_is_sentencepieces(
    tmp_path: Path, tokenizer_bytes: bytes
) -> None:
    path = kinds.pieces(tmp_path, tokenizer_bytes)
    plain = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_bytes)
    assert load_tokenizer(path, ROWS).encode(CHAT) == plain.encode(CHAT)
    write(path, "added_tokens.json", CHATML)
    newline = plain.encode("\n")

    def later(text: str) -> Any:
        """No piece holds a newline: what follows one has no space in front."""
        return plain.encode("\n" + text)[len(newline) :]

    tokenizer = load_tokenizer(path, ROWS)
    body, between = "user\nIt is late.", " x "
    expected = [601, *later(body), 600, *later(between), 601, *later("the")]
    assert tokenizer.encode(CHAT) == expected
    assert tokenizer.encode("a</s>" + CHAT)[: len(plain.encode("a</s>"))] == plain.encode("a</s>")
    assert tokenizer.decode(expected) == CHAT
    write(path, "tokenizer_config.json", {"legacy": True})
    whole = [601, *plain.encode(body), 600, *plain.encode(between), 601, *plain.encode("the")]
    assert load_tokenizer(path, ROWS).encode(CHAT) == whole


def test_a_fine_tunes_larger_tokenizer_json_counts(tmp_path: Path, tokenizer_bytes: bytes) -> None:
    """The base model's tokenizer.model was left beside it."""
    path = kinds.ranked(tmp_path, tokenizer_bytes)
    assert "tokenizer.json" in load_tokenizer(path, ROWS, {"bos_token_id": 1}).source
    kinds.pieces(tmp_path, tokenizer_bytes)
    same = load_tokenizer(path, ROWS)
    assert "tokenizer.model" in same.source
    assert same.encode("a<|im_start|>")[-1] == CHATML_OF_RANKED
    larger = {f"qqq{number}": 400 + number for number in range(16)}
    change(path, lambda d: d["model"]["vocab"].update(larger))
    found = load_tokenizer(path, ROWS)
    assert "tokenizer.json" in found.source
    assert any("another vocabulary (320 pieces) than tokenizer.json" in n for n in found.notes)


def test_a_tokenizer_model_of_another_kind_beside_a_good_tokenizer_json(tmp_path: Path) -> None:
    """Llama 3's is a list of tokens for tiktoken."""
    path = kinds.byte_level(tmp_path, "Llama-3", ["<|begin|>"])
    alone = load_tokenizer(path, ROWS, {"bos_token_id": 0})
    (path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    both = load_tokenizer(path, ROWS, {"bos_token_id": 0})
    assert both.encode(TEXT) == alone.encode(TEXT)
    assert "not a SentencePiece model, tokenizer.json counts" in both.notes[0]


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer.json"])
def test_an_added_token_without_a_row_is_text_and_named(tmp_path: Path, where: str) -> None:
    path = kinds.byte_level(tmp_path, "GPT-2", ["</s>"])
    plain = load_tokenizer(path, 600, {"bos_token_id": 0}).encode("a[PAD]b")
    if where == "tokenizer.json":
        change(path, lambda d: d["added_tokens"].append({"id": 600, **decoder({"[PAD]": 0})["0"]}))
    else:
        write(path, where, {"[PAD]": 600})
    tokenizer = load_tokenizer(path, 600, {"bos_token_id": 0})
    assert tokenizer.encode("a[PAD]b") == plain
    assert "'[PAD]' has id 600, beyond the model's 600 rows" in tokenizer.notes[0]
    assert 600 in load_tokenizer(path, 601, {"bos_token_id": 0}).encode("a[PAD]b")


def test_what_a_tokenizer_puts_before_texts_is_bos_whatever_the_config_says(tmp_path: Path) -> None:
    path = kinds.byte_level(tmp_path, "GPT-2", ["<s>", "<pad>"])
    template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    load = partial(load_tokenizer, path, ROWS, {"bos_token_id": 1})
    silent = load()
    assert (silent.bos_id(), silent.adds_bos) == (1, None)
    assert any("puts nothing before a text" in note for note in silent.notes)
    change(path, lambda d: d.update(post_processor=None))
    rust = silent.rust  # type: ignore[union-attr]
    rust.post_processor = template
    rust.save(str(path / "tokenizer.json"))
    found = load()
    assert (found.bos_id(), found.adds_bos) == (0, True)
    assert found.notes == (
        "config.json has bos_token_id 1, the tokenizer's begin-of-sequence token is 0, "
        "which counts",
    )


def test_an_end_that_a_tokenizer_puts_behind_texts_is_no_bos(tmp_path: Path) -> None:
    path = kinds.byte_level(tmp_path, "GPT-2", ["<s>", "</s>"])
    rust = load_tokenizer(path, ROWS, {"bos_token_id": 0}).rust  # type: ignore[union-attr]
    rust.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    rust.save(str(path / "tokenizer.json"))
    tokenizer = load_tokenizer(path, ROWS, {"bos_token_id": 0})
    assert (tokenizer.bos_id(), tokenizer.adds_bos) == (0, None)


def test_a_tokenizer_that_adds_no_bos_is_named(tmp_path: Path) -> None:
    """As SmolLM2's."""
    path = kinds.byte_level(tmp_path, "GPT-2", ["<|im_start|>"])
    write(path, "tokenizer_config.json", {"bos_token": "<|im_start|>", "add_bos_token": False})
    tokenizer = load_tokenizer(path, ROWS)
    assert tokenizer.adds_bos is False
    assert tokenizer.notes == (
        "the model's own tokenizer puts nothing before a text (add_bos_token is false), psp's "
        "windows begin with '<|im_start|>' (id 0)",
    )


def test_the_class_that_drops_a_space_is_named(tmp_path: Path, tokenizer_bytes: bytes) -> None:
    path = kinds.pieces(tmp_path, tokenizer_bytes)
    assert load_tokenizer(path, ROWS).notes == ()
    write(path, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    tokenizer = load_tokenizer(path, ROWS)
    assert "names LlamaTokenizer" in tokenizer.notes[0]
    plain = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_bytes)
    assert tokenizer.encode(" the") == plain.encode(" the") != ids_of_transformers(path, " the")


@pytest.mark.parametrize("layout", ["pieces", "byte-level"])
def test_an_added_token_that_repeats_another_is_named(
    tmp_path: Path, tokenizer_bytes: bytes, layout: str
) -> None:
    if layout == "pieces":
        kinds.pieces(tmp_path, tokenizer_bytes)
    else:
        kinds.byte_level(tmp_path, "GPT-2", ["<s>", "<pad>", "</s>"])
    write(tmp_path, "added_tokens.json", {"</s>": 605})
    with refused("added token '</s>' has id 605", "it is 2", "take the entry 605 out"):
        load_tokenizer(tmp_path, ROWS, {"bos_token_id": 1})
