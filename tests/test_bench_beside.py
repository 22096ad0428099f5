"""Files that a benchmark measures beside the sparse one: of its model, and of its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench_programs import FakePrograms
from conftest import ModelMaker, refused
from gguf import TokenType
from rewriting import rewritten

from common.errors import FormatError
from gguf_export.bundle import Bundle
from gguf_export.dense import export_single
from gguf_export.settings import ExportConfig
from gguf_files.reader import GGUFFile
from powerinfer_bridge.benchmark.beside import same_model
from powerinfer_bridge.benchmark.run import bench
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.benchmark.table import bench_table

FINGERPRINT = "psp.model_fingerprint"
TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
Settings = dict[str, Any]


def exported(model: Path, out: Path) -> Path:
    config = ExportConfig(model=str(model), engine="llama.cpp", out=out)
    return export_single(config).model_file


@pytest.fixture(scope="module")
def dense(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(model_dir, tmp_path_factory.mktemp("dense") / "m.gguf")


@pytest.fixture
def settings(exact_bundle: Bundle, text_file: Path, tmp_path: Path) -> Settings:
    programs = FakePrograms(tmp_path / "programs")
    return {
        "file": exact_bundle.model_file,
        "llama_cpp_bin": str(programs.llama_cpp),
        "data": str(text_file),
        "context": 32,
        "chunks": 1,
        "generate": 4,
        "repeats": 1,
        "warm_up": 0,
    }


def renamed(path: Path, number: int, token: bytes, kind: TokenType | None = None) -> Settings:
    """Return the keys of a vocabulary with another token, of a type if one is named."""
    values = GGUFFile(path).values
    tokens, types = list(values[TOKENS].data), [int(each) for each in values[TYPES].data]
    tokens[number] = token
    if kind is not None:
        types[number] = int(kind)
    return {TOKENS: [each.decode() for each in tokens], TYPES: types}


@pytest.mark.parametrize("option", ["llama_cpp_gguf", "dense_gguf"])
def test_another_model_s_file_is_refused(
    settings: Settings, make_model: ModelMaker, tmp_path: Path, option: str
) -> None:
    file = exported(make_model(tmp_path / "other", seed=9), tmp_path / "other.gguf")
    with refused(FormatError, str(file), "another model", str(settings["file"]), "; pass a file"):
        bench(BenchConfig(**(settings | {option: file})))


@pytest.mark.parametrize("option", ["llama_cpp_gguf", "dense_gguf"])
def test_another_vocabulary_is_refused(
    settings: Settings, dense: Path, tmp_path: Path, option: str
) -> None:
    keys = renamed(dense, 300, b"another")
    file = rewritten(dense, tmp_path / "other.gguf", keys=keys)
    with refused(FormatError, str(file), "other tokens", "not be comparable", "; pass a file"):
        bench(BenchConfig(**(settings | {option: file})))


def test_what_only_fills_rows_is_no_vocabulary(dense: Path, tmp_path: Path) -> None:
    """Converters name such tokens differently."""
    filled: list[Path] = []
    for name in (b"[PAD300]", b"<pad 300>"):
        keys = renamed(dense, 300, name, TokenType.UNUSED)
        filled.append(rewritten(dense, tmp_path / f"{len(filled)}.gguf", keys=keys))
    assert same_model(*map(GGUFFile, filled))
    with refused(FormatError, "other tokens"):
        same_model(GGUFFile(dense), GGUFFile(filled[0]))


def test_other_merges_are_another_vocabulary(dense: Path, tmp_path: Path) -> None:
    merged = rewritten(dense, tmp_path / "merged.gguf")
    file = GGUFFile(merged)
    file.values["tokenizer.ggml.merges"] = file.values[TOKENS]
    with refused(FormatError, "other merges"):
        same_model(file, GGUFFile(dense))


def test_a_file_that_names_no_model_is_told_once(
    settings: Settings, dense: Path, tmp_path: Path
) -> None:
    """In the table and in the document, though two arms of it are looked at."""
    unnamed = rewritten(dense, tmp_path / "unnamed.gguf", keys={FINGERPRINT: None})
    for name, told in ((unnamed, 1), (dense, 0)):
        found = bench(BenchConfig(**settings, dense_gguf=name))
        texts = [each.text for each in found.warnings if each.code == "unknown-model"]
        assert len(texts) == told
        assert all(text.startswith(f"{name}: ") for text in texts)
        assert bench_table(found).count("which model it was made from") == told
