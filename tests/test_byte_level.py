"""Byte-level vocabularies inside a file: ids, texts and BOS as PowerInfer has them."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizer_kinds as kinds
from conftest import TEXT, ModelMaker, exact, make_export, refused, write_predictors
from gguf import TokenType
from test_vocabulary import read
from tokenizers import Tokenizer

from common.errors import DataError, FormatError
from gguf_export.bundle import Bundle
from gguf_export.tokens.encoders import BYTE_TOKENS
from gguf_export.tokens.model_vocabulary import MIXED_TEXTS, read_vocabulary
from gguf_export.tokens.vocabulary import Vocabulary
from powerinfer_bridge.engine.engine import Engine, generate
from powerinfer_bridge.engine.perplexity import engine_perplexity
from powerinfer_bridge.programs.powerinfer import PowerInfer
from powerinfer_bridge.verify.verification import verify

ROWS = 640
CONFIG = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}


@pytest.fixture(scope="module")
def opt_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kinds.opt(tmp_path_factory.mktemp("opt"))


@pytest.fixture(scope="module")
def vocabulary(opt_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path = tmp_path_factory.mktemp("file") / "v.powerinfer.gguf"
    return kinds.file_of(read_vocabulary(opt_dir, ROWS, CONFIG), path)


@pytest.fixture(scope="module")
def bundle(
    make_model: ModelMaker, opt_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Bundle]:
    """A LLaMA with OPT's kind of tokenizer, and its export."""
    path = tmp_path_factory.mktemp("bundle")
    model = make_model(path / "m", vocab_size=ROWS, bos_token_id=2, eos_token_id=2)
    (model / "tokenizer.model").unlink()
    for file in opt_dir.iterdir():
        shutil.copy(file, model)
    write_predictors(model, path / "predictors", exact)
    return model, make_export(model, path / "predictors", path / "m.powerinfer.gguf")


def test_decoding_inverts_encoding(vocabulary: Vocabulary) -> None:
    for text in (TEXT, *MIXED_TEXTS):
        assert vocabulary.decode(vocabulary.encode(text)) == text.encode()


def test_where_words_are_split_alike_ids_are_those_of_transformers(
    vocabulary: Vocabulary, opt_dir: Path
) -> None:
    from transformers import GPT2Tokenizer

    theirs = GPT2Tokenizer.from_pretrained(str(opt_dir))
    for text in (
        "The quick brown fox jumps",
        "I'll say it's 1984",
        "中文字符 кириллица",
        "a   b  c",
    ):
        assert vocabulary.encode(text) == theirs.encode(text, add_special_tokens=False), text


def test_no_bos_is_put_before_a_text(vocabulary: Vocabulary) -> None:
    assert vocabulary.bos is None
    assert vocabulary.bos_id == 2
    assert vocabulary.text_ids("the") == vocabulary.encode("the", space_prefix=True)
    assert vocabulary.text_ids("the") == vocabulary.encode("the", space_prefix=False)
    assert vocabulary.text_ids("") == []
    assert vocabulary.prompt_ids("") == [2], "main evaluates BOS rather than nothing"


def test_prompts_have_their_special_tokens_found(vocabulary: Vocabulary) -> None:
    the = vocabulary.encode("the")
    assert vocabulary.prompt_ids("the</s>the<pad>") == [*the, 2, *the, 1]
    assert 2 not in vocabulary.encode("the</s>the")
    assert {b"<s>", b"</s>", b"<pad>", b"<unk>"} <= vocabulary.special_tokens.keys()


def test_special_tokens_print_nothing(vocabulary: Vocabulary) -> None:
    assert vocabulary.decode([2, 1, ROWS - 1]) == b""


def test_a_text_at_which_powerinfer_stops_is_refused(vocabulary: Vocabulary) -> None:
    with refused(DataError, "no UTF-8", "convert it"):
        vocabulary.encode(b"ok \xff".decode("utf-8", "surrogateescape"))
    with refused(DataError, "surrogate", "mend"):
        vocabulary.encode("\ud800")


BYTES = [(character, 0.0, TokenType.NORMAL) for character in BYTE_TOKENS]
SPECIAL = [("<|end|>", 0.0, TokenType.CONTROL)]


def keys(tokens: list[Any], merges: list[Any] | None, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model": "gpt2",
        "tokens": [text for text, _, _ in tokens],
        "merges": merges,
    }
    found |= {"token_type": [int(kind) for _, _, kind in tokens], "bos_token_id": 256}
    return {key: value for key, value in (found | changes).items() if value is not None}


ABC = [("ab", 0.0, TokenType.NORMAL), ("bc", 0.0, TokenType.NORMAL)]


def test_the_first_merge_of_the_list_goes_first(tmp_path: Path) -> None:
    tokens = BYTES + SPECIAL + ABC
    a, c = BYTE_TOKENS.index("a"), BYTE_TOKENS.index("c")
    for merges, expected in ((["a b", "b c"], [257, c]), (["b c", "a b", "b c"], [a, 258])):
        vocabulary = read(tmp_path / "v.gguf", keys(tokens, merges))
        assert vocabulary.encode("abc") == expected


@pytest.mark.parametrize(
    ("found", "thing"),
    [
        (keys(BYTES + SPECIAL + ABC, None), "key tokenizer.ggml.merges is missing"),
        (keys(BYTES + SPECIAL + ABC, [1, 2]), "merges is INT32, expected STRING"),
        (keys(BYTES + SPECIAL + ABC, ["a b", "ab"]), "merge 'ab' does not name two tokens"),
        (keys(BYTES + SPECIAL + ABC, ["a xy"]), "merge 'a xy' does not name two tokens"),
        (keys(BYTES + SPECIAL + ABC, [" a b"]), "merge ' a b' does not name"),
        (keys(BYTES + SPECIAL + ABC, ["a c"]), "merge 'a c' makes no token"),
        (keys(BYTES + SPECIAL + ABC, ["a " + "b" * 100_000]), "does not name two tokens"),
        (keys(BYTES[:-1] + SPECIAL, ["a b"], bos_token_id=0), "merge 'a b' makes no token"),
        (keys([b for b in BYTES if b[0] != "Ċ"] + SPECIAL + ABC, ["a b"]), "token 'Ċ' of byte 10"),
        (keys(BYTES + SPECIAL + ABC + ABC[:1], ["a b"]), "token 'ab' appears twice"),
        (keys([*BYTES, *SPECIAL, ("a b", 0, TokenType.NORMAL)], ["a b"]), "not spelt in GPT-2's"),
        (keys([*BYTES, *SPECIAL, (b"\xff", 0, TokenType.NORMAL)], ["a b"]), "is no UTF-8"),
        (keys([*BYTES, *SPECIAL, ("a\0b", 0, TokenType.CONTROL)], ["a b"]), "holds a NUL"),
        (keys(BYTES + SPECIAL + ABC, ["a b"], token_type=[1]), "types differ in number"),
        (keys(BYTES + SPECIAL + ABC, ["a b"], bos_token_id=300), "bos_token_id 300 is outside"),
    ],
)
def test_a_broken_vocabulary_is_refused_by_name(
    tmp_path: Path, found: dict[str, Any], thing: str
) -> None:
    with refused(FormatError, thing, "export the file again"):
        read(tmp_path / "broken.powerinfer.gguf", found)


def test_a_vocabulary_of_long_tokens_costs_little(tmp_path: Path) -> None:
    long = [("é" * 2**number, 0.0, TokenType.CONTROL) for number in range(3, 18)]
    vocabulary = read(tmp_path / "v.gguf", keys([*BYTES, *SPECIAL, *ABC, *long], ["a b"]))
    start = time.perf_counter()
    assert vocabulary.prompt_ids("é" * 16 + "ab<|end|>") == [259, 259, 257, 256], (
        "é * 16 is made of two other tokens"
    )
    assert time.perf_counter() - start < 10


def test_an_export_passes_its_checks_against_the_model(bundle: tuple[Path, Bundle]) -> None:
    model, exported = bundle
    assert any("splits words only almost as GPT-2" in line for line in exported.warnings)
    document = verify(exported.model_file, str(model), context=64, chunks=1).document()
    assert document["ok"], document
    details = {check["name"]: check["detail"] for check in document["checks"]}
    assert details["tokenizer"].startswith("byte-level, ")
    assert re.search(
        r"the model's vocabulary; \d+\.\d\d% of ids differ: ", details["model tokenizer"]
    )


def test_other_merges_than_the_models_are_told(bundle: tuple[Path, Bundle], tmp_path: Path) -> None:
    model, exported = bundle
    other = tmp_path / "other"
    shutil.copytree(model, other)
    lines = (model / "merges.txt").read_text(encoding="utf-8").splitlines()
    lines[1], lines[2] = lines[2], lines[1]
    (other / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    checks = verify(exported.model_file, str(other), context=64, chunks=1).document()["checks"]
    assert [check["detail"] for check in checks if check["name"] == "model tokenizer"] == [
        "tokenizer: merges differ from the model's; export it again"
    ]


@pytest.mark.powerinfer
def test_real_perplexity_is_the_engines(powerinfer_bin: Path, bundle: tuple[Path, Bundle]) -> None:
    file, text = bundle[1].model_file, TEXT * 6 + "\n".join(MIXED_TEXTS)
    real = PowerInfer(powerinfer_bin).perplexity(file, text, 64, None, threads=1)
    ours = engine_perplexity(Engine(file), text, 64, None, "engine")
    assert math.isclose(real, ours, rel_tol=2e-4), (real, ours)


@pytest.mark.powerinfer
def test_real_powerinfer_reads_a_vocabulary_without_some_bytes_and_stops_at_them(
    powerinfer_bin: Path, bundle: tuple[Path, Bundle], tmp_path: Path
) -> None:
    model, exported = tmp_path / "m", tmp_path / "m.powerinfer.gguf"
    shutil.copytree(bundle[0], model)
    vocab = json.loads((model / "vocab.json").read_text(encoding="utf-8"))
    del vocab["ć"], vocab["õ"]  # bytes 07 and F5
    (model / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    write_predictors(model, tmp_path / "predictors", exact)
    make_export(model, tmp_path / "predictors", exported)
    vocabulary, main = Engine(exported).vocabulary, powerinfer_bin / "main"
    assert vocabulary.absent_bytes == {0x07, 0xF5}
    text = vocabulary.without_absent("".join(MIXED_TEXTS[9:13]))
    assert kinds.real_prompt_ids(main, exported, text, tmp_path) == vocabulary.prompt_ids(text)
    with pytest.raises(subprocess.CalledProcessError) as stopped:
        kinds.real_prompt_ids(main, exported, "a\x07b", tmp_path)
    assert b"byte not found in vocab" in stopped.value.stderr


@pytest.mark.powerinfer
def test_real_text_is_the_engines(powerinfer_bin: Path, bundle: tuple[Path, Bundle]) -> None:
    file, prompt = bundle[1].model_file, "def f(x):\n  return 's'</s>I'll"
    run = PowerInfer(powerinfer_bin).generate(file, prompt, 12, threads=1)
    assert run.text is not None
    assert run.text.endswith(generate(Engine(file), prompt, 12).text)


@pytest.mark.powerinfer
@pytest.mark.parametrize("text", ["a</s>b<pad>", *MIXED_TEXTS])
def test_real_prompt_ids_are_the_files(
    powerinfer_bin: Path, bundle: tuple[Path, Bundle], tmp_path: Path, text: str
) -> None:
    file, vocabulary = bundle[1].model_file, Engine(bundle[1].model_file).vocabulary
    real = kinds.real_prompt_ids(powerinfer_bin / "main", file, text, tmp_path)
    assert real == vocabulary.prompt_ids(text)


def test_a_tokenizer_json_gives_the_same_file_as_the_pair(opt_dir: Path, tmp_path: Path) -> None:
    """The two layouts hold the same tokenizer."""
    model = json.loads((opt_dir / "vocab.json").read_text(encoding="utf-8"))
    single = kinds.byte_level(tmp_path, "GPT-2", ["<s>", "<pad>", "</s>", "<unk>"])
    assert Tokenizer.from_file(str(single / "tokenizer.json")).get_vocab() == model
