"""The package llama-cpp-python: a stand-in with its face, and the real one where installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from conftest import refused
from stand_ins import in_one_line

from common.errors import EngineError
from gguf_export.bundle import export
from gguf_export.settings import ExportConfig
from powerinfer_bridge.benchmark.settings import PYTHON, BenchConfig
from powerinfer_bridge.benchmark.setup import open_programs
from powerinfer_bridge.programs.llama_cpp import LlamaCppPython

PACKAGE = """
import sys, time
__version__ = '9.9'
print('package speaks')
def llama_supports_gpu_offload(): return False
def llama_print_system_info(): return b'CPU : AVX2 = 1 | '
def llama_synchronize(ctx): assert ctx == 'ctx'
class Llama:
    ctx = 'ctx'
    def __init__(self, *, model_path, n_ctx, n_threads, n_threads_batch, n_gpu_layers, verbose):
        assert (n_threads, n_threads_batch, verbose) == (2, 2, False)
        self.room = n_ctx
    def n_vocab(self): return 100
    def reset(self): self.used = 0
    used = 0
    def eval(self, tokens):
        self.used += len(tokens)
        assert self.used <= self.room and all(0 <= token < 100 for token in tokens)
        time.sleep(0.002 * len(tokens))
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name, which this process finds and the worker imports."""
    file = tmp_path / "site" / "llama_cpp" / "__init__.py"
    file.parent.mkdir(parents=True)
    file.write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    return file


def test_a_model_is_timed_after_a_warm_up(package: Path, tmp_path: Path) -> None:
    sample = LlamaCppPython(timeout=60).bench(tmp_path / "m.gguf", 20, 16, threads=2)
    assert sample.prompt is not None
    assert (sample.prompt.tokens, sample.decode.tokens) == (20, 16)
    assert 0.04 <= sample.prompt.seconds < 10
    assert 0.032 <= sample.decode.seconds < 10
    assert sample.load_seconds is not None
    assert sample.wall_seconds > sample.prompt.seconds + sample.decode.seconds
    assert (sample.text, sample.notes) == (None, ())
    assert sample.device == {"cuda": False, "build": "9.9"}


def test_decoding_alone_has_no_prompt(package: Path, tmp_path: Path) -> None:
    sample = LlamaCppPython().bench(tmp_path / "m.gguf", 0, 2, threads=2, n_gpu_layers=9)
    assert (sample.prompt, sample.decode.tokens) == (None, 2)
    assert sample.notes == ("no GPU in this build or machine: -ngl ignored",)


def test_a_check_tells_version_and_cuda(package: Path) -> None:
    facts = LlamaCppPython().check()
    assert (facts.kind, facts.version, facts.cuda) == ("llama-cpp-python", "9.9", False)
    package.write_text(PACKAGE.replace("CPU : AVX2", "CUDA : ARCHS = 890 | CPU : AVX2"))
    assert LlamaCppPython().check().cuda is True


FAILURES = {
    "refused": (
        "raise ValueError('Failed to load model from file: m.gguf')",
        "Failed to load model from file: m.gguf; the program refuses the file",
    ),
    "crash": ("import os; os.abort()", "was ended by SIGABRT"),
    "silence": ("import os; os._exit(0)", "printed no figures; reinstall llama-cpp-python"),
    "hang": ("time.sleep(600)", "no end after 0.5 s"),
}


@pytest.mark.parametrize(("body", "said"), FAILURES.values(), ids=FAILURES)
def test_native_code_that_fails_takes_no_psp_with_it(
    package: Path, tmp_path: Path, body: str, said: str
) -> None:
    package.write_text(PACKAGE.replace("self.room = n_ctx", body))
    timeout = 0.5 if "sleep" in body else 60
    with pytest.raises(EngineError) as caught:
        LlamaCppPython(timeout=timeout).bench(tmp_path / "m.gguf", 4, 4, threads=2)
    in_one_line(caught.value, said)


def test_a_package_that_cannot_be_imported_is_an_error(package: Path) -> None:
    package.write_text("raise OSError('libllama.so: cannot open shared object file')")
    with refused(EngineError, "OSError: libllama.so: cannot open shared object file; "):
        LlamaCppPython().check()


def test_the_timeout_of_a_benchmark_holds_for_the_package(package: Path, tmp_path: Path) -> None:
    package.write_text("import time; time.sleep(600)")
    file = tmp_path / "m.gguf"
    config = BenchConfig(file=file, llama_cpp_bin=PYTHON, llama_cpp_gguf=file, timeout=0.5)
    with refused(EngineError, "no end after 0.5 s"):
        open_programs(config)


def test_what_cannot_be_timed_is_refused(package: Path, tmp_path: Path) -> None:
    engine = LlamaCppPython()
    with refused(EngineError, "1 tokens: nothing would be timed"):
        engine.bench(tmp_path / "m.gguf", 4, 1, threads=2)
    (tmp_path / "m.gguf").write_bytes(b"PWRI")
    with refused(EngineError, "a sparse file", "psp export-gguf --dense"):
        engine.bench(tmp_path / "m.gguf", 4, 4, threads=2)


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is not None, reason="llama-cpp-python is installed"
)
def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(EngineError) as caught:
        LlamaCppPython()
    in_one_line(caught.value, "package llama_cpp: not installed; pip install llama-cpp-python")


@pytest.mark.llama_cpp
@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
def test_the_real_package_times_a_dense_file(
    model_dir: Path, exact_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.powerinfer.gguf"
    config = ExportConfig(model=str(model_dir), predictors=exact_dir, out=out, dense=True)
    engine = LlamaCppPython(timeout=300)
    assert engine.check().version
    sample = engine.bench(export(config).dense_file, 12, 16, threads=1)
    assert sample.prompt is not None
    assert (sample.prompt.tokens, sample.decode.tokens) == (12, 16)
    assert sample.decode.tokens_per_second > 1
