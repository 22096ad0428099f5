"""`psp doctor` as a user meets it: the table, JSON, exit codes, and programs of every kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from processes import FOREVER, all_dead, an_hour_after, started, wait_for
from stand_ins import build, write_program
from test_doctor_environment import CARD, told

from cli import main
from commands.doctor import doctor
from common.examination import WIDTH, Examination, findings_text
from common.finding import Finding, Status, guarded
from common.machine import Gpu
from gguf_export.bundle import Bundle
from powerinfer_bridge.doctor.examination import KIND, examine
from powerinfer_bridge.doctor.programs import (
    check_llama_cpp,
    check_powerinfer,
    program_findings,
)
from powerinfer_bridge.doctor.settings import DoctorConfig
from powerinfer_bridge.programs.sample import ProgramFacts

Psp = Callable[..., Result]
POWERINFER = "print('usage: --vram-budget N')"
"""What tells PowerInfer's help from an old llama.cpp's."""


def write_powerinfer(directory: Path, body: str = POWERINFER) -> Path:
    return build(directory, body, body)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep this machine's own variables and graphics cards out."""
    for name in ("PSP_LLAMA_CPP_BIN", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert doctor is main.commands["doctor"]


def statuses(result: Result) -> dict[str, str]:
    document = json.loads(result.stdout)
    return {finding["check"]: finding["status"] for finding in document["findings"]}


def test_a_sound_file_is_healthy(psp: Psp, exact_bundle: Bundle) -> None:
    result = psp("doctor", exact_bundle.model_file)
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1]
    assert last.startswith("healthy: ")
    assert "problem" not in last


def test_the_json_document(psp: Psp, exact_bundle: Bundle, model_dir: Path) -> None:
    result = psp("doctor", exact_bundle.model_file, "--model", model_dir, "--json")
    document = json.loads(result.stdout)
    assert (document["kind"], document["schema_version"]) == ("psp.doctor", 1)
    assert document["healthy"] is (result.exit_code == 0) is True
    assert sum(document["counts"].values()) == len(document["findings"])
    assert {"Python", "torch", "CPU", "memory", "output disk", "file"} <= statuses(result).keys()
    for finding in document["findings"]:
        assert list(finding) == ["check", "status", "found", "remedy"]
        assert "\n" not in finding["found"]
        assert finding["remedy"] or finding["status"] in ("ok", "note")


@pytest.mark.parametrize("option", ["file", "--model", "--powerinfer-bin", "--llama-cpp-bin"])
def test_what_is_not_there_is_a_problem_and_no_traceback(
    psp: Psp, option: str, tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere"
    arguments = [nowhere] if option == "file" else [option, nowhere]
    result = psp("doctor", *arguments)
    assert result.exit_code == 1
    assert result.stdout.startswith("PROBLEM  ")
    assert "not healthy: 1 problem" in result.stdout
    assert str(nowhere) in "".join(result.stdout.split())


def test_powerinfer_bin_comes_from_the_environment(
    psp: Psp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert statuses(psp("doctor", "--json"))["PowerInfer"] == "note"
    monkeypatch.setenv("PSP_POWERINFER_BIN", str(write_powerinfer(tmp_path)))
    assert statuses(psp("doctor", "--json"))["PowerInfer"] == "ok"


def check(
    directory: Path,
    run: Callable[[Path | None, Sequence[Gpu], float], Any] = check_powerinfer,
    timeout: float = 30,
) -> Finding:
    finding, *_ = guarded("program", lambda: run(directory, (), timeout))
    return finding


@pytest.mark.parametrize(
    ("body", "part", "remedy"),
    [
        ("raise SystemExit(3)", "ended with code 3", "by hand"),
        ("import os; os.kill(os.getpid(), 4)", "SIGILL", "build it on this machine"),
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV", "by hand"),
        ("import sys; sys.stdout.buffer.write(bytes(range(256)))", "no PowerInfer", "PowerInfer"),
        ("print('usage: main')", "perhaps an old llama.cpp", "--llama-cpp-bin"),
        (
            "import sys; sys.exit('m: error while loading shared libraries: libcudart.so.12: no')",
            "libcudart.so.12",
            "LD_LIBRARY_PATH",
        ),
    ],
)
def test_programs_that_do_not_work(tmp_path: Path, body: str, part: str, remedy: str) -> None:
    found = check(write_powerinfer(tmp_path, body))
    assert found.status.value == "problem"
    assert part in found.found
    assert remedy in (found.remedy or "")


def test_a_program_for_another_machine(tmp_path: Path) -> None:
    directory = write_powerinfer(tmp_path)
    (directory / "main").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(64))
    found = check(directory)
    assert (found.status.value, "Exec format error" in found.found) == ("problem", True)


def test_a_program_that_may_not_be_started(tmp_path: Path) -> None:
    directory = write_powerinfer(tmp_path)
    (directory / "perplexity").chmod(0o644)
    assert "perplexity: no executable program" in check(directory).found


def test_a_program_that_hangs_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    body = FOREVER.replace("sys.argv[1]", repr(str(pids)))
    monkeypatch.setattr(time, "monotonic", an_hour_after(pids))
    found = check(write_powerinfer(tmp_path / "bin", body), timeout=60)
    monkeypatch.undo()
    assert (found.status.value, "no end after 60 s" in found.found) == ("problem", True)
    wait_for(all_dead(started(pids)))


def test_powerinfer_in_place_of_llama_cpp(tmp_path: Path) -> None:
    write_powerinfer(tmp_path)
    found = check(tmp_path, check_llama_cpp)
    assert (found.status.value, "--powerinfer-bin" in (found.remedy or "")) == ("problem", False)
    assert "a PowerInfer or an old llama.cpp: point --powerinfer-bin" in found.found


def test_a_llama_cpp_that_starts(tmp_path: Path) -> None:
    write_program(tmp_path / "llama-bench", "print('version: 7 (abc)')")
    found = check(tmp_path, check_llama_cpp)
    assert found.status.value == "ok"
    assert "llama-bench" in found.found


@pytest.mark.parametrize(
    ("cuda", "has_card", "status", "part"),
    [
        (True, True, "ok", "built with CUDA"),
        (True, False, "warning", "there is no NVIDIA GPU"),
        (False, True, "warning", "though there is a GPU"),
        (False, False, "ok", "built for the CPU"),
        (None, True, "ok", "does not say"),
    ],
)
def test_builds_and_cards(cuda: bool | None, has_card: bool, status: str, part: str) -> None:
    facts = ProgramFacts(path=Path("/x/main"), kind="powerinfer", version="7", cuda=cuda)
    found = told(program_findings(facts, (CARD,) if has_card else ()), "PowerInfer")
    assert (found[0], part in found[1]) == (status, True)


def test_a_cuda_build_needs_no_solver(tmp_path: Path) -> None:
    write_powerinfer(tmp_path, "print('--vram-budget N --n-gpu-layers N')")
    findings = list(check_powerinfer(tmp_path, (CARD,), 30))
    assert told(findings, "PowerInfer's solver")[0] == "ok"


def examined(*rows: tuple[str, str, str, str | None]) -> Examination:
    return Examination(
        kind=KIND,
        findings=tuple(
            Finding(check=check, status=Status(status), found=found, remedy=remedy)
            for check, status, found, remedy in rows
        ),
    )


def test_the_table_puts_the_worst_first_and_aligns() -> None:
    rows = [
        ("torch", "ok", "2.6", None),
        ("GPU index", "problem", "damaged", "psp gpu-split FILE --force"),
        ("x", "warning", "y", "z"),
    ]
    assert findings_text(examined(*rows)) == (
        "PROBLEM  GPU index  damaged\n"
        "                 -> psp gpu-split FILE --force\n"
        "\n"
        "WARNING  x          y\n"
        "                 -> z\n"
        "\n"
        "ok       torch      2.6\n"
        "\n"
        "not healthy: 1 problem, 1 warning, 1 ok"
    )


def test_long_findings_are_wrapped_but_commands_are_not() -> None:
    command = f"psp gpu-split '{'long name ' * 20}'"
    text = findings_text(examined(("file", "problem", "word " * 60, command)))
    lines = text.splitlines()
    assert all(len(line) <= WIDTH for line in lines if command not in line)
    assert sum(command in line for line in lines) == 1
    assert len(lines) > 4


def test_a_long_name_does_not_push_the_others_to_the_right() -> None:
    rows = [("LLAMA_SPARSE_PRED_THRESHOLD", "warning", "set", "unset it"), ("x", "ok", "y", None)]
    warned, remedy, _, fine, *_ = findings_text(examined(*rows)).splitlines()
    assert warned == "WARNING  LLAMA_SPARSE_PRED_THRESHOLD  set"
    assert remedy == "         -> unset it"
    assert fine == "ok       x  y"


def test_control_characters_of_names_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in findings_text(examined(("file", "problem", "a\x1b[2Jb\nc", "d")))


def test_outputs_go_beside_the_file_unless_told() -> None:
    file = Path("/a/m.powerinfer.gguf")
    assert DoctorConfig(file=file).outputs == Path("/a")
    assert DoctorConfig(file=file, out=Path("/b")).outputs == Path("/b")
    assert DoctorConfig().outputs == Path()


def test_a_disk_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    examination = examine(DoctorConfig(out=tmp_path))
    bad = {f.check for f in examination.findings if f.status is Status.PROBLEM}
    assert {"output disk", "temporary disk"} <= bad
    assert not examination.healthy


def test_a_package_that_is_missing_stops_no_other_check(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("packaging.version", "psutil", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "powerinfer_bridge.doctor.installation", raising=False)
    bad = {f.check for f in examine(DoctorConfig()).findings if f.status is Status.PROBLEM}
    assert bad == {"packages", "CPU", "memory"}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from commands.doctor import doctor\n"
        "assert CliRunner().invoke(doctor, ['--help']).exit_code == 0\n"
        "sys.exit(bool({'torch', 'numpy', 'gguf'} & sys.modules.keys()))"
    )
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.powerinfer
def test_a_real_powerinfer_is_found_well(powerinfer_bin: Path) -> None:
    found = check(powerinfer_bin)
    assert found.status.value == "ok"
