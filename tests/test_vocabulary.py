"""The tokenizer inside an exported file against SentencePiece itself, and broken vocabularies."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from conftest import TEXT
from gguf import GGUFWriter, TokenType
from tokenizer_kinds import real_prompt_ids

from common.errors import FormatError
from gguf_export.bundle import Bundle
from gguf_export.tokens.encoders import characters
from gguf_export.tokens.model_vocabulary import MIXED_TEXTS
from gguf_export.tokens.vocabulary import Vocabulary, read_file_vocabulary
from gguf_files.reader import GGUFFile

CORPUS = [
    TEXT,
    "a",
    " ",
    "   ",
    " leading",
    "  two leading and trailing  ",
    "trailing   ",
    "a  b   c    d",
    "\t\ttabs\tand \t spaces",
    "\n",
    "\n\nlines\r\nand\rreturns\n",
    "control \x01\x02\x07\x1b[0m\x7f characters",
    "naïve Café, Ångström, e\u0301 and \u200b nothing",
    "中文字符，夹杂 english 和数字123",
    "emoji 😀 👩‍👩‍👧 🇫🇷",
    "\u2581already \u2581\u2581 a piece's own space",
    "\ufffd \ufeff \uffff \U0010ffff",
    "<s> </s> <unk> <0x41> <pad_320>",
    "def f(x):\n\treturn {'y': x ** 2, \"z\": [*range(10)]}  # the end",
    "thethethe the  the inininre",
]
RANGES = [(0x20, 0x7E), (0xA1, 0x17F), (0x370, 0x3FF), (0x4E00, 0x4FFF), (0x1F300, 0x1F5FF)]


def random_texts(count: int) -> Iterator[str]:
    """Yield strings of familiar fragments and of characters from all over Unicode."""
    generator = random.Random(0)
    words = [*TEXT.split(), " ", "  ", "\n", "\t"]
    for _ in range(count):
        parts = []
        for _ in range(generator.randrange(1, 12)):
            if generator.random() < 0.5:
                parts.append(generator.choice(words))
            else:
                low, high = generator.choice(RANGES)
                parts.append("".join(chr(generator.randint(low, high)) for _ in range(3)))
        yield "".join(parts)


TEXTS = [*CORPUS, *random_texts(300)]


@pytest.fixture(scope="module")
def vocabulary(exact_bundle: Bundle) -> Vocabulary:
    return read_file_vocabulary(GGUFFile(exact_bundle.model_file))


@pytest.fixture(scope="module")
def reference(tokenizer_bytes: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer_bytes)


def test_every_text_gives_sentencepiece_s_own_tokens(
    vocabulary: Vocabulary, reference: sentencepiece.SentencePieceProcessor
) -> None:
    for text in TEXTS:
        assert vocabulary.encode(text) == reference.encode(text), repr(text)
    used = {token for text in TEXTS for token in vocabulary.encode(text)}
    assert len([token for token in used if token >= 259]) > 50, "the corpus must use real pieces"


def test_a_nul_is_a_byte_like_any_other(
    vocabulary: Vocabulary, reference: sentencepiece.SentencePieceProcessor
) -> None:
    assert vocabulary.encode("a\0b") == reference.encode("a\0b")
    assert vocabulary.decode(vocabulary.encode("a\0b")) == b" a\0b"


def test_decoding_inverts_encoding(vocabulary: Vocabulary) -> None:
    for text in TEXTS:
        # U+2581 stands for a space inside the vocabulary, so it comes back as one.
        expected = text.replace("\u2581", " ").encode()
        assert vocabulary.decode(vocabulary.encode(text)) == b" " + expected, repr(text)
        assert vocabulary.decode(vocabulary.encode(text, space_prefix=False)) == expected


def test_without_the_prefix_a_text_is_encoded_as_it_is_inside_a_longer_one(
    vocabulary: Vocabulary, reference: sentencepiece.SentencePieceProcessor
) -> None:
    # No piece holds a newline, so what follows one is encoded without a space in front.
    newline = reference.encode("\n")
    for text in TEXTS:
        assert newline + vocabulary.encode(text, space_prefix=False) == reference.encode(
            "\n" + text
        ), repr(text)


def test_the_prefix_changes_the_first_token(vocabulary: Vocabulary) -> None:
    with_prefix, without = vocabulary.encode("the"), vocabulary.encode("the", space_prefix=False)
    assert vocabulary.tokens[with_prefix[0]] == "\u2581the".encode()
    assert [vocabulary.tokens[token] for token in without] == [b"t", b"he"]


def test_no_text_is_no_token(vocabulary: Vocabulary) -> None:
    assert vocabulary.encode("") == []
    assert vocabulary.encode("", space_prefix=False) == []
    assert vocabulary.decode([]) == b""


def test_bytes_that_are_no_utf_8_survive(vocabulary: Vocabulary) -> None:
    broken = b"ok \xff\xfe\xc3( \xe4\xb8"
    text = broken.decode("utf-8", "surrogateescape")
    assert vocabulary.decode(vocabulary.encode(text, space_prefix=False)) == broken


def test_control_tokens_decode_to_nothing_and_unknown_to_a_block(
    vocabulary: Vocabulary,
) -> None:
    assert vocabulary.bos_id == 1
    assert vocabulary.decode([1, 2]) == b""
    assert vocabulary.decode([0]) == "\u2585".encode()


PIECES: list[tuple[str, float, TokenType]] = [
    ("<unk>", 0.0, TokenType.UNKNOWN),
    ("<s>", 0.0, TokenType.CONTROL),
    *((f"<0x{byte:02X}>", 0.0, TokenType.BYTE) for byte in range(256)),
    ("\u2581", -1.0, TokenType.NORMAL),
    ("a", -2.0, TokenType.NORMAL),
    ("b", -3.0, TokenType.NORMAL),
    ("ab", -4.0, TokenType.NORMAL),
    ("ba", -4.0, TokenType.NORMAL),
]


def keys(pieces: list[tuple[str, float, TokenType]] = PIECES, **changes: Any) -> dict[str, Any]:
    """Return the tokenizer's keys; a change to None leaves a key out."""
    tokens, scores, types = zip(*pieces, strict=True)
    made = {
        "model": "llama",
        "tokens": list(tokens),
        "scores": list(scores),
        "token_type": [int(kind) for kind in types],
        "bos_token_id": 1,
    }
    return {key: value for key, value in (made | changes).items() if value is not None}


def read(path: Path, found: dict[str, Any]) -> Vocabulary:
    """Write a PWRI file that holds tokenizer keys alone, and read its vocabulary."""
    writer = GGUFWriter(path, "llama")
    for name, value in found.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    path.write_bytes(b"PWRI" + path.read_bytes()[4:])
    return read_file_vocabulary(GGUFFile(path))


def test_the_best_score_merges_first_and_the_leftmost_among_equals(tmp_path: Path) -> None:
    vocabulary = read(tmp_path / "v.gguf", keys())
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}

    def encode(text: str) -> list[int]:
        return vocabulary.encode(text, space_prefix=False)

    assert encode("aba") == [ids[b"ab"], ids[b"a"]]
    assert encode("bab") == [ids[b"ba"], ids[b"b"]]
    assert encode("abab") == [ids[b"ab"], ids[b"ab"]]
    assert encode("c") == [ids[b"<0x63>"]]
    better = read(tmp_path / "w.gguf", keys([*PIECES[:-1], ("ba", -3.5, TokenType.NORMAL)]))
    assert better.encode("aba", space_prefix=False) == [ids[b"a"], ids[b"ba"]]


def test_bos_and_special_tokens_are_main_s_and_perplexity_s(vocabulary: Vocabulary) -> None:
    assert vocabulary.bos == vocabulary.bos_id
    assert vocabulary.text_ids("the") == [1, *vocabulary.encode("the")]
    assert vocabulary.text_ids("") == vocabulary.prompt_ids("") == [1]
    t_he = vocabulary.encode("the", space_prefix=False)
    newline = vocabulary.tokens.index(b"<0x0A>")
    expected = [1, *t_he, 2, *t_he, newline, 0]
    assert vocabulary.prompt_ids("the</s>the<0x0A><unk>") == expected
    assert vocabulary.prompt_ids("</s>") == [1, 2]
    assert 2 not in vocabulary.text_ids("the</s>the")


@pytest.mark.powerinfer
@pytest.mark.parametrize("text", ["the</s>the<0x0A> <unk>x<pad_319>", *MIXED_TEXTS])
def test_real_prompt_ids_are_the_files(
    powerinfer_bin: Path,
    exact_bundle: Bundle,
    vocabulary: Vocabulary,
    tmp_path: Path,
    text: str,
) -> None:
    real = real_prompt_ids(powerinfer_bin / "main", exact_bundle.model_file, text, tmp_path)
    assert real == vocabulary.prompt_ids(text)


def test_characters_are_as_long_as_their_first_byte_says() -> None:
    cut = ["a", "é", "▁", "😀", "\n"]
    assert characters("".join(cut).encode()) == [each.encode() for each in cut]
    assert characters(b"\x96a\xc3\n\xe2\xe2a\xff") == [
        b"\x96",
        b"a",
        b"\xc3\n",
        b"\xe2\xe2a",
        b"\xff",
    ]


@pytest.mark.parametrize("text", ["word " * 200_000, "ab" * 500_000])
def test_a_megabyte_takes_seconds(vocabulary: Vocabulary, tmp_path: Path, text: str) -> None:
    start = time.perf_counter()
    assert len(vocabulary.encode(text)) >= 200_000
    large = read(tmp_path / "v.gguf", keys())
    assert len(large.encode(text)) >= 200_000
    assert time.perf_counter() - start < 60


def test_without_a_key_bos_is_powerinfers(tmp_path: Path) -> None:
    """PowerInfer@d3ebd7c llama.cpp:llm_load_vocab; its converter writes none for Falcon."""
    assert read(tmp_path / "v.gguf", keys(bos_token_id=None)).bos_id == 1


def without(token: str) -> list[tuple[str, float, TokenType]]:
    return [piece for piece in PIECES if piece[0] != token]


@pytest.mark.parametrize(
    ("found", "thing"),
    [
        (keys(model=None), "key tokenizer.ggml.model is missing"),
        (keys(tokens=None), "key tokenizer.ggml.tokens is missing"),
        (keys(scores=None), "key tokenizer.ggml.scores is missing"),
        (keys(token_type=None), "key tokenizer.ggml.token_type is missing"),
        (keys(model="gpt2"), "key tokenizer.ggml.merges is missing"),
        (keys(model="bert"), "tokenizer 'bert' is not supported, expected 'llama' or 'gpt2'"),
        (keys(tokens=list(range(10))), "tokenizer.ggml.tokens is INT32, expected STRING"),
        (keys(scores=["x"]), "tokenizer.ggml.scores is STRING, expected FLOAT32"),
        (keys(bos_token_id="<s>"), "tokenizer.ggml.bos_token_id is STRING, expected UINT32"),
        (keys(scores=[0.0]), "tokens, scores and types differ in number"),
        (keys(token_type=[1, 1]), "tokens, scores and types differ in number"),
        (keys([*PIECES, PIECES[-1]]), "'ba' appears twice"),
        (keys(without("<0x0A>")), "byte piece <0x0A> is missing"),
        (keys(bos_token_id=len(PIECES)), f"bos_token_id {len(PIECES)} is outside"),
        (keys(bos_token_id=2**32 - 1), "bos_token_id 4294967295 is outside"),
        (keys([*PIECES, ("no byte", 0.0, TokenType.BYTE)]), "'no byte'"),
    ],
)
def test_a_broken_vocabulary_is_refused_by_name(
    tmp_path: Path, found: dict[str, Any], thing: str
) -> None:
    path = tmp_path / "broken.powerinfer.gguf"
    with pytest.raises(FormatError) as caught:
        read(path, found)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{path}: ")
    assert thing in message
    problem, _, remedy = message.rpartition("; ")
    assert problem, f"no remedy in {message!r}"
    assert remedy
