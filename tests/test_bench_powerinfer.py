"""The whole benchmark on programs that answer at once: what runs, and what is made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_programs import FakePrograms
from click.testing import Result
from conftest import refused

import powerinfer_bridge.benchmark.run
from common.errors import CheckpointError, EngineError, FormatError, PspError
from common.outputs import kept_beside
from common.typed_json import plain
from gguf_export.bundle import Bundle, export
from gguf_export.pwri.schema import DENSE_THRESHOLD
from gguf_export.settings import ExportConfig
from powerinfer_bridge.benchmark.journal import JOURNAL
from powerinfer_bridge.benchmark.run import bench
from powerinfer_bridge.benchmark.settings import BenchConfig
from results.bench import BENCH

Psp = Callable[..., Result]
SMALL = ("--ctx", 32, "--chunks", 1, "-n", 4, "--threads", 2)


@pytest.fixture(scope="module")
def dense(model_dir: Path, exact_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dense") / "m.powerinfer.gguf"
    export(
        ExportConfig(
            model=str(model_dir), predictors=exact_dir, out=out, dense=True, dense_arch="llama"
        )
    )
    return out.with_name("m.dense.gguf")


@pytest.fixture
def programs(tmp_path: Path) -> FakePrograms:
    return FakePrograms(tmp_path)


@pytest.fixture
def run(
    programs: FakePrograms, exact_bundle: Bundle, text_file: Path
) -> Callable[..., dict[str, Any]]:
    def measure(**changes: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "file": exact_bundle.model_file,
            "powerinfer_bin": programs.powerinfer,
            "data": str(text_file),
            "context": 32,
            "chunks": 1,
            "generate": 4,
            "repeats": 1,
        }
        found: dict[str, Any] = plain(bench(BenchConfig(**(settings | changes))))
        return found

    return measure


def test_speeds_are_those_of_the_programs(run: Callable[..., dict[str, Any]], dense: Path) -> None:
    found = run(dense_gguf=dense, repeats=2)
    speeds = {arm["name"]: arm["decode"]["tokens_per_second"] for arm in found["arms"]}
    expected = {"all_neurons": 5.0, "predicted": 10.0, "dense_powerinfer": 2.5}
    assert speeds == pytest.approx(expected)
    assert list(speeds) == list(expected)
    assert found["speedup"] == pytest.approx(2.0)
    prompts = [arm["prompt"]["tokens_per_second"] for arm in found["arms"]]
    assert prompts == pytest.approx([250.0, 500.0, 125.0])
    assert {each["over"]: each["ratio"] for each in found["speedups"]} == pytest.approx(
        {"all_neurons": 2.0, "dense_powerinfer": 4.0}
    )
    own = [arm["speedup"] and arm["speedup"]["ratio"] for arm in found["arms"]]
    assert own == [None, pytest.approx(2.0), pytest.approx(0.5)]
    assert found["arms"][0]["load_seconds"] == pytest.approx(0.05)


def test_what_force_replaces_is_kept_until_the_new_one_is_complete(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in (JOURNAL, BENCH.name):
        (out / name).write_text("old")
    kept = kept_beside(out) / BENCH.name

    def fail(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(powerinfer_bridge.benchmark.run, "measure_quality", fail)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run(out=out, force=True)
            assert kept.read_text() == "old"
            assert not (out / BENCH.name).exists()
    assert len(run(out=out, resume=True)["samples"]) == 2
    assert not kept.parent.exists()


def test_arms_alternate_in_every_round_and_warm_up_is_not_kept(
    run: Callable[..., dict[str, Any]], programs: FakePrograms
) -> None:
    found = run(warm_up=2, repeats=4)
    kinds = [call["kind"] for call in programs.calls("predicted", "all")]
    assert kinds == ["all", "predicted", "predicted", "all"] * 3
    assert [sample["round"] for sample in found["samples"]] == [1, 1, 2, 2, 3, 3, 4, 4]
    programs.log.unlink()
    run(warm_up=0)
    assert len(programs.calls("predicted", "all")) == 2


def test_options_reach_the_programs(
    run: Callable[..., dict[str, Any]], programs: FakePrograms, exact_bundle: Bundle
) -> None:
    found = run(threads=3, seed=7, vram_budget="2GiB")
    first = programs.calls("all")[0]["argv"]
    for option, value in (("--threads", "3"), ("--seed", "7"), ("-n", "4"), ("--vram-budget", "2")):
        assert first[first.index(option) + 1] == value
    assert "--ignore-eos" in first
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert arms["all_neurons"]["threshold"] == DENSE_THRESHOLD
    assert float(*arms["all_neurons"]["environment"].values()) == DENSE_THRESHOLD
    assert arms["predicted"]["environment"] == {}
    assert arms["predicted"]["vram_budget_bytes"] == 2 << 30
    assert str(exact_bundle.model_file.resolve()) in arms["predicted"]["command"]
    assert "no-cuda" in {warning["code"] for warning in found["warnings"]}


@pytest.mark.parametrize(
    ("cuda", "threads", "measured", "told"),
    [
        (False, 1, [1, 1], None),
        (False, 2, [1, 2, 1], 12.06),
        (False, 8, [1, 8, 1], 24.12),
        (True, 2, [2, 2], None),
        (True, 8, [2, 8, 2], 24.12),
    ],
)
def test_quality_is_that_of_exact_sums_and_what_more_threads_make_of_it_is_told(
    run: Callable[..., dict[str, Any]],
    tmp_path: Path,
    cuda: bool,
    threads: int,
    measured: list[int],
    told: float | None,
) -> None:
    programs = FakePrograms(tmp_path / "programs", cuda=cuda)
    found = run(powerinfer_bin=programs.powerinfer, threads=threads)
    calls = [call["argv"] for call in programs.calls("perplexity")]
    assert [int(argv[argv.index("--threads") + 1]) for argv in calls] == measured
    assert (found["ppl_sparse"], found["ppl_dense"]) == (12.06, 12)
    assert found["ppl_threads"] == (None if told is None else pytest.approx(told))
    said = [each["text"] for each in found["warnings"] if each["code"] == "threads"]
    exact = 2 if cuda else 1
    assert bool(said) == (told == 24.12)
    assert all("24.1200, +100.00%" in text and f"-t {exact} " in text for text in said)


def test_one_thread_is_refused_where_a_gpu_needs_another(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    card = FakePrograms(tmp_path / "card", cuda=True)
    with refused(EngineError, "--threads 1", "pass at least 2"):
        run(powerinfer_bin=card.powerinfer, threads=1)
    assert not card.calls("predicted", "all")
    assert run(powerinfer_bin=card.powerinfer, threads=2)["engine"] == "PowerInfer"


def test_an_estimate_that_cannot_be_made_costs_no_measurement(
    run: Callable[..., dict[str, Any]],
) -> None:
    """The statistics by which neurons are chosen for a GPU are missing."""
    found = run(hardware="rtx4090+ddr5", vram_budget="900GiB")
    assert found["estimate"] is None
    texts = {warning["code"]: warning["text"] for warning in found["warnings"]}
    assert texts["no-estimate"].startswith("no estimate: ")


def test_perplexity_is_the_same_binary_s_and_transformers_own(
    run: Callable[..., dict[str, Any]], model_dir: Path
) -> None:
    found = run(model=str(model_dir))
    assert (found["ppl_sparse"], found["ppl_dense"]) == (12.06, 12.0)
    assert found["ppl_gap"] == pytest.approx(0.005)
    embedded = run(model=str(model_dir), powerinfer_bin=None)
    own = embedded["ppl_transformers"]
    assert own == found["ppl_transformers"]
    assert own == pytest.approx(embedded["ppl_dense"], rel=2e-3)
    assert own != pytest.approx(12.0, rel=0.01)


def test_another_model_is_refused_before_anything_runs(
    run: Callable[..., dict[str, Any]], programs: FakePrograms, make_model: Any, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", seed=5)
    with refused(CheckpointError, str(other), "is not the model", "--model"):
        run(model=str(other))
    assert programs.calls("perplexity", "predicted") == []


def test_llama_cpp_is_measured_with_the_same_sizes(
    run: Callable[..., dict[str, Any]], programs: FakePrograms, dense: Path
) -> None:
    llama = {"llama_cpp_bin": str(programs.llama_cpp), "llama_cpp_gguf": dense}
    found = run(**llama, n_gpu_layers=2, prompt="x", repeats=2)
    last = found["arms"][-1]
    assert last["decode"]["tokens_per_second"] == pytest.approx(20.0)
    assert last["prompt"]["tokens_per_second"] == pytest.approx(1000.0)
    assert (last["n_gpu_layers"], last["engine"], last["element_type"]) == (2, "llama.cpp", "F16")
    assert found["versions"]["llama_cpp"] == "7 (fedcba9)"
    argv = programs.calls("llama.cpp")[0]["argv"]
    prompt_tokens = programs.calls("llama.cpp")[0]["argv"][argv.index("-p") + 1]
    assert int(prompt_tokens) == next(
        sample["prompt_tokens"] for sample in found["samples"] if sample["arm"] == last["name"]
    )
    assert {entry["role"] for entry in found["inputs"]} == {
        *("model", "llama_cpp_model", "text", "prompts")
    }


def test_several_prompts_make_one_figure_a_round(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("The\n\nlonger one\n")
    found = run(prompts=tmp_path / "prompts.txt", repeats=2)
    assert found["prompts"] == 2
    assert len(found["samples"]) == 2 * 2 * 2
    # 3 tokens in 0.3 s and 3 in 0.9 s: 5 a second; the mean of both rates would be 6.67.
    assert found["tokens_per_second"] == pytest.approx(5.0)
    assert found["arms"][1]["decode"]["rounds"] == 2


def test_texts_that_differ_are_told(
    run: Callable[..., dict[str, Any]], tmp_path: Path, text_file: Path, exact_bundle: Bundle
) -> None:
    other = FakePrograms(tmp_path / "other", text="' text of ' + kind")
    found = run(powerinfer_bin=other.powerinfer)
    assert found["continuations"] == {"sparse": " text of predicted", "dense": " text of all"}
    assert not found["greedy_text_same"]
    assert "texts-differ" in {warning["code"] for warning in found["warnings"]}


def test_the_embedded_engine_stands_in(run: Callable[..., dict[str, Any]]) -> None:
    found = run(powerinfer_bin=None)
    assert found["engine"] == "embedded engine"
    assert found["arms"][0]["prompt"]["tokens_per_second"] > 0
    assert found["samples"][0]["decode_tokens"] == 3
    assert [warning["code"] for warning in found["warnings"]] == ["embedded-engine"]


FAULTS = {
    "crash": ("os.kill(os.getpid(), 11)", "SIGSEGV"),
    "hang": ("import time; time.sleep(600)", "no end after 0.5 s"),
    "garbage": ("sys.stdout.buffer.write(b'\\xff\\x00'); sys.exit(0)", "no decoding"),
    "nothing": ("sys.exit(0)", "no decoding"),
    "refused model": ("print('error: bad model', file=sys.stderr); sys.exit(1)", "bad model"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_program_that_fails_ends_it_in_one_line(
    run: Callable[..., dict[str, Any]], programs: FakePrograms, name: str
) -> None:
    fault, problem = FAULTS[name]
    programs.write(fault)
    with refused(EngineError, problem, "; "):
        run(timeout=0.5 if name == "hang" else 60.0)


def test_files_of_the_wrong_kind_are_refused(
    run: Callable[..., dict[str, Any]], exact_bundle: Bundle, dense: Path, programs: FakePrograms
) -> None:
    with refused(FormatError, "is a sparse file", "--dense"):
        run(dense_gguf=exact_bundle.model_file)
    with refused(FormatError, "dense file; pass a *.powerinfer.gguf"):
        run(file=dense)
    with refused(PspError, "llama-bench", "--llama-cpp-bin"):
        run(dense_gguf=dense, llama_cpp_bin=str(programs.powerinfer))


def test_the_table_has_a_row_an_arm(
    psp: Psp,
    programs: FakePrograms,
    exact_bundle: Bundle,
    text_file: Path,
    dense: Path,
    tmp_path: Path,
) -> None:
    command = ["bench-powerinfer", exact_bundle.model_file, "--data", text_file, *SMALL]
    command += ["--powerinfer-bin", programs.powerinfer]
    alone = psp(*command, "--repeats", 1).stdout.splitlines()
    assert alone[0].split()[-2:] == ["tokens/s", "speedup"]
    assert [line.split()[-2:] for line in alone[2:4]] == [["5.00", "1.00"], ["10.00", "2.00"]]
    assert alone[4] == ""
    out = tmp_path / "results"
    command += ["--dense-gguf", dense, "--llama-cpp-bin", programs.llama_cpp]
    command += ["--repeats", 5, "--out", out]
    shown = psp(*command).stdout
    lines = shown.splitlines()
    assert lines[0].endswith("speedup  vs dense")
    rows = [line.split()[-3:] for line in lines[2:6]]
    assert rows == [
        *(["5.00", "1.00", "0.25"], ["10.00", "2.00", "0.50"]),
        *(["2.50", "0.50", "0.12"], ["20.00", "4.00", "1.00"]),
    ]
    assert "vs dense: llama.cpp, dense file, F16, 2 threads, -ngl 0" in shown
    assert "0.50 times; round by round 0.50 to 0.50 (quartiles of 5)" in shown
    assert "warning: llama.cpp, dense file: computes SiLU" in shown
    assert lines[-1] == f"results: {out}/bench.json, {out}/bench.csv, {out}/samples.jsonl"
    document = plain(BENCH.read(out))
    assert json.loads(psp(*command, "--resume", "--json").stdout)["arms"] == document["arms"]
    assert "exists; pass --resume" in psp(*command).stderr


@pytest.mark.powerinfer
def test_a_real_powerinfer_is_measured(
    run: Callable[..., dict[str, Any]],
    powerinfer_bin: Path,
    dense: Path,
    model_dir: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "prompts.txt").write_text("The quick\ndef f(\n")
    settings: dict[str, Any] = {"prompts": tmp_path / "prompts.txt", "threads": 1, "repeats": 2}
    settings |= {"model": str(model_dir), "generate": 16, "dense_gguf": dense}
    found = run(powerinfer_bin=powerinfer_bin, **settings)
    assert [arm["name"] for arm in found["arms"]] == [
        *("all_neurons", "predicted", "dense_powerinfer")
    ]
    assert found["ppl_dense"] == pytest.approx(found["ppl_transformers"], rel=0.005)
    assert found["ppl_sparse"] == pytest.approx(found["ppl_dense"], rel=0.005)
    assert found["greedy_text_same"], "predictors are exact"
    assert {row["decode_tokens"] for row in found["samples"]} == {15}
    # Exact predictors compute only what is active: the embedded engine's text is the same.
    embedded = run(powerinfer_bin=None, **(settings | {"dense_gguf": None}))
    mine, theirs = embedded["continuations"]["sparse"], found["continuations"]["sparse"]
    assert mine.rstrip("\n") == theirs.rstrip("\n")
