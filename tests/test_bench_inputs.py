"""What a benchmark is asked: settings that contradict each other, prompts, and hashes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import refused
from xxhash import xxh3_128

from common.errors import DataError, PspError
from common.hashing import hash_file
from gguf_export.bundle import Bundle
from powerinfer_bridge.benchmark.inputs import read_prompts, room_for
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.engine.engine import Engine

FILE, DIRECTORY = Path("m.powerinfer.gguf"), Path("bin")

CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "one token": ({"generate": 1}, "-n is 1, expected a number of at least 2"),
    "no round": ({"repeats": 0}, "--repeats is 0, expected a number of at least 1"),
    "no prompt": ({"prompt": ""}, "the prompt is empty"),
    "no program for the dense model": ({"dense_gguf": FILE}, "pass --powerinfer-bin or"),
    "no model for llama.cpp": ({"llama_cpp_bin": "bin"}, "pass --llama-cpp-gguf or"),
    "no llama.cpp": ({"llama_cpp_gguf": FILE}, "pass --llama-cpp-bin"),
    "nothing to offload": ({"n_gpu_layers": 9}, "--n-gpu-layers 9 is for dense models"),
    "a budget for nobody": ({"vram_budget": "1GiB"}, "pass --powerinfer-bin"),
    "an odd budget": ({"vram_budget": "lots", "powerinfer_bin": DIRECTORY}, "size 'lots'"),
    "no budget": ({"vram_budget": "0", "powerinfer_bin": DIRECTORY}, "such as 24GiB"),
    "resume nowhere": ({"resume": True}, "pass --out"),
    "force nowhere": ({"force": True}, "pass --out"),
    "both": ({"resume": True, "force": True, "out": DIRECTORY}, "pass one of them"),
    "no time": ({"timeout": 0.0}, "--timeout is 0, expected a number above 0"),
    "nan": ({"timeout": float("nan")}, "--timeout is nan, expected a number above 0"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused(name: str) -> None:
    settings, problem = CONTRADICTIONS[name]
    with refused(PspError, problem):
        BenchConfig(file=FILE, **settings)


def test_settings_are_recorded_but_for_where_results_go() -> None:
    config = BenchConfig(file=FILE, out=DIRECTORY, resume=True, timeout=5.0)
    assert json.loads(json.dumps(config.document())) == config.document()
    assert not {"out", "resume", "force"} & set(config.document())
    assert config.document()["file"] == str(FILE)
    assert set(config.document()) - set(config.identity()) == {"timeout", "hardware"}


def prompts_of(path: Path, **settings: Any) -> list[str]:
    return read_prompts(BenchConfig(file=FILE, prompts=path, **settings))


def test_a_text_file_holds_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("The \r\n\n  \ndef f(x):\n\tÜ\u2028x".encode())
    assert prompts_of(path) == ["The ", "def f(x):", "\tÜ\u2028x"]


def test_a_structured_file_holds_prompts_of_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"q": "one\\ntwo"}\n\n{"q": "three"}\n')
    assert prompts_of(path, field="q") == ["one\ntwo", "three"]
    with refused(DataError, "no text under 'text'", "--field"):
        prompts_of(path)


@pytest.mark.parametrize("content", [b"", b"\n\n", b" \n\t\n"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    with refused(DataError, "p.txt: holds no prompt; write one a line"):
        prompts_of(tmp_path / "p.txt")


def test_prompts_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with refused(DataError, "no such file; check --prompts"):
        prompts_of(tmp_path / "nowhere.txt")
    with refused(DataError, "no such file; check --prompts"):
        prompts_of(tmp_path)
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe")
    with refused(DataError, "not UTF-8", "convert"):
        prompts_of(tmp_path / "p.txt")
    (tmp_path / "p.md").write_text("x")
    with refused(DataError, "p.md: unknown kind"):
        prompts_of(tmp_path / "p.md")
    (tmp_path / "p.txt").write_bytes(b"one\ntwo\x00three")
    with refused(DataError, "prompt 2 holds a NUL"):
        prompts_of(tmp_path / "p.txt")
    with refused(DataError, "--prompt: prompt 1 holds a NUL"):
        read_prompts(BenchConfig(file=FILE, prompt="a\0b"))


def test_the_longest_prompt_decides_the_room(exact_bundle: Bundle) -> None:
    engine = Engine(exact_bundle.model_file)
    longest = len(engine.vocabulary.prompt_ids("The quick brown"))
    assert room_for(["The", "The quick brown", "x"], engine.vocabulary, 5, 128) == longest + 5
    with refused(DataError, f"need {longest + 5} tokens, the model's context is 7", "lower -n"):
        room_for(["The quick brown"], engine.vocabulary, 5, 7)


def test_a_file_is_hashed_piece_by_piece(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(data := bytes(range(100)))
    assert hash_file(tmp_path / "f", piece=7) == (100, xxh3_128(data).hexdigest())
    with refused(DataError, "nowhere", "check that"):
        hash_file(tmp_path / "nowhere")


def test_a_llama_cpp_of_the_environment_alone_is_not_asked_for_a_model(
    psp: Callable[..., Result],
    exact_bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PSP_LLAMA_CPP_BIN", str(tmp_path))
    command = ["bench-powerinfer", exact_bundle.model_file, "--ctx", 64, "--chunks", 1, "-n", 2]
    command += ["--repeats", 1, "--warm-up", 0, "--threads", 1]
    assert psp(*command).exit_code == 0
    asked = psp(*command, "--llama-cpp-gguf", exact_bundle.model_file)
    assert asked.exit_code == 1
    assert f"{tmp_path}/llama-bench" in asked.stderr
    named = psp(*command, "--llama-cpp-bin", tmp_path)
    assert "no model for llama.cpp" in named.stderr


def test_hardware_that_there_is_not_is_refused_at_once(
    psp: Callable[..., Result], exact_bundle: Bundle
) -> None:
    result = psp("bench-powerinfer", exact_bundle.model_file, "--hardware", "abacus")
    assert result.exit_code == 1
    assert "hardware 'abacus'" in result.stderr
