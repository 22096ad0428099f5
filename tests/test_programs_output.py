"""Reading PowerInfer's outputs: recorded ones (tests/recorded), and composed ones of CUDA."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import cuda_lines as cuda
import pytest
from conftest import refused
from stand_ins import MAIN, TIMINGS, build, in_one_line, recorded_output, write_program

from common.errors import EngineError
from common.units import GIB, MIB
from gguf_export.bundle import Bundle
from powerinfer_bridge.programs.build import require_success
from powerinfer_bridge.programs.output import (
    continuation,
    parse_device,
    parse_main,
    parse_notes,
    parse_perplexity,
)
from powerinfer_bridge.programs.powerinfer import PowerInfer
from powerinfer_bridge.programs.process import Finished
from powerinfer_bridge.programs.sample import Phase, RunSample


def failed(stderr: str, code: int = 1) -> Finished:
    return Finished(
        command=("/programs/main",), environment={}, code=code, stdout="", stderr=stderr, seconds=1
    )


def test_a_recorded_sparse_run_is_read() -> None:
    stderr = recorded_output("powerinfer-main-sparse.stderr.txt")
    timings = parse_main(stderr)
    assert timings.load_seconds is not None
    assert timings.load_seconds > 0
    assert timings.prompt is not None
    assert (timings.prompt.tokens, timings.decode.tokens) == (7, 15)
    assert f"eval time = {timings.decode.seconds * 1000:10.2f} ms /    15 runs" in stderr
    assert parse_notes(stderr) == ("built without CUDA: VRAM budget ignored",)
    placed = {"vram_budget_bytes": 0, "layers_offloaded": "0/6", "ffn_offloaded_bytes": 0}
    assert parse_device(stderr) == {"cuda": False, **placed}
    text, notes = continuation(
        recorded_output("powerinfer-main-sparse.stdout.txt"), "The river runs"
    )
    assert (text.split(), notes) == (["the"], ())


def test_a_recorded_dense_run_is_read() -> None:
    stderr = recorded_output("powerinfer-main-dense.stderr.txt")
    timings = parse_main(stderr)
    assert timings.prompt is not None
    assert (timings.prompt.tokens, timings.decode.tokens) == (7, 15)
    assert (parse_notes(stderr), parse_device(stderr)) == ((), {"cuda": False})
    text, _ = continuation(recorded_output("powerinfer-main-dense.stdout.txt"), "The river runs")
    assert text.startswith(" of the")


def test_a_recorded_perplexity_is_read() -> None:
    assert parse_perplexity(recorded_output("powerinfer-perplexity.stdout.txt")) == 7.36
    with pytest.raises(EngineError) as caught:  # what it decodes is no continuation
        parse_main(recorded_output("powerinfer-perplexity.stderr.txt"))
    in_one_line(caught.value, "PowerInfer decoded nothing (0.00 ms for 1 tokens)")


@pytest.mark.parametrize(
    ("name", "said", "remedy"),
    [
        ("refused", "error loading model: unknown model architecture: 'qwert'", "psp verify"),
        ("long-prompt", "error: prompt is too long (102 tokens, max 28)", "larger context"),
    ],
)
def test_recorded_refusals_are_quoted_with_a_remedy(name: str, said: str, remedy: str) -> None:
    with pytest.raises(EngineError) as caught:
        require_success(failed(recorded_output(f"powerinfer-main-{name}.stderr.txt")))
    message = in_one_line(caught.value, f"/programs/main: ended with code 1: {said}; ")
    assert remedy in message


LIBRARY = "/programs/main: error while loading shared libraries: libcudart.so.12: cannot open"
CAUSES = {
    "library": (LIBRARY, 127, "libcudart.so.12: cannot open", "LD_LIBRARY_PATH"),
    "memory": (cuda.OUT_OF_MEMORY, 1, "ggml-cuda.cu:8974: out of memory", "lower --vram-budget"),
    "driver": (
        "\nCUDA error 35 at /x.cu:1: CUDA driver version is insufficient\ncurrent device: 0\n",
        1,
        "CUDA error 35 at /x.cu:1: CUDA driver version is insufficient",
        "nvidia-smi",
    ),
    "no device": (
        "error loading model: CUDA is not loaded\nmain: error: unable to load model\n",
        1,
        "error loading model: CUDA is not loaded",
        "nvidia-smi",
    ),
    "assertion": (
        "GGML_ASSERT: /src/ggml-cuda.cu:7: n > 0\n[New LWP 5]\nbacktrace\n",
        1,
        "GGML_ASSERT: /src/ggml-cuda.cu:7: n > 0;",
        "psp verify",
    ),
    "option": ("error: unknown argument: --vram-budget", 1, "--vram-budget", "d3ebd7c"),
    "illegal instruction": ("loading", -4, "was ended by SIGILL: loading", "on this machine"),
    "killed": ("loading", -9, "was ended by SIGKILL: loading", "memory"),
    "garbage": ("\x00\ufffd\x1b[31m", 1, "ended with code 1: \\x00\ufffd\\x1b[31m", "by hand"),
}


@pytest.mark.parametrize(("stderr", "code", "said", "remedy"), CAUSES.values(), ids=CAUSES)
def test_causes_are_quoted_with_their_remedy(
    stderr: str, code: int, said: str, remedy: str
) -> None:
    with pytest.raises(EngineError) as caught:
        require_success(failed(stderr, code))
    assert remedy in in_one_line(caught.value, said).rpartition("; ")[2]


def test_a_program_that_ended_well_is_no_failure() -> None:
    require_success(failed(cuda.OUT_OF_MEMORY, 0))


def test_cuda_devices_and_memory_are_read() -> None:
    stderr = cuda.DEVICES + cuda.SPARSE + cuda.APPLIED + cuda.OFFLOADED + cuda.KV_CACHE + TIMINGS
    assert parse_device(stderr) == {
        "cuda": True,
        "gpus": [cuda.GPU],
        "vram_budget_bytes": 8 * GIB,
        "layers_offloaded": "33/32",
        "vram_used_bytes": 5120 * MIB + MIB // 2,
        "kv_vram_bytes": 256 * MIB,
        "ffn_offloaded_bytes": 2 * GIB + MIB // 4,
    }
    assert parse_notes(stderr) == ("GPU index applied",)
    assert parse_main(stderr).decode == Phase(seconds=0.3, tokens=15)


def test_two_devices_and_dense_offload_are_read() -> None:
    devices = cuda.DEVICES.replace("found 1", "found 2") + (
        "  Device 1: Tesla T4, with a comma, compute capability 7.5\n"
    )
    found = parse_device(devices + cuda.DENSE)
    assert found["gpus"] == [cuda.GPU, "Tesla T4, with a comma"]
    assert (found["layers_offloaded"], found["vram_used_bytes"]) == ("33/35", 12000 * MIB)


def test_a_cuda_build_that_finds_no_device_uses_none() -> None:
    assert parse_device("ggml_init_cublas: found 0 CUDA devices:\n") == {"cuda": False}


@pytest.mark.parametrize(
    ("lines", "notes"),
    [
        (cuda.REFUSED + cuda.INVOKING + cuda.APPLIED, ("applied", "refused", "rebuilt")),
        (cuda.INVOKING + cuda.APPLIED, ("applied", "rebuilt")),
        (cuda.REFUSED + cuda.NO_STATISTICS + cuda.EMPTY, ("refused", "statistics", "no neurons")),
        (cuda.EMPTY, ("no neurons on the GPU",)),
    ],
)
def test_what_becomes_of_the_gpu_index_is_noted(lines: str, notes: tuple[str, ...]) -> None:
    found = parse_notes(cuda.DEVICES + cuda.SPARSE + lines + cuda.OFFLOADED)
    assert len(found) == len(notes)
    assert all(part in note for part, note in zip(notes, found, strict=True)), found


@pytest.mark.parametrize("prompt", ["x", "", "1", "loaded", "Exported"])
@pytest.mark.parametrize("before", ["", cuda.INDEX_LOADED, cuda.SOLVER + cuda.INDEX_LOADED])
def test_lines_before_the_text_are_no_text(before: str, prompt: str) -> None:
    assert continuation(f"{before}{prompt} and\nso on", prompt) == (" and\nso on", ())


def run(programs: Path, model: Path) -> RunSample:
    powerinfer = PowerInfer(programs, timeout=30)
    return powerinfer.generate(model, "The", 16, threads=2, vram_budget=GIB)


def test_a_changed_gpu_index_is_noted_whatever_the_program_says(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    index = tmp_path / "m.gguf.generated.gpuidx"
    writing = f"import pathlib\npathlib.Path({str(index)!r}).write_bytes(b'new')\n{MAIN}"
    programs = build(tmp_path / "bin", writing)
    assert run(programs, model).notes == ("GPU index rebuilt",), "made where none was"
    os.utime(index, ns=(0, 0))
    assert run(programs, model).notes == ("GPU index rebuilt",), "written anew"
    build(tmp_path / "bin")
    assert run(programs, model).notes == (), "left alone"
    removing = f"import pathlib\npathlib.Path({str(index)!r}).unlink()\n{MAIN}"
    assert run(build(tmp_path / "bin", removing), model).notes == ()


def test_a_rebuilt_gpu_index_is_noted_once(tmp_path: Path) -> None:
    index = tmp_path / "m.gguf.generated.gpuidx"
    said = f"import pathlib\npathlib.Path({str(index)!r}).write_bytes(b'new')\n{MAIN}\n"
    said += f"sys.stderr.write({cuda.INVOKING!r})"
    sample = run(build(tmp_path / "bin", said), tmp_path / "m.gguf")
    assert sample.notes == ("GPU index rebuilt",)


def test_fewer_tokens_than_asked_for_are_noted(tmp_path: Path) -> None:
    programs = build(tmp_path, MAIN.replace("15 runs", "11 runs"))
    assert run(programs, tmp_path / "m").notes == ("11 tokens decoded, 15 expected",)


def test_options_of_the_gpu_reach_the_program(tmp_path: Path) -> None:
    powerinfer = PowerInfer(build(tmp_path), timeout=30)
    bare = powerinfer.generate(tmp_path / "m", "The", 16, threads=2)
    assert not {"--vram-budget", "--n-gpu-layers"} & set(bare.command)
    full = powerinfer.generate(
        tmp_path / "m",
        "The",
        16,
        threads=2,
        threshold=-1e30,
        vram_budget=3 * GIB // 2,
        n_gpu_layers=7,
        seed=5,
    )
    given = dict(pairwise(full.command))
    assert (given["--vram-budget"], given["--n-gpu-layers"], given["--seed"]) == ("1.5", "7", "5")
    assert "--ignore-eos" in full.command
    assert not [option for option in full.command if option.endswith("gpu-index")]
    assert full.environment == {"LLAMA_SPARSE_PRED_THRESHOLD": "-1e+30"}
    assert full.command[0] == str(tmp_path / "main")


@pytest.mark.parametrize("count", [0, 1])
def test_a_single_token_times_nothing(tmp_path: Path, count: int) -> None:
    with refused(EngineError, f"{count} tokens: nothing would be timed; generate at least 2"):
        PowerInfer(build(tmp_path)).generate(tmp_path / "m", "The", count, threads=1)


HELP = """import sys
if '--help' in sys.argv:
    print('  --vram-budget N       VRAM budget in GiB')
    sys.exit(0)
sys.stderr.write('main: build = 1569 (d3ebd7c)\\nmain: built with cc\\n')
if not sys.argv[sys.argv.index('--model') + 1].endswith('good.gguf'):
    sys.stderr.write('error loading model: unknown model architecture\\n')
    sys.exit(1)
"""
OFFLOAD = HELP.replace("print(", "print('  -ngl N, --n-gpu-layers N');print(", 1)


@pytest.mark.parametrize(("body", "has_cuda"), [(HELP, False), (OFFLOAD, True)])
def test_a_check_tells_version_and_cuda(tmp_path: Path, body: str, has_cuda: bool) -> None:
    facts = PowerInfer(build(tmp_path, body, HELP), timeout=30).check()
    assert (facts.path, facts.kind) == (tmp_path / "main", "powerinfer")
    assert (facts.version, facts.cuda) == ("build = 1569 (d3ebd7c)", has_cuda)


def test_a_check_of_a_model_quotes_the_refusal(tmp_path: Path) -> None:
    powerinfer = PowerInfer(build(tmp_path, HELP, HELP), timeout=30)
    powerinfer.check(tmp_path / "good.gguf")
    with refused(EngineError, "error loading model: unknown model architecture", "psp verify"):
        powerinfer.check(tmp_path / "bad.gguf")


OLD = HELP.replace("--vram-budget", "--old")


@pytest.mark.parametrize(("main", "perplexity"), [(OLD, HELP), (HELP, OLD)])
def test_an_old_llama_cpp_is_told_from_a_powerinfer(
    tmp_path: Path, main: str, perplexity: str
) -> None:
    with refused(EngineError, "no PowerInfer, perhaps an old llama.cpp", "--llama-cpp-bin"):
        PowerInfer(build(tmp_path, main, perplexity), timeout=30).check()


def test_a_check_of_a_program_that_crashes_is_named(tmp_path: Path) -> None:
    with refused(EngineError, f"{tmp_path / 'main'}: was ended by SIGSEGV"):
        PowerInfer(build(tmp_path, "import os\nos.kill(os.getpid(), 11)"), timeout=30).check()


@pytest.mark.parametrize("below", [".", "build/bin"])
def test_a_llama_cpp_build_is_no_powerinfer(tmp_path: Path, below: str) -> None:
    write_program(tmp_path / below / "llama-bench", "")
    with pytest.raises(EngineError) as caught:
        PowerInfer(tmp_path)
    assert "a llama.cpp build: point --llama-cpp-bin at it" in in_one_line(caught.value, "main")


def test_a_program_may_be_named_itself(tmp_path: Path) -> None:
    assert PowerInfer(build(tmp_path) / "main").generate(
        tmp_path / "m", "The", 16, threads=1
    ).text == (" text")


@pytest.mark.powerinfer
def test_the_real_programs_say_what_they_are(powerinfer_bin: Path, tmp_path: Path) -> None:
    powerinfer = PowerInfer(powerinfer_bin)
    facts = powerinfer.check()
    assert facts.kind == "powerinfer"
    assert facts.version is not None
    assert facts.version.startswith("build = ")
    (tmp_path / "no.gguf").write_bytes(b"PWRI nonsense")
    with refused(EngineError, "ended with code 1: error loading model: ", "psp verify"):
        powerinfer.check(tmp_path / "no.gguf")


@pytest.mark.powerinfer
def test_the_real_program_s_limits_are_quoted(powerinfer_bin: Path, exact_bundle: Bundle) -> None:
    powerinfer, file = PowerInfer(powerinfer_bin), exact_bundle.model_file
    with refused(EngineError, "error: prompt is too long (", "larger context"):
        powerinfer.generate(file, "word " * 100, 8, threads=1, context=32)
    with refused(EngineError, "printed no final estimate", "more text"):
        powerinfer.perplexity(file, "short", 64, 1, threads=1)
    sample = powerinfer.generate(file, "def f(", 8, threads=1, context=64, vram_budget=GIB)
    assert sample.decode.tokens == 7
    assert sample.prompt is not None
    assert sample.device["layers_offloaded"] == "0/2"
