"""What files tell llama.cpp of a tokenizer: how words are split, BOS, and the space in front."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizer_kinds as kinds
from conftest import TEXT, ModelMaker
from gguf import GGUFValueType
from rewriting import rewritten
from sentencepiece import sentencepiece_model_pb2

from architectures.checkpoint import Checkpoint
from architectures.rust_tokenizer import RustTokenizer
from common.errors import ExportError
from gguf_export.bundle import Bundle, export
from gguf_export.dense import SingleFile, export_single
from gguf_export.settings import ExportConfig
from gguf_export.smallthinker.contract import open_model_file
from gguf_export.tokens.model_vocabulary import MIXED_TEXTS, read_vocabulary
from gguf_export.tokens.vocabulary import LLAMA_CPP
from gguf_files.reader import GGUFFile
from powerinfer_bridge.engine.expert import ExpertEngine
from powerinfer_bridge.engine.perplexity import engine_perplexity
from powerinfer_bridge.programs.llama_cpp import LlamaCpp
from powerinfer_bridge.verify.verification import verify

PRE, TEMPLATE = "tokenizer.ggml.pre", "tokenizer.chat_template"
BOS, SPACE = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"
TEXTS = ["the quick brown fox", "  twice", "a", *MIXED_TEXTS]
Settings = dict[str, Any]


def single(model: Path, out: Path) -> SingleFile:
    return export_single(ExportConfig(model=str(model), engine="llama.cpp", out=out))


def sparse(model: Path, out: Path) -> Bundle:
    return export(ExportConfig(model=str(model), predictors=Path("none"), out=out))


def flag(path: Path, key: str) -> bool | None:
    found: bool | None = GGUFFile(path).optional(key, GGUFValueType.BOOL, None)
    return found


def digits(document: Settings) -> None:
    """Split texts as SmolLM does."""
    steps = [{"type": "Digits", "individual_digits": True}, document["pre_tokenizer"]]
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


@pytest.fixture
def byte_level(model_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a model with a tokenizer.json that says nothing of BOS."""

    def make(kind: str = "GPT-2", **settings: object) -> Path:
        model, rows = tmp_path / "model", Checkpoint.open(str(model_dir)).shape.vocab_size
        shutil.copytree(model_dir, model, ignore=shutil.ignore_patterns("tokenizer*"))
        kinds.byte_level(model, kind, ["<s>", "</s>"], size=rows)
        named = {"bos_token": "<s>", "eos_token": "</s>", **settings}
        kinds.write(model, "tokenizer_config.json", named)
        return model

    return make


@pytest.fixture
def unprefixed(make_model: ModelMaker, tokenizer_bytes: bytes, tmp_path: Path) -> Path:
    """A model whose tokenizer.model puts no space before a text."""
    model = make_model(tmp_path / "model")
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer_bytes)
    proto.normalizer_spec.add_dummy_prefix = False
    kinds.pieces(model, proto.SerializeToString())
    return model


def own_ids(model: Path) -> list[list[int]]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    found: list[list[int]] = [processor.encode(text) for text in TEXTS]
    return found


def test_a_sparse_file_says_how_texts_are_split_and_is_its_model_again(
    byte_level: Callable[..., Path], tmp_path: Path
) -> None:
    model = byte_level(chat_template="{{ messages }}")
    kinds.change(model, digits)
    file = sparse(model, tmp_path / "m.powerinfer.gguf").model_file
    assert GGUFFile(file).value(PRE, GGUFValueType.STRING) == "smollm"
    assert GGUFFile(file).value(TEMPLATE, GGUFValueType.STRING) == "{{ messages }}"
    ours, theirs = (Checkpoint.open(str(path)).tokenizer() for path in (file, model))
    text = "in 1984 about 12,345.67"
    assert isinstance(ours, RustTokenizer)
    assert isinstance(theirs, RustTokenizer)
    assert ours.split(text) == theirs.split(text)
    assert "345" not in ours.split(text)
    without = Checkpoint.open(
        rewritten(file, tmp_path / "old.gguf", keys={PRE: None}, magic=b"PWRI")
    )
    old = without.tokenizer()
    assert isinstance(old, RustTokenizer)
    assert "345" in old.split(text)
    assert "does not say how its tokenizer splits texts" in without.notes[0]
    assert Checkpoint.open(file).notes == ()
    assert verify(file, str(model), run=False).checks["model tokenizer"].ok


@pytest.mark.powerinfer
def test_the_real_powerinfer_passes_over_what_it_does_not_read(
    powerinfer_bin: Path, byte_level: Callable[..., Path], tmp_path: Path
) -> None:
    model = byte_level(chat_template="{% for m in messages %}" + "x" * 9000 + "{% endfor %}")
    file = sparse(model, tmp_path / "m.powerinfer.gguf").model_file
    bare = rewritten(file, tmp_path / "bare.gguf", keys={PRE: None, TEMPLATE: None}, magic=b"PWRI")
    text = "in 1984 about 12,345.67, isn't it"
    ids = [
        kinds.real_prompt_ids(powerinfer_bin / "main", path, text, tmp_path)
        for path in (file, bare)
    ]
    assert ids[0] == ids[1] == open_model_file(file).vocabulary.prompt_ids(text)


def test_no_space_goes_before_a_text_where_the_model_has_none(
    unprefixed: Path, tmp_path: Path
) -> None:
    made = single(unprefixed, tmp_path / "m.gguf")
    assert flag(made.model_file, SPACE) is False
    assert not [line for line in made.warnings if "space" in line]
    vocabulary = open_model_file(made.model_file).vocabulary
    assert [vocabulary.encode(text) for text in TEXTS] == own_ids(unprefixed)
    assert verify(made.model_file, str(unprefixed), run=False).ok
    again = Checkpoint.open(str(made.model_file)).tokenizer()
    assert [again.encode(text) for text in TEXTS] == own_ids(unprefixed)


def test_a_file_that_gets_another_space_than_its_model_is_found(
    unprefixed: Path, tmp_path: Path
) -> None:
    file = single(unprefixed, tmp_path / "m.gguf").model_file
    other = rewritten(file, tmp_path / "other.gguf", keys={SPACE: None})
    outcome = verify(other, str(unprefixed), run=False).checks["model tokenizer"]
    assert not outcome.ok
    assert "puts a space before a text of this file, the model's tokenizer none" in outcome.line


def test_powerinfer_puts_its_space_whatever_the_key_says(unprefixed: Path, tmp_path: Path) -> None:
    bundle = sparse(unprefixed, tmp_path / "m.powerinfer.gguf")
    file = bundle.model_file
    assert "tokenizer.model puts no space before a text, PowerInfer does" in bundle.warnings
    spaced = open_model_file(file).vocabulary
    assert spaced.encode("the") == spaced.encode(" the", space_prefix=False)
    assert verify(file, str(unprefixed), run=False).checks["model tokenizer"].ok
    again = Checkpoint.open(str(file)).tokenizer()
    assert [again.encode(text) for text in TEXTS] == own_ids(unprefixed)


def test_a_tokenizer_json_of_pieces_says_so_too(tmp_path: Path, tokenizer_bytes: bytes) -> None:
    path = kinds.ranked(tmp_path, tokenizer_bytes, legacy=False)
    config = {"bos_token_id": 1}
    assert read_vocabulary(path, 480, config, engine=LLAMA_CPP).space_prefix
    kinds.change(path, lambda d: d["pre_tokenizer"].update(prepend_scheme="never"))
    found = read_vocabulary(path, 480, config, engine=LLAMA_CPP)
    assert not found.space_prefix
    assert not [line for line in found.warnings if "space" in line]
    assert not read_vocabulary(path, 480, config).space_prefix


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, True), ({"add_bos_token": True}, True), ({"add_bos_token": False}, False)],
)
@pytest.mark.parametrize("kind", ["GPT-2", "Llama-3"])
def test_bos_is_told_also_where_no_file_of_the_model_says(
    byte_level: Callable[..., Path], tmp_path: Path, kind: str, settings: Settings, expected: bool
) -> None:
    model = byte_level(kind, **settings)
    made = single(model, tmp_path / "m.gguf")
    file = made.model_file
    assert flag(file, BOS) is expected
    told = "no file of the model says whether BOS goes before a text"
    assert any(told in line for line in made.warnings) is (not settings)
    assert verify(file, str(model), run=False).checks["model tokenizer"].ok
    wrong = rewritten(file, tmp_path / "wrong.gguf", keys={BOS: not expected})
    outcome = verify(wrong, str(model), run=False).checks["model tokenizer"]
    said = "no BOS before a text of this file, expected BOS"
    assert not outcome.ok
    assert (said if expected else "puts BOS before a text of this file") in outcome.line


def test_a_tokenizer_model_gets_bos(model_dir: Path, tmp_path: Path) -> None:
    file = single(model_dir, tmp_path / "m.gguf").model_file
    assert flag(file, BOS) is True
    old = rewritten(file, tmp_path / "old.gguf", keys={BOS: None})
    assert verify(old, str(model_dir), run=False).ok  # llama.cpp's default is the same


def test_a_gguf_model_that_does_not_say_keeps_what_llama_cpp_takes(
    byte_level: Callable[..., Path], tmp_path: Path
) -> None:
    first = single(byte_level(), tmp_path / "first.gguf").model_file
    silent = rewritten(first, tmp_path / "silent.gguf", keys={BOS: None})
    file = single(silent, tmp_path / "m.gguf").model_file
    assert flag(file, BOS) is False
    assert verify(file, str(silent), run=False).checks["model tokenizer"].ok


def refusals() -> list[Any]:
    nfc = {"normalizer": {"type": "NFC"}}
    return [
        ("normaliser", lambda d: d.update(nfc), "NFC changes texts, which llama.cpp cannot do"),
        ("prefix", lambda d: d["model"].update(end_of_word_suffix="x"), "llama.cpp cannot do"),
    ]


@pytest.mark.parametrize(
    ("edit", "words"), [each[1:] for each in refusals()], ids=[each[0] for each in refusals()]
)
def test_what_llama_cpp_cannot_do_is_said_of_llama_cpp(
    byte_level: Callable[..., Path], tmp_path: Path, edit: Callable[[Settings], None], words: str
) -> None:
    model = byte_level()
    kinds.change(model, edit)
    with pytest.raises(ExportError) as error:
        single(model, tmp_path / "m.gguf")
    assert words in str(error.value)
    assert "PowerInfer" not in str(error.value)
    assert not (tmp_path / "m.gguf").exists()


def test_pieces_that_differ_are_told_of_llama_cpp(
    make_model: ModelMaker, tokenizer_bytes: bytes, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model")
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer_bytes)
    proto.normalizer_spec.remove_extra_whitespaces = True
    kinds.pieces(model, proto.SerializeToString())
    told = single(model, tmp_path / "m.gguf").warnings
    assert "tokenizer.model drops repeated spaces, llama.cpp keeps them" in told
    assert not [line for line in told if "PowerInfer" in line]


IDS = """
import json, sys
import llama_cpp
model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
begun = llama_cpp.llama_vocab_get_add_bos(model._model.vocab)
texts = json.load(sys.stdin)
found = [model.tokenize(text.encode(), add_bos=begun, special=False) for text in texts]
json.dump([begun, found], sys.stdout)
"""


@pytest.mark.llama_cpp
@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
@pytest.mark.parametrize("prefix", [True, False])
def test_the_real_llama_cpp_gives_sentencepiece_s_ids(
    model_dir: Path, unprefixed: Path, tmp_path: Path, prefix: bool
) -> None:
    model = model_dir if prefix else unprefixed
    file = single(model, tmp_path / "m.gguf").model_file
    command = [sys.executable, "-c", IDS, str(file)]
    run = subprocess.run(
        command, input=json.dumps(TEXTS), capture_output=True, text=True, check=True
    )
    begun, found = json.loads(run.stdout)
    assert begun
    assert found == [[1, *ids] for ids in own_ids(model)]


@pytest.mark.llama_cpp
@pytest.mark.parametrize("begun", [True, False])
def test_the_real_llama_cpp_begins_windows_as_the_file_says(
    llama_cpp_bin: Path, make_model: ModelMaker, tmp_path: Path, begun: bool
) -> None:
    model, text = make_model(tmp_path / "model"), TEXT * 8
    kinds.write(model, "tokenizer_config.json", {"bos_token": "<s>", "add_bos_token": begun})
    file = single(model, tmp_path / "m.gguf").model_file
    engine = ExpertEngine(file)
    assert (engine.vocabulary.text_ids("the")[0] == 1) is begun
    score = LlamaCpp(llama_cpp_bin, timeout=300).score(file, text, 64, 4, threads=1)
    if score is None:
        pytest.skip("this llama.cpp build has no llama-perplexity")
    expected = engine_perplexity(engine, text, 64, 4, "engine")
    assert score.perplexity == pytest.approx(expected, 1e-3)
