"""llama.cpp: recorded outputs of a current build, stand-ins, and the real programs."""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import cuda_lines as cuda
import pytest
from conftest import refused
from stand_ins import RECORDED, TIMINGS, build, in_one_line, recorded_output, write_program

from common.errors import EngineError
from gguf_export.bundle import Bundle, export
from gguf_export.settings import ExportConfig
from powerinfer_bridge.programs.llama_cpp import LlamaCpp
from powerinfer_bridge.programs.output import (
    has_cuda,
    parse_bench,
    parse_generation,
    parse_version,
)
from powerinfer_bridge.programs.sample import Phase

BENCH = recorded_output("llama-bench.stdout.json")
PROGRAMS = ["llama-bench", "llama-completion", "llama-cli"]


def entries(**changes: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(BENCH)
    return [entry | changes for entry in found]


def printing(stdout: str = "", stderr: str = "", code: int = 0) -> str:
    return f"import sys\nprint({stdout!r})\nsys.stderr.write({stderr!r})\nsys.exit({code})"


def bench(directory: Path, body: str, name: str = "llama-bench", **changes: Any) -> Any:
    write_program(directory / name, body)
    settings: dict[str, Any] = {"threads": 2} | changes
    return LlamaCpp(directory, timeout=30).bench(model(directory), 32, 16, **settings)


def model(directory: Path, magic: bytes = b"GGUF") -> Path:
    (directory / "m.gguf").write_bytes(magic)
    return directory / "m.gguf"


def test_a_recorded_bench_is_read() -> None:
    measured = parse_bench(BENCH, 0)
    prompt, decode = json.loads(BENCH)
    assert measured.prompt == Phase(seconds=prompt["samples_ns"][0] / 1e9, tokens=32)
    assert measured.decode == Phase(seconds=decode["samples_ns"][0] / 1e9, tokens=16)
    assert measured.decode.tokens_per_second == pytest.approx(decode["avg_ts"], rel=1e-6)
    assert (measured.load_seconds, measured.notes) == (None, ())
    assert measured.device["cuda"] is False
    assert measured.device["gpus"] == []
    assert measured.device["build_commit"] == "0c1e570"
    assert measured.device["n_gpu_layers"] == 0


def test_a_bench_with_cuda_tells_its_gpus_and_layers() -> None:
    text = json.dumps(entries(backends="CUDA", gpu_info=f"{cuda.GPU}, Tesla T4", n_gpu_layers=99))
    measured = parse_bench(text, 99)
    assert measured.device["cuda"] is True
    assert measured.device["gpus"] == [cuda.GPU, "Tesla T4"]
    assert measured.device["n_gpu_layers"] == 99
    assert measured.notes == ()
    assert "long prompts may use the GPU" in parse_bench(text, 0).notes[0]


def test_layers_for_a_gpu_that_is_not_there_are_noted() -> None:
    assert parse_bench(BENCH, 99).notes == ("no GPU in this build or machine: -ngl ignored",)


def test_a_bench_of_decoding_alone_has_no_prompt() -> None:
    assert parse_bench(json.dumps(entries()[1:]), 0).prompt is None


def test_repetitions_are_pooled() -> None:
    text = json.dumps(entries(samples_ns=[10**9, 3 * 10**9]))
    assert parse_bench(text, 0).decode == Phase(seconds=4.0, tokens=32)


WRONG = {
    "nothing": "",
    "garbage": "\x00\ufffd{",
    "cut off": BENCH[:-40],
    "no object": "[1, 2]",
    "number": "7",
    "null": "null",
    "empty": "[]",
    "prompt alone": json.dumps(entries()[:1]),
    "no samples": json.dumps(entries(samples_ns=[])),
    "no time": json.dumps(entries(samples_ns=[0])),
    "text for time": json.dumps(entries(samples_ns=["soon"])),
    "nan": json.dumps(entries(samples_ns=[float("nan")])),
    "infinite": json.dumps(entries(samples_ns=[float("inf")])),
    "other keys": '[{"n_gen": 16, "n_prompt": 0}]',
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_a_bench_that_measured_nothing_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(EngineError) as caught:
        bench(tmp_path, printing(text))
    in_one_line(caught.value, "llama-bench printed no JSON of a decoding run")


def test_a_recorded_completion_is_read() -> None:
    stderr = recorded_output("llama-completion.stderr.txt")
    measured = parse_generation(stderr, 16)
    assert measured.prompt is not None
    assert (measured.prompt.tokens, measured.decode.tokens) == (7, 15)
    assert f"eval time = {measured.decode.seconds * 1000:10.2f} ms /    15 runs" in stderr
    assert measured.load_seconds is not None
    assert f"load time = {measured.load_seconds * 1000:10.2f} ms" in stderr
    assert measured.device == {"cuda": False}


def test_an_older_program_s_lines_are_read() -> None:
    older = recorded_output("llama-completion.stderr.txt").replace(
        "common_perf_print", "llama_perf_context_print"
    )
    assert parse_generation(older, 16).decode.tokens == 15
    assert parse_generation(TIMINGS, 16).decode == Phase(seconds=0.3, tokens=15)


def test_the_rates_of_a_recorded_chat_are_read() -> None:
    stdout = recorded_output("llama-cli.stdout.txt")
    measured = parse_generation(stdout, 16)
    rate = float(stdout.rpartition("Generation: ")[2].split()[0])
    assert measured.decode.tokens_per_second == pytest.approx(rate)
    assert (measured.decode.tokens, measured.prompt) == (16, None)
    assert "no token counts" in measured.notes[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage \ufffd",
        "[ Prompt: 1.0 t/s | Generation: 0.0 t/s ]",
        "common_perf_print:        eval time =       0.00 ms /     1 runs",
        "common_perf_print:        eval time =        nan ms /     1 runs",
        "common_perf_print:        eval time =       5.00 ms /     0 runs",
    ],
)
@pytest.mark.parametrize("name", PROGRAMS[1:])
def test_a_generation_without_time_is_an_error(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(EngineError) as caught:
        bench(tmp_path, printing(text), name)
    in_one_line(caught.value, "llama.cpp printed no decoding time")


def test_versions_and_devices_are_read() -> None:
    version = parse_version(recorded_output("llama-version.txt"))
    assert version == "0.5.0-dev (build 1, commit 0c1e570)"
    assert parse_version("error: unknown") is None
    assert not has_cuda(recorded_output("llama-list-devices.txt"))
    assert has_cuda(cuda.LLAMA_CPP_DEVICES)
    assert has_cuda("ggml_cuda_init: failed to initialize CUDA: no device"), "built, no GPU"


ARGUMENTS = "import json, sys\nopen(RECORD, 'w').write(json.dumps(sys.argv[1:]))\n"


@pytest.mark.parametrize("name", PROGRAMS)
def test_arguments_arrive(tmp_path: Path, name: str) -> None:
    record = tmp_path / "record.json"
    said = printing(BENCH if name == "llama-bench" else TIMINGS)
    sample = bench(tmp_path, ARGUMENTS.replace("RECORD", repr(str(record))) + said, name)
    arguments = json.loads(record.read_text())
    given = dict(pairwise(arguments))
    assert (given["-m"], given["-t"], given["-ngl"]) == (str(tmp_path / "m.gguf"), "2", "0")
    assert given["-n"] == "16"
    assert sample.command == (str(tmp_path / name), *arguments)
    assert (sample.text, sample.environment) == (None, {})
    if name == "llama-bench":
        assert (given["-p"], given["-r"], given["-o"]) == ("32", "1", "json")
    else:
        assert given["-p"].split() == ["a"] * 32
        assert int(given["-c"]) >= 48


def test_the_best_program_of_a_build_is_taken(tmp_path: Path) -> None:
    write_program(tmp_path / "build/bin/llama-cli", printing(TIMINGS))
    sample = LlamaCpp(tmp_path).bench(model(tmp_path), 32, 16, threads=1)
    assert sample.command[0].endswith("llama-cli")
    write_program(tmp_path / "build/bin/llama-bench", printing(BENCH))
    sample = LlamaCpp(tmp_path).bench(model(tmp_path), 32, 16, threads=1)
    assert sample.command[0].endswith("llama-bench")


def test_why_a_bench_failed_is_asked_for(tmp_path: Path) -> None:
    """llama-bench names no cause unless it is told to be verbose."""
    cause = recorded_output("llama-bench-refused.stderr.txt")
    body = f"import sys\nsys.stderr.write({cause!r} if '-v' in sys.argv else 'failed')\nsys.exit(1)"
    with pytest.raises(EngineError) as caught:
        bench(tmp_path, body)
    message = in_one_line(caught.value, "ended with code 1: invalid magic characters: 'PWRI'")
    assert "psp export-gguf --dense" in message


def test_a_bench_that_fails_once_is_a_failure(tmp_path: Path) -> None:
    body = "import sys\nif '-v' in sys.argv: sys.exit(0)\nsys.stderr.write('oops')\nsys.exit(3)"
    with refused(EngineError, "ended with code 3: oops; run it by hand"):
        bench(tmp_path, body)


def test_too_little_memory_on_the_gpu_is_quoted(tmp_path: Path) -> None:
    with refused(EngineError, "cudaMalloc failed: out of memory; ", "lower", "--n-gpu-layers"):
        bench(tmp_path, printing(stderr=cuda.LLAMA_CPP_OUT_OF_MEMORY, code=1), n_gpu_layers=99)


def test_a_crash_is_named(tmp_path: Path) -> None:
    with refused(EngineError, f"{tmp_path / 'llama-bench'}: was ended by SIGABRT"):
        bench(tmp_path, "import os\nos.abort()")


def test_a_hanging_program_is_ended(tmp_path: Path) -> None:
    write_program(tmp_path / "llama-bench", "import time\ntime.sleep(600)")
    with refused(EngineError, "no end after 0.5 s"):
        LlamaCpp(tmp_path, timeout=0.5).bench(model(tmp_path), 32, 16, threads=1)


@pytest.mark.parametrize("count", [0, 1])
def test_a_single_token_times_nothing(tmp_path: Path, count: int) -> None:
    write_program(tmp_path / "llama-bench", printing(BENCH))
    with refused(EngineError, f"{count} tokens: nothing would be timed"):
        LlamaCpp(tmp_path).bench(model(tmp_path), 32, count, threads=1)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_sparse_file_is_refused_before_it_is_run(tmp_path: Path, name: str) -> None:
    write_program(tmp_path / name, printing(BENCH))
    file = model(tmp_path, b"PWRI")
    with pytest.raises(EngineError) as caught:
        LlamaCpp(tmp_path).bench(file, 32, 16, threads=1)
    assert "psp export-gguf --dense" in in_one_line(caught.value, f"{file}: a sparse file")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_program(tmp_path / "llama-bench", printing(BENCH))
    with refused(EngineError, f"{tmp_path / 'no.gguf'}: cannot be read (No such file"):
        LlamaCpp(tmp_path).bench(tmp_path / "no.gguf", 32, 16, threads=1)


def test_a_directory_without_programs_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        LlamaCpp(tmp_path)
    message = in_one_line(caught.value, f"{tmp_path / 'llama-bench'}: no executable program")
    assert "--llama-cpp-bin (or PSP_LLAMA_CPP_BIN)" in message


def test_a_program_that_may_not_be_executed_is_named(tmp_path: Path) -> None:
    write_program(tmp_path / "llama-cli", "").chmod(0o644)
    with pytest.raises(EngineError) as caught:
        LlamaCpp(tmp_path)
    in_one_line(caught.value, f"{tmp_path / 'llama-cli'}: no executable program; ")


def test_a_powerinfer_build_is_no_llama_cpp(tmp_path: Path) -> None:
    build(tmp_path, printing("  --vram-budget N"))
    with refused(EngineError, "a PowerInfer or an old llama.cpp", "--powerinfer-bin"):
        LlamaCpp(tmp_path)
    write_program(tmp_path / "llama-bench", printing(BENCH))
    with refused(EngineError, "of a PowerInfer, not of a llama.cpp", "--powerinfer-bin"):
        LlamaCpp(tmp_path).check()


def test_a_check_of_an_old_build_tells_what_it_can(tmp_path: Path) -> None:
    build(tmp_path, printing("usage"))
    body = "import sys\nif '--help' not in sys.argv: sys.exit('error: unknown argument')"
    write_program(tmp_path / "llama-bench", body)
    facts = LlamaCpp(tmp_path).check()
    assert (facts.kind, facts.version, facts.cuda) == ("llama.cpp", None, None)


def test_a_check_of_a_build_without_its_libraries_is_an_error(tmp_path: Path) -> None:
    lacking = "x: error while loading shared libraries: libggml.so: cannot open"
    write_program(tmp_path / "llama-bench", printing(stderr=lacking, code=127))
    with refused(EngineError, "libggml.so: cannot open; ", "LD_LIBRARY_PATH"):
        LlamaCpp(tmp_path).check()


def test_recorded_outputs_name_no_machine() -> None:
    texts = [path.read_text(encoding="utf-8") for path in RECORDED.glob("*.[tj]*")]
    assert len(texts) > 10
    roots = re.findall(r"""(?:^|[\s'"(=:])(/[A-Za-z]+/)""", "\n".join(texts))
    assert set(roots) == {"/models/"}


@pytest.fixture(scope="session")
def dense_bundle(
    model_dir: Path, exact_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    out = tmp_path_factory.mktemp("llama.cpp") / "m.powerinfer.gguf"
    return export(ExportConfig(model=str(model_dir), predictors=exact_dir, out=out, dense=True))


@pytest.fixture
def real(request: pytest.FixtureRequest, llama_cpp_bin: Path, tmp_path: Path) -> LlamaCpp:
    """A build that has one of the real programs only, or a visible skip."""
    program = llama_cpp_bin.resolve() / request.param
    if not program.exists():
        pytest.skip(f"this llama.cpp build has no {request.param}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / request.param).symlink_to(program)
    return LlamaCpp(tmp_path / "bin", timeout=300)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("real", PROGRAMS, indirect=True)
def test_the_real_programs_time_a_dense_file(real: LlamaCpp, dense_bundle: Bundle) -> None:
    facts = real.check()
    assert facts.kind == "llama.cpp"
    assert facts.version
    sample = real.bench(dense_bundle.dense_file, 12, 16, threads=1)
    assert sample.decode.tokens in (15, 16)
    assert sample.decode.tokens_per_second > 1
    if not sample.command[0].endswith("llama-cli"):
        assert sample.prompt is not None
        assert 12 <= sample.prompt.tokens <= 30


@pytest.mark.llama_cpp
@pytest.mark.parametrize("real", PROGRAMS, indirect=True)
def test_the_real_programs_refuse_a_damaged_file(
    real: LlamaCpp, dense_bundle: Bundle, tmp_path: Path
) -> None:
    """llama-bench says why; the others end before their logger has written, as often as not."""
    file = tmp_path / "m.gguf"
    shutil.copyfile(dense_bundle.dense_file, file)
    with file.open("r+b") as damaged:
        damaged.write(b"GGUF\xff\xff")
    with refused(EngineError, "ended with code 1"):
        real.bench(file, 12, 16, threads=1)
