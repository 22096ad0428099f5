"""Running PowerInfer: stand-ins that behave in every way a program can, and the real thing."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXT
from stand_ins import ESTIMATE, MAIN, TIMINGS, build, in_one_line, write_program

from common.errors import EngineError
from gguf_export.bundle import Bundle
from gguf_export.pwri.schema import DENSE_THRESHOLD
from powerinfer_bridge.engine.engine import Engine, generate
from powerinfer_bridge.engine.perplexity import engine_perplexity
from powerinfer_bridge.programs.output import parse_windows
from powerinfer_bridge.programs.powerinfer import PowerInfer
from powerinfer_bridge.programs.sample import Phase, RunSample

THRESHOLD = "LLAMA_SPARSE_PRED_THRESHOLD"
RECORD = """
import json, os, pathlib, sys
pathlib.Path('main.log').write_text('log')
seen = {'argv': sys.argv[1:], 'cwd': os.getcwd(), 'threshold': os.environ.get('THRESHOLD')}
if '--file' in sys.argv:
    seen['text'] = pathlib.Path(sys.argv[sys.argv.index('--file') + 1]).read_bytes().hex()
pathlib.Path('RECORD').write_text(json.dumps(seen))
""".replace("THRESHOLD", THRESHOLD)


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


def run_main(programs: Path, prompt: str = "The", threshold: float | None = None) -> RunSample:
    powerinfer = PowerInfer(programs, timeout=30)
    return powerinfer.generate(Path("m.gguf"), prompt, 16, threads=2, threshold=threshold)


def run_perplexity(programs: Path, text: str = "text", threshold: float | None = None) -> float:
    powerinfer = PowerInfer(programs, timeout=30)
    return powerinfer.perplexity(Path("m.gguf"), text, 64, 4, threads=1, threshold=threshold)


def test_timings_and_text_of_a_run_are_read(tmp_path: Path) -> None:
    run = run_main(build(tmp_path))
    assert run.text == " text"
    assert run.load_seconds == pytest.approx(0.12345)
    assert run.prompt == Phase(seconds=0.02, tokens=5)
    assert run.decode == Phase(seconds=0.3, tokens=15)
    assert run.decode.tokens_per_second == pytest.approx(50)
    assert 0 < run.wall_seconds < 30
    assert (run.notes, run.environment) == ((), {})


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


def test_each_window_of_a_perplexity_run_is_read(tmp_path: Path) -> None:
    """PowerInfer prints the perplexity of all windows so far."""
    found = PowerInfer(build(tmp_path)).score(Path("m.gguf"), "text", 64, 4, threads=1)
    assert found.perplexity == 12.5025
    assert found.windows == pytest.approx((math.log(4), 2 * math.log(12.5) - math.log(4)))


@pytest.mark.parametrize("printed", ["", "[1]nan,[2]4.0,", "[2]4.0,", "[1]4.0,[3]5.0,", "[1]0.0,"])
def test_windows_that_were_not_all_printed_are_unknown(printed: str) -> None:
    assert parse_windows(f"{printed}\nFinal estimate: PPL = 12.5 +/- 0.2") == ()


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
    assert run_main(tmp_path).text == " text"
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
    ("stderr", "problem"),
    [
        ("", "printed no decoding time"),
        (TIMINGS.replace("       eval time", "       else time"), "printed no decoding time"),
        (TIMINGS.replace("   15 runs", "    0 runs"), "decoded nothing (300.00 ms for 0 tokens)"),
        (TIMINGS.replace("300.00 ms /", "  0.00 ms /"), "decoded nothing (0.00 ms for 15 tokens)"),
        (
            "llama_print_timings:        eval time = nan ms / 15 runs",
            "decoded nothing (nan ms for 15 tokens)",
        ),
        (
            "llama_print_timings:        eval time = -nan ms / 15 runs",
            "decoded nothing (-nan ms for 15 tokens)",
        ),
    ],
    ids=["silent", "no decoding", "no token", "no time", "nan", "-nan"],
)
def test_a_run_without_decoding_time_is_an_error(tmp_path: Path, stderr: str, problem: str) -> None:
    build(tmp_path, f"import sys\nprint('The')\nsys.stderr.write({stderr!r})")
    with pytest.raises(EngineError) as caught:
        run_main(tmp_path)
    in_one_line(caught.value, f"PowerInfer {problem}")


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
    build(tmp_path, f"{garbage}{MAIN}\nsys.stdout.flush()\n{garbage}", garbage + ESTIMATE)
    run = run_main(tmp_path)
    assert run.text == " text\ufffd\ufffd\x00 text", "what comes before the prompt is no text"
    assert run.notes == ("output is not UTF-8",)
    assert run_perplexity(tmp_path) == 12.5025


def test_output_without_the_prompt_is_reported_as_what_it_is(tmp_path: Path) -> None:
    build(tmp_path, MAIN.replace("The text", "something else"))
    run = run_main(tmp_path)
    assert run.text == "something else"
    assert run.notes == ("prompt not found in the output",)


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
    assert run.text is not None
    assert not [note for note in run.notes if "prompt" in note or "expected" in note], run.notes
    made = generate(Engine(file), prompt, 16)
    assert run.text.rstrip("\n") == made.text.rstrip("\n")
    assert run.decode.tokens == 15
