"""The journal: what is kept, and going on after a death."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_programs import FakePrograms
from click.testing import Result
from conftest import refused

from common.errors import EngineError, OutputError
from gguf_export.bundle import Bundle
from powerinfer_bridge.benchmark.journal import Journal, Sample, open_journal
from powerinfer_bridge.benchmark.run import bench
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.programs.sample import Phase, RunSample
from results.bench import BENCH

Psp = Callable[..., Result]
IDENTITY: dict[str, Any] = {"settings": {"generate": 4}, "inputs": [{"xxh3_128": "ab"}]}


def reopen(
    out: Path,
    identity: dict[str, Any] = IDENTITY,
    *,
    resume: bool = True,
    force: bool = False,
) -> Journal:
    return open_journal(out, identity, resume=resume, force=force)


@pytest.fixture
def programs(tmp_path: Path) -> FakePrograms:
    return FakePrograms(tmp_path)


@pytest.fixture
def make(
    programs: FakePrograms, exact_bundle: Bundle, text_file: Path, tmp_path: Path
) -> Callable[..., BenchConfig]:
    def config(**changes: Any) -> BenchConfig:
        settings: dict[str, Any] = {
            "file": exact_bundle.model_file,
            "powerinfer_bin": programs.powerinfer,
            "data": str(text_file),
            "context": 64,
            "chunks": 2,
            "generate": 4,
            "repeats": 3,
            "out": tmp_path / "out",
        }
        return BenchConfig(**(settings | changes))

    return config


def test_a_journal_keeps_what_it_is_told(tmp_path: Path) -> None:
    journal = reopen(tmp_path / "out")
    assert journal.remember("all", float, lambda: 12.5) == 12.5
    again = reopen(tmp_path / "out")
    assert again.quality == {"all": 12.5}

    def never() -> float:
        raise AssertionError("is known")

    assert again.remember("all", float, never) == 12.5


def test_without_a_directory_nothing_is_kept(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    journal = open_journal(None, IDENTITY, resume=False, force=False)
    journal.remember("all", float, lambda: 12.5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("torn", [b'{"sample": {"arm', b"\xff\xfe", b"{"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    file = tmp_path / "out" / "samples.jsonl"
    reopen(tmp_path / "out").remember("all", float, lambda: 12.5)
    whole = file.read_bytes()
    file.write_bytes(whole + torn)
    again = reopen(tmp_path / "out")
    assert again.quality == {"all": 12.5}
    assert file.read_bytes() == whole
    again.remember("predicted", float, lambda: 13.0)
    assert reopen(tmp_path / "out").quality == {"all": 12.5, "predicted": 13.0}


@pytest.mark.parametrize("line", ["{}", "[]", "nonsense", '{"sample": {}}', '{"quality": 3}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    reopen(tmp_path / "out")
    with (tmp_path / "out" / "samples.jsonl").open("a") as file:
        file.write(line + "\n")
    with refused(OutputError, "samples.jsonl: line 2 is damaged", "--force"):
        reopen(tmp_path / "out")


def test_a_changed_digit_is_noticed(tmp_path: Path) -> None:
    reopen(tmp_path / "out").remember("all", float, lambda: 12.5)
    file = tmp_path / "out" / "samples.jsonl"
    whole = file.read_bytes()
    for digits, others, line in ((b"12.5", b"12.4", 2), (b'"ab"', b'"ac"', 1)):
        file.write_bytes(whole.replace(digits, others))
        with refused(OutputError, f"samples.jsonl: line {line} is damaged", "--force"):
            reopen(tmp_path / "out")
    file.write_bytes(whole[:-1] + b"\x0b")  # the last line's end: no process was killed in it
    with refused(OutputError, "samples.jsonl: line 2 is damaged", "--force"):
        reopen(tmp_path / "out")


def test_a_run_that_stands_there_twice_is_no_second_one(tmp_path: Path) -> None:
    journal = reopen(tmp_path / "out")
    for round_ in (1, 2):
        run = RunSample(
            load_seconds=None, prompt=None, decode=Phase(seconds=1, tokens=4), wall_seconds=2
        )
        journal.add(Sample(arm="predicted", round=round_, prompt=0, run=run))
    file = tmp_path / "out" / "samples.jsonl"
    assert len(reopen(tmp_path / "out").samples) == 2
    file.write_bytes(file.read_bytes() + file.read_bytes().splitlines(keepends=True)[1])
    with refused(OutputError, "samples.jsonl: line 4 is damaged"):
        reopen(tmp_path / "out")


def test_a_journal_without_checksums_is_of_an_older_psp(tmp_path: Path) -> None:
    reopen(tmp_path / "out").remember("all", float, lambda: 12.5)
    file = tmp_path / "out" / "samples.jsonl"
    lines = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert all(line.pop("xxh3_128") for line in lines)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert reopen(tmp_path / "out").quality == {"all": 12.5}


def test_a_line_without_end_is_refused_at_once(tmp_path: Path) -> None:
    reopen(tmp_path / "out")
    file = tmp_path / "out" / "samples.jsonl"
    os.truncate(file, 1 << 40)  # sparse: it takes no room
    with refused(OutputError, "samples.jsonl: line 2 is damaged"):
        reopen(tmp_path / "out")
    file.unlink()
    os.mkfifo(file)
    with refused(OutputError, "no plain file"):
        reopen(tmp_path / "out")


def test_a_figure_of_another_type_is_named(tmp_path: Path) -> None:
    reopen(tmp_path / "out").remember("all", str, lambda: "much")
    with refused(OutputError, "samples.jsonl: 'all': expected a number, found 'much'", "--force"):
        reopen(tmp_path / "out").remember("all", float, lambda: 1.0)


def test_another_identity_is_refused_with_what_differs(tmp_path: Path) -> None:
    reopen(tmp_path / "out")
    other = {**IDENTITY, "settings": {"generate": 5}}
    with refused(OutputError, "settings.generate 4, now it is 5", "--force", "another --out"):
        reopen(tmp_path / "out", other)
    with refused(OutputError, "inputs.0.xxh3_128 ab, now it is cd"):
        reopen(tmp_path / "out", {**IDENTITY, "inputs": [{"xxh3_128": "cd"}]})


@pytest.mark.parametrize("content", ["", "not JSON\n", "[]\n", '{"kind": "other"}\n'])
def test_a_foreign_journal_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "samples.jsonl").write_text(content)
    with refused(OutputError, "no benchmark's journal", "another --out"):
        reopen(tmp_path)


def test_what_exists_is_kept_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    reopen(out).remember("all", float, lambda: 12.5)
    with refused(OutputError, "exists; pass --resume", "--force"):
        reopen(out, resume=False)
    assert reopen(out, resume=False, force=True).quality == {}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("precious")
    for resume in (True, False):
        with refused(OutputError, "mine"):
            reopen(tmp_path / "mine", resume=resume, force=not resume)
    assert (tmp_path / "mine" / "precious").read_text() == "precious"


def test_a_benchmark_goes_on_where_a_crash_stopped_it(
    make: Callable[..., BenchConfig], programs: FakePrograms
) -> None:
    unbroken = bench(make(out=None))
    order = [call["kind"] for call in programs.calls("predicted", "all")]
    programs.log.unlink()
    # Two runs warm up; the fifth of those that count dies.
    programs.write(
        "if len([c for c in calls if 'perplexity' not in c]) == 6: os.kill(os.getpid(), 11)"
    )
    with refused(EngineError, "main", "SIGSEGV"):
        bench(make())
    assert len(programs.calls("perplexity")) == 3
    programs.log.unlink()
    programs.write()
    resumed = bench(make(resume=True))
    # Its warm-up again, then the two that were left; no quality anew.
    assert [call["kind"] for call in programs.calls()] == [*order[:2], *order[6:]]
    differ = {"created", "settings", "samples", "arms", "warnings"}
    assert {k: v for k, v in vars(resumed).items() if k not in differ} == {
        k: v for k, v in vars(unbroken).items() if k not in differ
    }
    figures = ("arm", "round", "prompt", "decode_seconds", "text_sha256")
    for one, other in zip(resumed.samples, unbroken.samples, strict=True):
        assert [getattr(one, key) for key in figures] == [getattr(other, key) for key in figures]
    programs.log.unlink()
    assert bench(make(resume=True)).samples == resumed.samples
    assert programs.calls() == [], "nothing was left, so nothing warms up"


def test_other_settings_do_not_go_on_but_another_time_limit_does(
    make: Callable[..., BenchConfig],
) -> None:
    bench(make())
    with refused(OutputError, "settings.generate 4, now it is 5"):
        bench(make(resume=True, generate=5))
    bench(make(resume=True, timeout=60.0))


@pytest.fixture
def _can_be_interrupted() -> Iterator[None]:
    """A job in the background may have been given a SIGINT that is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_can_be_interrupted")
def test_a_benchmark_that_is_interrupted_says_how_to_go_on_and_leaves_no_orphan(
    psp: Psp, make: Callable[..., BenchConfig], programs: FakePrograms, tmp_path: Path
) -> None:
    pid, config = tmp_path / "pid", make()
    assert config.out is not None
    programs.write(
        f"open({str(pid)!r}, 'w').write(str(os.getpid()))\n"
        "if len([c for c in calls if 'perplexity' not in c]) == 4:\n"
        f"    import time\n    os.kill({os.getpid()}, 2)\n    time.sleep(600)"
    )
    options = {"--powerinfer-bin": config.powerinfer_bin, "--data": config.data, "--ctx": 64}
    options |= {"--chunks": 2, "-n": 4, "--repeats": 3, "--threads": 1, "--out": config.out}
    words = [word for pair in options.items() for word in pair]
    command = ["bench-powerinfer", config.file, *words]
    done = psp(*command)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert f"kept in {config.out}/samples.jsonl; the same with --resume goes on" in done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    head = json.loads((config.out / "samples.jsonl").read_text().split("\n")[0])
    assert head["kind"] == "psp.bench.samples"
    programs.write()
    done = psp(*command, "--resume")
    assert done.exit_code == 0, done.stderr
    assert len(BENCH.read(config.out).samples) == 6
