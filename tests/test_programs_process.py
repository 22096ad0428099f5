"""Running a program: what it gets, what is kept of it, and that nothing of it is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import refused
from processes import FOREVER, SLEEPER, alive, all_dead, an_hour_after, started, wait_for
from stand_ins import in_one_line, write_program

from common.errors import EngineError
from powerinfer_bridge.programs import launch
from powerinfer_bridge.programs.process import OUTPUT_LIMIT, run_program

ALONE = FOREVER.replace("600)']", "0)']").replace("child.pid", "os.getpid()")
"""What a program started itself outlives a SIGKILL of psp: nobody is left to end it."""
PSP = """
import signal, sys
# A job in the background, or under nohup, may have been given signals that are ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from powerinfer_bridge.programs import launch
from powerinfer_bridge.programs.process import run_program
run_program(sys.argv[1:], timeout=300)
"""


@pytest.fixture
def _typed() -> Iterator[None]:
    """Something waits to be read where the tests themselves read from."""
    saved, (there, here) = os.dup(0), os.pipe()
    os.write(here, b"typed")
    os.close(here)
    os.dup2(there, 0)
    yield
    os.dup2(saved, 0)
    os.close(saved)
    os.close(there)


@pytest.mark.usefixtures("_typed")
def test_a_program_gets_its_arguments_and_an_empty_place_and_nothing_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PSP_TAKEN", "away")
    monkeypatch.setenv("PSP_KEPT", "kept")
    body = (
        "import json, os, sys\n"
        "names = ('PSP_TAKEN', 'PSP_KEPT', 'PSP_GIVEN')\n"
        "print(json.dumps([sys.argv[1:], os.getcwd(), os.listdir(), sys.stdin.read(),"
        " [os.environ.get(name) for name in names]]))\n"
        "sys.stderr.write('aside')\nsys.exit(7)"
    )
    program = write_program(tmp_path / "my 'program' $x", body)
    arguments = ["two words", "", "--help", "$(no) `no` \\ \n 'ü'", "*"]
    run = run_program(
        [str(program), *arguments],
        timeout=30,
        environment={"PSP_TAKEN": None, "PSP_GIVEN": "given"},
    )
    seen, place, files, read, variables = json.loads(run.stdout)
    assert seen == arguments
    assert (files, read, variables) == ([], "", [None, "kept", "given"])
    assert not Path(place).exists()
    assert (run.code, run.stderr) == (7, "aside")
    assert run.command == (str(program), *arguments)
    assert run.environment == {"PSP_GIVEN": "given"}
    assert 0 < run.seconds < 30


def test_numbers_of_programs_have_a_point_in_every_locale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    code = "import os\nprint(os.environ.get('LC_ALL'), os.environ['LC_NUMERIC'])"
    run = run_program([str(write_program(tmp_path / "main", code))], timeout=30)
    assert run.stdout == "None C\n"
    assert run.environment == {}


def test_output_in_a_wrong_encoding_is_kept_as_far_as_it_can_be(tmp_path: Path) -> None:
    body = "import sys\nsys.stdout.buffer.write('é'.encode('latin-1') + b'\\x00 ok')"
    run = run_program([str(write_program(tmp_path / "p", body))], timeout=30)
    assert run.stdout == "\ufffd\x00 ok"


def test_signals_that_end_a_program_are_its_code(tmp_path: Path) -> None:
    body = "import os\nos.kill(os.getpid(), 11)"
    run = run_program([str(write_program(tmp_path / "p", body))], timeout=30)
    assert run.code == -signal.SIGSEGV


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.write_bytes(b"\x7fELF nonsense")])
def test_what_cannot_be_started_is_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "program")
    if (tmp_path / "program").exists():
        (tmp_path / "program").chmod(0o755)
    with pytest.raises(EngineError) as caught:
        run_program([str(tmp_path / "program")], timeout=30)
    reason = "Exec format error" if (tmp_path / "program").exists() else "No such file"
    in_one_line(caught.value, f"{tmp_path / 'program'}: cannot be started ({reason}")


def test_an_argument_with_nul_is_named_and_no_bug(tmp_path: Path) -> None:
    program = write_program(tmp_path / "p", "print()")
    with refused(EngineError, "cannot be started", "null byte"):
        run_program([str(program), "a\x00b"], timeout=30)


def test_a_program_and_all_it_started_end_at_the_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "import signal, sys\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    body += "print('loading', file=sys.stderr, flush=True)" + FOREVER
    program = write_program(tmp_path / "p", body)
    monkeypatch.setattr(time, "monotonic", an_hour_after(tmp_path / "pids"))
    with refused(EngineError, f"{program}: no end after 300 s: loading; "):
        run_program([str(program), str(tmp_path / "pids")], timeout=300)
    monkeypatch.undo()
    wait_for(all_dead(started(tmp_path / "pids")))


def test_a_program_that_shuts_its_output_and_hangs_meets_the_limit(tmp_path: Path) -> None:
    program = write_program(
        tmp_path / "p", "import os, time\nos.close(1), os.close(2)\ntime.sleep(600)"
    )
    with refused(EngineError, "no end after 0.5 s"):
        run_program([str(program)], timeout=0.5)


def test_an_end_is_seen_though_something_it_started_holds_its_output(tmp_path: Path) -> None:
    program = write_program(tmp_path / "p", SLEEPER + "print('done', flush=True)")
    run = run_program([str(program), str(tmp_path / "pids")], timeout=300)
    assert (run.stdout, run.code) == ("done\n", 0)
    assert run.seconds < 60
    wait_for(all_dead(started(tmp_path / "pids")))


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output_without_a_line_s_end_is_stopped(tmp_path: Path, stream: str) -> None:
    body = f"import sys\nwhile True: sys.{stream}.write('garbage ' * 8192)"
    program = write_program(tmp_path / "p", body)
    with pytest.raises(EngineError) as caught:
        run_program([str(program)], timeout=300)
    in_one_line(caught.value, f"{program}: printed more than {OUTPUT_LIMIT // 1024**2} MiB")


def test_a_heartbeat_is_felt_while_a_program_runs(tmp_path: Path) -> None:
    beats: list[float] = []
    body = "import time\nfor _ in range(100): time.sleep(0.01), print('x', flush=True)"
    program = write_program(tmp_path / "p", body)
    run_program([str(program)], timeout=30, heartbeat=beats.append)
    assert len(beats) >= 3
    assert all(later - sooner >= 0.19 for sooner, later in pairwise(beats)), "not at every line"
    assert 0.5 < beats[-1] < 30


def test_an_error_in_the_heartbeat_ends_the_program(tmp_path: Path) -> None:
    def stop(seconds: float) -> None:
        if (tmp_path / "pids").exists():
            raise ZeroDivisionError

    program = write_program(tmp_path / "p", FOREVER)
    with pytest.raises(ZeroDivisionError):
        run_program([str(program), str(tmp_path / "pids")], timeout=300, heartbeat=stop)
    wait_for(all_dead(started(tmp_path / "pids")))


ENDINGS = {
    signal.SIGTERM: 128 + signal.SIGTERM,
    signal.SIGHUP: 128 + signal.SIGHUP,
    signal.SIGINT: -signal.SIGINT,  # a KeyboardInterrupt, which Python ends with by the signal
    signal.SIGKILL: -signal.SIGKILL,
}


@pytest.mark.parametrize("number", ENDINGS)
def test_no_orphan_is_left_when_psp_is_ended(tmp_path: Path, number: signal.Signals) -> None:
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux can end a program with its parent")
    program = write_program(tmp_path / "p", ALONE if number == signal.SIGKILL else FOREVER)
    file = tmp_path / "pids"
    psp = subprocess.Popen(
        [sys.executable, "-c", PSP, str(program), str(file)], stderr=subprocess.DEVNULL
    )
    try:
        pids = started(file)
        assert all(alive(pid) for pid in pids)
        psp.send_signal(number)
        assert psp.wait(30) == ENDINGS[number]
        wait_for(all_dead(pids))
    finally:
        psp.kill()
        psp.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can end a program with its parent")
def test_nothing_is_started_for_a_psp_that_is_gone() -> None:
    script = str(Path(launch.__file__))
    done = subprocess.run(
        [sys.executable, script, "1", "/bin/echo", "started"], capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (launch.CANNOT_START, b"")
    done = subprocess.run(
        [sys.executable, script, str(os.getpid()), "/bin/echo", "started"], capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b"started\n")


def test_handlers_are_as_before_and_foreign_ones_left_alone(tmp_path: Path) -> None:
    seen: list[object] = []

    def look(seconds: float) -> None:
        seen.append((signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGTERM)))

    program = write_program(tmp_path / "p", "print('done')")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    term = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        run_program([str(program)], timeout=30, heartbeat=look)
        during = seen[0]
        assert isinstance(during, tuple)
        assert during[0] == signal.SIG_IGN, "nohup psp … goes on"
        assert callable(during[1])
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGTERM, term)


def test_a_program_can_be_run_in_another_thread(tmp_path: Path) -> None:
    program = write_program(tmp_path / "p", "print('done')")
    seen: list[str] = []
    thread = threading.Thread(
        target=lambda: seen.append(run_program([str(program)], timeout=30).stdout)
    )
    thread.start()
    thread.join(60)
    assert seen == ["done\n"]
