"""Perplexity in llama.cpp, and what its graph of experts costs: programs that are made up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_programs import FakePrograms
from click.testing import Result
from conftest import refused
from stand_ins import write_program

from common.errors import EngineError
from common.typed_json import plain
from gguf_export.bundle import Bundle, export
from gguf_export.settings import ExportConfig
from powerinfer_bridge.benchmark.run import bench
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.programs.llama_cpp import LlamaCpp, LlamaCppPython

SCORES = """
import os, sys
with open(LOG, 'a+') as log:
    log.seek(0)
    runs = len(log.read().splitlines())
    print(sys.argv[1:], file=log)
sys.stderr.write('0.00.1 I perplexity: calculating perplexity over 2 chunks, n_ctx=32\\n')
lost = runs < LOST
print('[1]8.0000,' + ('' if lost else '[2]VALUE,\\n'))
"""


def perplexity_program(directory: Path, *, value: str = "4.0000", lost: int = 0) -> Path:
    """Write a llama-perplexity that loses its end so many times; return its log."""
    log = directory / "scores"
    body = SCORES.replace("LOG", repr(str(log))).replace("VALUE", value)
    write_program(directory / "llama-perplexity", body.replace("LOST", str(lost)))
    return log


def build(directory: Path) -> LlamaCpp:
    directory.mkdir(exist_ok=True)
    write_program(directory / "llama-bench", "")
    return LlamaCpp(directory, timeout=30)


def test_a_score_is_the_last_estimate_and_its_windows(tmp_path: Path) -> None:
    program = build(tmp_path / "bin")
    log = perplexity_program(tmp_path / "bin")
    score = program.score(tmp_path / "m.gguf", "text", 32, 2, threads=3, n_gpu_layers=9)
    assert score is not None
    assert score.perplexity == 4
    assert score.windows == pytest.approx((math.log(8), 2 * math.log(4) - math.log(8)))
    (said,) = log.read_text().splitlines()
    for option in ("'-c', '32'", "'--chunks', '2'", "'-t', '3'", "'-ngl', '9'"):
        assert option in said


@pytest.mark.parametrize("lost", [1, 4])
def test_an_output_that_lost_its_end_is_asked_for_again(tmp_path: Path, lost: int) -> None:
    program = build(tmp_path / "bin")
    log = perplexity_program(tmp_path / "bin", lost=lost)
    score = program.score(tmp_path / "m.gguf", "text", 32, 2, threads=1)
    assert score is not None
    assert score.perplexity == 4
    assert len(log.read_text().splitlines()) == lost + 1


def test_what_is_never_printed_or_no_number_is_an_error(tmp_path: Path) -> None:
    program = build(tmp_path / "bin")
    perplexity_program(tmp_path / "bin", lost=9)
    with refused(EngineError, "did not print its estimate in 5 runs", "by hand"):
        program.score(tmp_path / "m.gguf", "text", 32, 2, threads=1)
    perplexity_program(tmp_path / "bin", value="nan")
    with refused(EngineError, "llama.cpp's perplexity is nan: it computed wrongly"):
        program.score(tmp_path / "m.gguf", "text", 32, 2, threads=1)


def test_a_build_without_the_program_tells_nothing(tmp_path: Path) -> None:
    program = build(tmp_path / "bin")
    assert program.score(tmp_path / "m.gguf", "text", 32, 2, threads=1) is None


PACKAGE = """
import numpy
__version__ = '9.9'
def llama_supports_gpu_offload(): return False
def llama_print_system_info(): return b'CPU'
def llama_model_get_vocab(model): return 'vocabulary'
def llama_vocab_get_add_bos(vocabulary): return True
class Llama:
    model = 'model'
    def __init__(self, *, model_path, n_ctx, n_batch, n_threads, n_threads_batch, n_gpu_layers,
                 logits_all, verbose):
        assert (n_threads, n_batch, logits_all, verbose) == (2, n_ctx, True, False)
        self.room = n_ctx
    def tokenize(self, text, add_bos, special):
        assert not text.endswith(b'\\n') and not special
        return [1] * add_bos + [letter % 8 for letter in text]
    def token_bos(self): return 1
    def reset(self): self.scores = numpy.full((self.room, 8), -50.0)
    def eval(self, tokens):
        assert tokens[0] == 1 and len(tokens) == self.room
        for place, token in enumerate(tokens):
            self.scores[place, (token + 1) % 8] = SCALE
"""


@pytest.mark.parametrize(("text", "expected"), [("abcdefgh" * 20, 1.0), ("a" * 160, math.exp(50))])
def test_the_package_scores_second_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: float
) -> None:
    """A model that is sure of the next letter of the alphabet, right and wrong."""
    file = tmp_path / "site" / "llama_cpp" / "__init__.py"
    file.parent.mkdir(parents=True)
    file.write_text(PACKAGE.replace("SCALE", "0.0"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    package = LlamaCppPython(timeout=60)
    score = package.score(tmp_path / "m.gguf", f"{text}\n", 16, 5, threads=2)
    assert score.perplexity == pytest.approx(expected)
    assert len(score.windows) == 5
    assert package.score(tmp_path / "m.gguf", text, 16, None, threads=2).windows[4:] != ()
    with refused(EngineError, "its perplexity in llama.cpp is None"):
        package.score(tmp_path / "m.gguf", "ab", 16, None, threads=2)


@pytest.fixture(scope="module")
def files(
    model_dir: Path, exact_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The dense files of both archs."""
    found = {}
    for arch in ("smallthinker", "llama"):
        out = tmp_path_factory.mktemp(arch) / "m.powerinfer.gguf"
        config = ExportConfig(
            model=str(model_dir), predictors=exact_dir, out=out, dense=True, dense_arch=arch
        )
        found[arch] = export(config).dense_file
    return found


@pytest.fixture
def programs(tmp_path: Path) -> FakePrograms:
    made = FakePrograms(tmp_path)
    perplexity_program(made.llama_cpp)
    return made


@pytest.fixture
def settings(programs: FakePrograms, exact_bundle: Bundle, text_file: Path) -> dict[str, Any]:
    return {
        "file": exact_bundle.model_file,
        "powerinfer_bin": programs.powerinfer,
        "llama_cpp_bin": str(programs.llama_cpp),
        "data": str(text_file),
        "context": 32,
        "chunks": 2,
        "generate": 4,
        "repeats": 1,
    }


def codes(document: dict[str, Any]) -> list[str]:
    return [warning["code"] for warning in document["warnings"]]


def test_a_file_of_experts_is_for_llama_cpp_alone(
    settings: dict[str, Any], files: dict[str, Path]
) -> None:
    found = plain(bench(BenchConfig(**settings, dense_gguf=files["smallthinker"])))
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert set(arms) == {"predicted", "all_neurons", "dense_llama_cpp"}
    assert arms["dense_llama_cpp"]["perplexity"] == 4
    assert {"dense-arch", "experts-cost"} <= set(codes(found))
    assert "dense-silu" not in codes(found)


def test_both_archs_tell_what_experts_cost(
    psp: Callable[..., Result], settings: dict[str, Any], files: dict[str, Path], tmp_path: Path
) -> None:
    config = BenchConfig(
        **settings,
        dense_gguf=files["llama"],
        llama_cpp_gguf=files["smallthinker"],
        out=tmp_path / "results",
    )
    found = bench(config)
    assert found.experts_cost == 1
    assert [arm.perplexity for arm in found.arms if arm.dense] == [None, 4, 4]
    warned = codes(plain(found))
    assert "experts-cost" not in warned
    assert warned.count("dense-silu") == 2
    again = bench(BenchConfig(**{**vars(config), "resume": True}))
    assert plain(again)["arms"] == plain(found)["arms"]
    command = ["bench-powerinfer", config.file, "--dense-gguf", files["llama"]]
    command += ["--powerinfer-bin", config.powerinfer_bin, "--llama-cpp-bin", config.llama_cpp_bin]
    command += ["--llama-cpp-gguf", files["smallthinker"], "--data", settings["data"], "--ctx", 32]
    shown = psp(*command, "-n", 4, "--repeats", 1, "--chunks", 2).stdout
    assert "at 1.00 times the speed of arch llama (SiLU, wrong text) here" in shown
    rows = [line.split() for line in shown.splitlines() if line.startswith("llama.cpp, dense")]
    assert [row[-4] for row in rows] == ["4.0000", "4.0000"]


def test_a_report_names_every_arm(
    psp: Callable[..., Result], settings: dict[str, Any], files: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "results"
    settings |= {"dense_gguf": files["llama"], "llama_cpp_gguf": files["smallthinker"]}
    bench(BenchConfig(**settings, out=out))
    page = tmp_path / "page.html"
    assert psp("report", out, "--out", page).exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert "dense, in llama.cpp as arch llama (SiLU)" in text
    assert (
        json.loads((out / "bench.json").read_text())["arms"][-1]["name"] == "dense_llama_cpp_silu"
    )
