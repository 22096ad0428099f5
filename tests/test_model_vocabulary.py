"""A checkpoint's tokenizer as PowerInfer's vocabulary: same ids, or a warning, or a refusal."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import conftest
import pytest
import sentencepiece
import tokenizer_kinds as kinds
from conftest import TEXT
from gguf import TokenType
from tokenizer_kinds import change, write
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from architectures.tokenizer import load_tokenizer
from common.errors import CheckpointError, DataError, ExportError
from gguf_export.tokens.encoders import spell
from gguf_export.tokens.model_vocabulary import (
    MIXED_TEXTS,
    read_vocabulary,
    share_differing,
)
from gguf_export.tokens.vocabulary import Vocabulary

TEXTS = (TEXT, *TEXT.splitlines(), *MIXED_TEXTS)
CHATML = {"<|im_end|>": 320, "<|im_start|>": 321, "<plain>": 324}


def typed(vocabulary: Vocabulary, text: str) -> TokenType:
    return TokenType(vocabulary.types[vocabulary.ids[text.encode()]])


def train(**changes: Any) -> bytes:
    """Train a SentencePiece model like that of `conftest`, but for `changes`."""
    buffer = io.BytesIO()
    settings: dict[str, Any] = {"model_type": "bpe", "vocab_size": 320}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 20),
        model_writer=buffer,
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **settings | changes,
    )
    return buffer.getvalue()


@pytest.fixture(scope="module")
def large() -> bytes:
    """A model that has tokens which several pairs of tokens join to."""
    return train(vocab_size=450, character_coverage=0.99)


def test_pieces_keep_scores_and_get_the_added_tokens(
    tmp_path: Path, tokenizer_bytes: bytes
) -> None:
    path = kinds.pieces(tmp_path, tokenizer_bytes)
    plain = read_vocabulary(path, 330)
    assert (plain.kind, plain.bos_id, plain.eos_id, plain.unk_id) == ("llama", 1, 2, 0)
    assert plain.warnings == ()
    write(path, "added_tokens.json", CHATML)
    settings: dict[str, Any] = {"eos_token": "<|im_end|>", "add_bos_token": True}
    settings |= {"added_tokens_decoder": {"321": {"content": "<|im_start|>", "special": True}}}
    write(path, "tokenizer_config.json", settings)
    found = read_vocabulary(path, 330)
    assert found.tokens[:320] == plain.tokens[:320]
    assert found.scores[:320] == plain.scores[:320]
    assert found.types[:320] == plain.types[:320]
    assert [found.ids[text.encode()] for text in CHATML] == [320, 321, 324]
    assert typed(found, "<|im_start|>") == typed(found, "<|im_end|>") == TokenType.CONTROL
    assert typed(found, "<plain>") == TokenType.USER_DEFINED
    assert found.types[322:324] == [TokenType.UNUSED] * 2
    assert len(found.tokens) == len(found.scores) == len(set(found.tokens)) == 330
    assert (found.eos_id, found.pad_id, found.add_bos) == (320, -1, True)


def test_ids_of_pieces_with_added_tokens_are_sentencepieces(
    tmp_path: Path, tokenizer_bytes: bytes
) -> None:
    path = kinds.pieces(tmp_path, tokenizer_bytes)
    write(path, "added_tokens.json", CHATML)
    encode = read_vocabulary(path, 330).encode
    reference = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_bytes)
    for text in TEXTS:
        assert encode(text) == reference.encode(text), repr(text)


def test_byte_fallback_without_sentencepiece_is_the_same_vocabulary(
    tmp_path: Path, large: bytes
) -> None:
    """As TurboSparse-Mistral is published: tokenizer.json alone."""
    path = kinds.ranked(tmp_path / "json", large)
    found = read_vocabulary(path, 480, {"bos_token_id": 1, "eos_token_id": 2})
    original = read_vocabulary(kinds.pieces(tmp_path / "model", large), 480)
    assert found.warnings == ()
    assert found.tokens[:450] == original.tokens[:450]
    assert found.types[:450] == original.types[:450]
    assert found.tokens[found.eos_id] == b"<|im_end|>", "tokenizer_config.json goes first"
    assert typed(found, "<plain>") == TokenType.USER_DEFINED
    assert found.add_bos is None
    ours, theirs = found.encode, Tokenizer.from_file(str(path / "tokenizer.json"))
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours(text) == ids == original.encode(text), repr(text)


def test_a_tokenizer_that_is_frugal_with_leading_spaces_is_named(
    tmp_path: Path, large: bytes
) -> None:
    path = kinds.ranked(tmp_path, large, legacy=False)
    reason, share = read_vocabulary(path, 480, {"bos_token_id": 1}).warnings[:2]
    assert "starts with a space" in reason
    assert "% of the ids" in share
    assert not share.startswith("0.00%")


def test_ranks_that_scores_cannot_express_are_named(tmp_path: Path, large: bytes) -> None:
    path = kinds.ranked(tmp_path, large)

    def cut(document: dict[str, Any]) -> None:
        """Put one of the pairs that make a token first, another last, and drop a third merge."""
        merges = [tuple(pair) for pair in document["model"]["merges"]]
        made = ["".join(pair) for pair in merges]
        several = max(made, key=made.count)
        one, other, *_ = (pair for pair in merges if "".join(pair) == several)
        rest = [pair for pair in merges[1:] if pair not in (one, other)]
        document["model"]["merges"] = [one, *rest, other]

    change(path, cut)
    warnings = "; ".join(read_vocabulary(path, 480, {"bos_token_id": 1}).warnings)
    assert "merges make a token whose other merges rank elsewhere" in warnings
    assert "join to a token without a merge" in warnings
    assert "% of the ids" in warnings


def test_byte_level_files_of_both_layouts_are_read(tmp_path: Path) -> None:
    pair = read_vocabulary(kinds.opt(tmp_path / "opt"), 640, {"bos_token_id": 2, "pad_token_id": 1})
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    single = kinds.byte_level(tmp_path / "json", "GPT-2", special)
    json = read_vocabulary(single, 640, {"bos_token_id": 2, "eos_token_id": [2, 3]})
    assert (pair.kind, pair.bos_id, pair.eos_id, pair.unk_id, pair.pad_id) == ("gpt2", 2, 2, 2, 1)
    assert (json.bos_id, json.eos_id) == (2, 2), "of several the first"
    assert pair.tokens == json.tokens
    assert pair.merges == json.merges != []
    assert pair.scores == []
    assert typed(pair, "</s>") == typed(pair, "<pad>") == typed(json, "</s>") == TokenType.CONTROL
    size = Tokenizer.from_file(str(single / "tokenizer.json")).get_vocab_size()
    assert len(pair.tokens) == 640 > size
    assert pair.types[size:] == [TokenType.UNUSED] * (640 - size)
    assert (pair.add_bos, json.add_bos) == (True, None)
    assert any("puts </s> before a text" in warning for warning in pair.warnings)


@pytest.mark.parametrize("kind", ["GPT-2", "Falcon", "Llama-3", "Qwen2"])
def test_byte_level_ids_are_the_models_merges_of_powerinfers_words(
    tmp_path: Path, kind: str
) -> None:
    path = kinds.byte_level(tmp_path, kind, ["<|endoftext|>"])
    config = {"bos_token_id": 0, "eos_token_id": 0}
    vocabulary, tokenizer = read_vocabulary(path, 600, config), load_tokenizer(path, 600, config)
    encode = vocabulary.encode
    word = "transformers"
    assert encode(word) == tokenizer.encode(word) == tokenizer.merge([spell(word)])[0]  # type: ignore[union-attr]
    share = share_differing(encode, tokenizer.encode)
    assert kind in vocabulary.warnings[0]
    assert vocabulary.warnings[-1].startswith(f"{share:.2%} of the ids")
    assert vocabulary.differences == vocabulary.warnings[:-1]
    assert 0 <= share < 0.2
    if kind == "Llama-3":
        assert share > 0


def test_tokens_that_only_whole_words_reach_are_counted(tmp_path: Path) -> None:
    path = kinds.byte_level(tmp_path, "Llama-3", ["<|a|>"])

    def edit(document: dict[str, Any]) -> None:
        document["model"]["ignore_merges"] = True
        document["model"]["vocab"]["zqzq"] = 600

    change(path, edit)
    warnings = read_vocabulary(path, 610, {"bos_token_id": 0, "eos_token_id": 0}).warnings
    assert any(line.startswith("1 tokens are found without merges") for line in warnings)


def test_bos_from_a_post_processor_is_named(tmp_path: Path) -> None:
    """As Llama-3 is published."""
    path = kinds.byte_level(tmp_path, "Llama-3", ["<|end|>", "<|begin|>"])
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    vocabulary = read_vocabulary(path, 600, {"bos_token_id": 1, "eos_token_id": 0})
    assert vocabulary.add_bos
    named = "the model's tokenizer puts <|begin|> before a text, PowerInfer does not"
    assert named in vocabulary.warnings
    assert named not in vocabulary.differences


REFUSALS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "NFC": (lambda d: d.update(normalizer={"type": "NFC"}), "normalizer NFC changes texts"),
    "lowercase": (
        lambda d: d.update(normalizer={"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}),
        "normalizer Lowercase changes texts",
    ),
    "dropout": (lambda d: d["model"].update(dropout=0.1), "has dropout 0.1"),
    "suffix": (lambda d: d["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "no bytes": (
        lambda d: d.update(pre_tokenizer={"type": "Whitespace"}, model=d["model"]),
        "neither byte-level tokens nor byte fallback",
    ),
    "no merges": (lambda d: d["model"].update(merges=[]), "there are no merges"),
    "a byte missing": (lambda d: d["model"]["vocab"].pop("ß"), "token 'ß' of byte 223 is missing"),
    "words": (
        lambda d: d.update(
            model={"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}
            | {"continuing_subword_prefix": "#", "max_input_chars_per_word": 9}
        ),
        "its model is WordPiece, not BPE",
    ),
    "unigram": (
        lambda d: d.update(model={"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}),
        "its model is Unigram, not BPE",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_powerinfer_cannot_do_is_refused(tmp_path: Path, name: str) -> None:
    edit, part = REFUSALS[name]
    path = kinds.byte_level(tmp_path, "GPT-2", ["<|endoftext|>"])
    change(path, edit)
    with conftest.refused(ExportError, str(path / "tokenizer.json"), part, "use "):
        read_vocabulary(path, 600, {"bos_token_id": 0, "eos_token_id": 0})


def test_bytes_that_ordinary_text_does_without_may_be_missing(tmp_path: Path) -> None:
    """As in SmolLM2's vocabulary, and Falcon's: F5 is in no UTF-8, F1 leads no characters."""
    path = kinds.byte_level(tmp_path, "GPT-2", ["<|endoftext|>"])

    vocab = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert {"Ą", "ñ", "õ"} <= vocab.keys()
    change(path, lambda d: [d["model"]["vocab"].pop(token) for token in ("Ą", "ñ", "õ")])
    vocabulary = read_vocabulary(path, 600, {"bos_token_id": 0, "eos_token_id": 0})
    assert vocabulary.absent_bytes == {0x04, 0xF1, 0xF5}
    assert any("no token of 3 bytes" in w and "(04 F1 F5)" in w for w in vocabulary.warnings)
    assert vocabulary.without_absent("a\x04b\U00040000c") == "abc"
    assert vocabulary.encode("ab") == [vocabulary.ids[b"a"], vocabulary.ids[b"b"]]
    with conftest.refused(DataError, "byte 0x04", "PowerInfer stops", "remove it"):
        vocabulary.encode("a\x04b")


def test_a_byte_piece_that_is_missing_is_refused(tmp_path: Path, tokenizer_bytes: bytes) -> None:
    path = kinds.ranked(tmp_path, tokenizer_bytes)
    change(path, lambda d: d["model"]["vocab"].pop("<0x0A>"))
    with conftest.refused(ExportError, "byte piece <0x0A> is missing", "use another"):
        read_vocabulary(path, 352, {"bos_token_id": 1})


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"normalization_rule_name": "nfkc"}, "normalises text (nfkc)"),
        ({"add_dummy_prefix": False}, "no space before a text"),
        ({"remove_extra_whitespaces": True}, "drops repeated spaces"),
        ({"user_defined_symbols": ["fox"]}, "1 user-defined pieces"),
    ],
)
def test_what_sentencepiece_does_otherwise_is_named(
    tmp_path: Path, changes: dict[str, Any], part: str
) -> None:
    path = kinds.pieces(tmp_path, train(**changes))
    warnings = read_vocabulary(path, 400).warnings
    assert part in warnings[0]
    assert "% of the ids" in warnings[-1]


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    path = kinds.pieces(tmp_path, train(model_type="unigram"))
    with conftest.refused(ExportError, str(path / "tokenizer.model"), "no BPE model", "use a"):
        read_vocabulary(path, 400)


def test_the_tokenizer_says_eos_and_unknown_and_a_config_that_disagrees_is_named(
    tmp_path: Path, tokenizer_bytes: bytes
) -> None:
    config = {"bos_token_id": 0, "eos_token_id": 7, "unk_token_id": [5, 6]}
    found = read_vocabulary(kinds.pieces(tmp_path, tokenizer_bytes), 330, config)
    assert (found.bos_id, found.eos_id, found.unk_id) == (1, 2, 0)
    assert [note.split(",")[0] for note in found.notes] == [
        "config.json has bos_token_id 0",
        "config.json has eos_token_id 7",
        "config.json has unk_token_id 5",
    ]
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<|im_end|>", "unk_token": "</s>"})
    write(tmp_path, "added_tokens.json", CHATML)
    found = read_vocabulary(tmp_path, 330, {"eos_token_id": [2, 320]})
    assert (found.eos_id, found.unk_id, found.notes) == (320, 2, ())


def test_a_bos_that_does_not_control_is_refused_with_the_remedy(
    tmp_path: Path, tokenizer_bytes: bytes
) -> None:
    path = kinds.ranked(tmp_path, tokenizer_bytes)
    write(path, "tokenizer_config.json", {})
    with conftest.refused(ExportError, "BOS is id 0, '<unk>'", "set bos_token in tokenizer_config"):
        read_vocabulary(path, 352, {"bos_token_id": 0})


def test_a_model_without_eos_is_named(tmp_path: Path) -> None:
    path = kinds.byte_level(tmp_path, "GPT-2", ["<|endoftext|>"])
    assert "PowerInfer takes 11" in read_vocabulary(path, 600, {"bos_token_id": 0}).warnings[-1]


damaged = partial(conftest.refused, CheckpointError)


@pytest.mark.parametrize(
    ("added", "part"),
    [
        ({"<a>": -1}, "'<a>' with id -1 is no text with a number"),
        ({"<a>": "1"}, "'<a>' with id '1'"),
        ({"<a>": True}, "'<a>' with id True"),
        ({"": 320}, "'' with id 320"),
        ({"<a>": 320, "<b>": 320}, "id 320 is '<b>' here and '<a>' in another"),
        ({"<a>": 300}, "id 300 is token"),
    ],
)
def test_added_tokens_that_contradict_are_refused(
    tmp_path: Path, tokenizer_bytes: bytes, added: dict[str, Any], part: str
) -> None:
    path = kinds.pieces(tmp_path, tokenizer_bytes)
    write(path, "added_tokens.json", added)
    with damaged(str(path), part, "; "):
        read_vocabulary(path, 330)


@pytest.mark.parametrize("key", ["x", "-1", "9" * 5000, "1.5", ""])
def test_ids_that_are_no_numbers_are_refused(
    tmp_path: Path, tokenizer_bytes: bytes, key: str
) -> None:
    path = kinds.pieces(tmp_path, tokenizer_bytes)
    write(path, "tokenizer_config.json", {"added_tokens_decoder": {key: {"content": "<a>"}}})
    with damaged(str(path / "tokenizer_config.json"), "is no text with a number"):
        read_vocabulary(path, 330)


def test_an_added_token_may_not_repeat_a_piece(tmp_path: Path, tokenizer_bytes: bytes) -> None:
    path = kinds.pieces(tmp_path, tokenizer_bytes)
    write(path, "added_tokens.json", {"</s>": 325})
    with damaged("added token '</s>' has id 325, in tokenizer.model it is 2", "take the entry"):
        read_vocabulary(path, 330)


def test_an_added_token_without_a_row_is_left_out_and_named(
    tmp_path: Path, tokenizer_bytes: bytes
) -> None:
    path = kinds.pieces(tmp_path, tokenizer_bytes)
    write(path, "added_tokens.json", {"[PAD]": 320})
    vocabulary = read_vocabulary(path, 320)
    assert "'[PAD]' has id 320" in vocabulary.notes[0]
    assert vocabulary.differences == ()
    assert b"[PAD]" not in vocabulary.tokens
    write(path, "tokenizer_config.json", {"pad_token": "[PAD]"})
    assert read_vocabulary(path, 320).pad_id == -1
    assert read_vocabulary(path, 330).pad_id == 320
    assert read_vocabulary(path, 320, {"pad_token_id": 0}).pad_id == 0


def test_padding_never_takes_the_name_of_a_token(tmp_path: Path, tokenizer_bytes: bytes) -> None:
    path = kinds.pieces(tmp_path, tokenizer_bytes)
    write(path, "added_tokens.json", {"<pad_322>": 321})
    vocabulary = read_vocabulary(path, 323)
    assert vocabulary.tokens[320:] == [b"<pad_320>", b"<pad_322>", b"<<pad_322>>"]


def test_the_share_counts_what_does_not_match_in_order() -> None:
    def share(ours: list[int], theirs: list[int]) -> float:
        return share_differing(lambda text: ours, lambda text: theirs, ("text",))

    assert share([], []) == share([1, 2], [1, 2]) == 0
    assert share([1, 2, 3], [1, 9, 3]) == pytest.approx(1 / 3)
    assert share([1, 2, 3, 4], [4]) == pytest.approx(3 / 4)
    assert share([], [1]) == share([1], []) == share([1], [2]) == 1
