"""Running PowerInfer: stand-ins that behave in every way a program can, and the real thing."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXT

from common.errors import EngineError
from gguf_export.bundle import Bundle
from gguf_export.schema import DENSE_THRESHOLD
from powerinfer_bridge.engine import Engine
from powerinfer_bridge.generate import generate
from powerinfer_bridge.perplexity import engine_perplexity
from powerinfer_bridge.powerinfer import PowerInfer, Timing

THRESHOLD = "LLAMA_SPARSE_PRED_THRESHOLD"
TIMINGS = """
llama_print_timings:        load time =     123.45 ms
llama_print_timings:      sample time =       1.50 ms /    16 runs   (    0.09 ms per token)
llama_print_timings: prompt eval time =      20.00 ms /     5 tokens (    4.00 ms per token)
llama_print_timings:        eval time =     300.00 ms /    15 runs   (   20.00 ms per token)
llama_print_timings:       total time =     444.95 ms
"""
MAIN = f"import sys\nprint('The text', end='')\nsys.stderr.write({TIMINGS!r})"
ESTIMATE = "print('[1]4.0,[2]12.5,\\nFinal estimate: PPL = 12.5025 +/- 0.25')"
RECORD = """
import json, os, pathlib, sys
pathlib.Path('main.log').write_text('log')
seen = {'argv': sys.argv[1:], 'cwd': os.getcwd(), 'threshold': os.environ.get('THRESHOLD')}
if '--file' in sys.argv:
    seen['text'] = pathlib.Path(sys.argv[sys.argv.index('--file') + 1]).read_bytes().hex()
pathlib.Path('RECORD').write_text(json.dumps(seen))
""".replace("THRESHOLD", THRESHOLD)


def write_program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(0o755)
    return path


def build(directory: Path, main: str = MAIN, perplexity: str = ESTIMATE) -> Path:
    """Write a build's two programs."""
    write_program(directory / "main", main)
    write_program(directory / "perplexity", perplexity)
    return directory


def in_one_line(error: EngineError, thing: str) -> str:
    """Check that an error names the thing and a remedy in one line."""
    message = str(error)
    assert len(message.splitlines()) == 1, repr(message)
    assert thing in message
    problem, _, remedy = message.rpartition("; ")
    assert problem, f"no remedy in {message!r}"
    assert remedy
    return message


@dataclass
class Recorded:
    """A build whose programs write down how they were called."""

    programs: Path
    record: Path

    def seen(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.record.read_text())
        return found

    def option(self, name: str) -> str:
        arguments: list[str] = self.seen()["argv"]
        return arguments[arguments.index(name) + 1]


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    record = tmp_path / "record.json"
    body = RECORD.replace("RECORD", str(record))
    build(tmp_path / "programs", body + MAIN, body + ESTIMATE)
    return Recorded(tmp_path / "programs", record)


def run_main(programs: Path, prompt: str = "The", threshold: float | None = None) -> Any:
    powerinfer = PowerInfer(programs, timeout=30)
    return powerinfer.generate(Path("m.gguf"), prompt, 16, threads=2, threshold=threshold)


def run_perplexity(programs: Path, text: str = "text", threshold: float | None = None) -> float:
    powerinfer = PowerInfer(programs, timeout=30)
    return powerinfer.perplexity(Path("m.gguf"), text, 64, 4, threads=1, threshold=threshold)


def test_timings_and_text_of_a_run_are_read(tmp_path: Path) -> None:
    run = run_main(build(tmp_path))
    assert run.text == "The text"
    assert run.timings == {
        "sample": Timing(0.0015, 16),
        "prompt eval": Timing(0.02, 5),
        "eval": Timing(0.3, 15),
    }
    assert run.timings["eval"].tokens_per_second == pytest.approx(50)


def test_the_final_estimate_of_a_perplexity_run_is_read(tmp_path: Path) -> None:
    assert run_perplexity(build(tmp_path)) == 12.5025


PROMPTS = [
    "two\nlines\n\n\ttab",
    "'single' \"double\" $(echo no) `no` \\n",
    "--help",
    "Ünïcode 中文",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_arguments_of_main_arrive_unchanged(
    recorded: Recorded, tmp_path: Path, prompt: str
) -> None:
    model = tmp_path / "my 'own' \"model\" $x.gguf"
    PowerInfer(recorded.programs).generate(model, prompt, 16, threads=3)
    assert recorded.option("--model") == str(model)
    assert recorded.option("--prompt") == prompt
    assert recorded.option("-n") == "16"
    assert recorded.option("--threads") == "3"
    assert recorded.option("--temp") == "0"
    assert "--ignore-eos" in recorded.seen()["argv"]


@pytest.mark.parametrize(("chunks", "passed"), [(None, "-1"), (4, "4")])
def test_arguments_and_text_of_perplexity_arrive_unchanged(
    recorded: Recorded, tmp_path: Path, chunks: int | None, passed: str
) -> None:
    model = tmp_path / "my 'own' \"model\".gguf"
    text = " two\r\nlines 'ü' \udcff\n\n"
    PowerInfer(recorded.programs).perplexity(model, text, 64, chunks, threads=1)
    assert recorded.option("--model") == str(model)
    assert recorded.option("-c") == "64"
    assert recorded.option("--chunks") == passed
    assert recorded.option("--threads") == "1"
    assert bytes.fromhex(recorded.seen()["text"]) == text.encode("utf-8", "surrogateescape")
    assert not Path(recorded.option("--file")).exists(), "the text file goes away"


@pytest.mark.parametrize("call", [run_main, run_perplexity])
@pytest.mark.parametrize("inherited", [None, "0.75"])
@pytest.mark.parametrize("threshold", [None, DENSE_THRESHOLD, 0.1])
def test_the_threshold_variable_is_ours_alone(
    recorded: Recorded,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., object],
    inherited: str | None,
    threshold: float | None,
) -> None:
    monkeypatch.delenv(THRESHOLD, raising=False)
    if inherited is not None:
        monkeypatch.setenv(THRESHOLD, inherited)
    call(recorded.programs, threshold=threshold)
    found = recorded.seen()["threshold"]
    assert (found if found is None else float(found)) == threshold


@pytest.mark.parametrize("call", [run_main, run_perplexity])
def test_relative_paths_hold_and_no_log_is_left_behind(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, call: Callable[..., object]
) -> None:
    here = recorded.programs.parent / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    call(Path("../programs"))
    assert recorded.option("--model") == str(here / "m.gguf")
    assert list(here.iterdir()) == []
    assert recorded.seen()["cwd"] != str(here)
    assert not Path(recorded.seen()["cwd"]).exists()


@pytest.mark.parametrize("below", [".", "bin", "build/bin"])
def test_programs_are_found_in_a_build_s_usual_places(tmp_path: Path, below: str) -> None:
    build(tmp_path / below)
    assert run_main(tmp_path).text == "The text"
    assert run_perplexity(tmp_path) == 12.5025


def missing(programs: Path) -> None:
    (programs / "perplexity").unlink()


def not_executable(programs: Path) -> None:
    (programs / "perplexity").chmod(0o644)


def directory(programs: Path) -> None:
    missing(programs)
    (programs / "perplexity").mkdir()


@pytest.mark.parametrize("damage", [missing, not_executable, directory])
def test_a_program_that_cannot_be_run_is_named_at_once(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(build(tmp_path))
    with pytest.raises(EngineError) as caught:
        PowerInfer(tmp_path)
    message = in_one_line(caught.value, f"{tmp_path / 'perplexity'}: no executable program")
    assert "--powerinfer-bin (or PSP_POWERINFER_BIN)" in message


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        PowerInfer(tmp_path / "nowhere")
    in_one_line(caught.value, str(tmp_path / "nowhere" / "main"))


FAILURES = {
    "exit code": (
        "import sys\nsys.stderr.write('loading\\nerror: no such model\\n\\n')\nsys.exit(3)",
        "ended with code 3: error: no such model",
    ),
    "silent exit code": ("import sys\nsys.exit(4)", "ended with code 4"),
    "crash": ("import os\nos.kill(os.getpid(), 11)", "SIGSEGV"),
    "garbage and exit code": (
        "import sys\nsys.stderr.buffer.write(b'\\xff\\xfe\\x00\\x85\\r')\nsys.exit(1)",
        "ended with code 1",
    ),
}


@pytest.mark.parametrize("call", [run_main, run_perplexity])
@pytest.mark.parametrize(("body", "problem"), FAILURES.values(), ids=FAILURES)
def test_a_program_that_fails_is_named_with_its_last_words(
    tmp_path: Path, call: Callable[..., object], body: str, problem: str
) -> None:
    build(tmp_path, body, body)
    with pytest.raises(EngineError) as caught:
        call(tmp_path)
    name = "main" if call is run_main else "perplexity"
    message = in_one_line(caught.value, f"{tmp_path / name}: ")
    assert problem in message
    assert ": ;" not in message, "nothing is said where nothing was heard"


def test_a_file_that_is_no_program_is_named(tmp_path: Path) -> None:
    for name in ("main", "perplexity"):
        write_program(tmp_path / name, "").write_bytes(b"\x7fELF nonsense")
    with pytest.raises(EngineError) as caught:
        run_main(tmp_path)
    in_one_line(caught.value, f"{tmp_path / 'main'}: cannot be started (Exec format error)")


def test_a_program_that_hangs_is_ended(tmp_path: Path) -> None:
    build(tmp_path, "import time\ntime.sleep(600)")
    start = time.monotonic()
    with pytest.raises(EngineError) as caught:
        PowerInfer(tmp_path, timeout=0.5).generate(Path("m.gguf"), "The", 16, threads=2)
    assert time.monotonic() - start < 60
    in_one_line(caught.value, f"{tmp_path / 'main'}: no end after 0.5 s")


@pytest.mark.parametrize(
    "stderr",
    [
        "",
        TIMINGS.replace("       eval time", "       else time"),
        TIMINGS.replace("   15 runs", "    0 runs"),
        TIMINGS.replace("300.00 ms /", "  0.00 ms /"),
        "llama_print_timings:        eval time = nan ms / 15 runs",
    ],
    ids=["silent", "no decoding", "no token", "no time", "nan"],
)
def test_a_run_without_decoding_time_is_an_error(tmp_path: Path, stderr: str) -> None:
    build(tmp_path, f"import sys\nprint('The')\nsys.stderr.write({stderr!r})")
    with pytest.raises(EngineError) as caught:
        run_main(tmp_path)
    in_one_line(caught.value, "PowerInfer printed no decoding time")


@pytest.mark.parametrize(
    ("stdout", "problem"),
    [
        ("", "no final estimate"),
        ("Final estimate: PPL = nan +/- nan", "is nan"),
        ("Final estimate: PPL = -nan +/- -nan", "is -nan"),
        ("Final estimate: PPL = inf +/- inf", "is inf"),
        ("Final estimate: PPL = 0.0000 +/- 0", "is 0.0000"),
        ("Unexpected negative standard deviation of log(prob)", "no final estimate"),
    ],
)
def test_a_perplexity_that_is_no_number_is_an_error(
    tmp_path: Path, stdout: str, problem: str
) -> None:
    build(tmp_path, perplexity=f"print({stdout!r})")
    with pytest.raises(EngineError) as caught:
        run_perplexity(tmp_path)
    assert problem in in_one_line(caught.value, "PowerInfer's perplexity")


def test_garbage_bytes_on_stdout_do_no_harm(tmp_path: Path) -> None:
    garbage = "import sys\nsys.stdout.buffer.write(b'\\xff\\xfe\\x00 text')\nsys.stdout.flush()\n"
    build(tmp_path, garbage + MAIN, garbage + ESTIMATE)
    assert run_main(tmp_path).text == "\ufffd\ufffd\x00 textThe text"
    assert run_perplexity(tmp_path) == 12.5025


@pytest.mark.powerinfer
@pytest.mark.parametrize("threshold", [None, DENSE_THRESHOLD], ids=["predicted", "dense"])
def test_the_real_perplexity_is_the_embedded_engine_s(
    powerinfer_bin: Path, exact_bundle: Bundle, threshold: float | None
) -> None:
    text, file = TEXT * 6, exact_bundle.model_file
    real = PowerInfer(powerinfer_bin).perplexity(
        file, text, 64, None, threads=1, threshold=threshold
    )
    engine = Engine(file, threshold=threshold)
    assert engine_perplexity(engine, text, 64, None, "engine") == pytest.approx(real, rel=0.005)


@pytest.mark.powerinfer
@pytest.mark.parametrize("prompt", ["def f(", " The quick\n\tbrown 'fox' é 中", "x"])
def test_the_real_greedy_text_is_the_embedded_engine_s(
    powerinfer_bin: Path, exact_bundle: Bundle, tmp_path: Path, prompt: str
) -> None:
    file = tmp_path / "my 'own' $model.powerinfer.gguf"
    shutil.copyfile(exact_bundle.model_file, file)
    run = PowerInfer(powerinfer_bin).generate(file, prompt, 16, threads=1)
    assert run.text.startswith(prompt)
    made = generate(Engine(file), prompt, 16)
    assert run.text.removeprefix(prompt).rstrip("\n") == made.text.rstrip("\n")
    assert run.timings["eval"].count == 15
