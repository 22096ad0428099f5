"""PowerInfer's second engine: what its programs print, how they are called, and in a benchmark."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from bench_programs import FakePrograms
from conftest import TEXT, ModelMaker, refused, write_predictors
from second_engine_programs import COUNTED, FakeSecondEngine
from stand_ins import write_program
from test_second_engine import exported

from common.errors import EngineError, FormatError
from gguf_export.bundle import export
from gguf_export.settings import ExportConfig
from gguf_export.smallthinker.second_engine import size_problem
from gguf_files.reader import GGUFFile
from powerinfer_bridge.benchmark.beside import described
from powerinfer_bridge.benchmark.run import bench
from powerinfer_bridge.benchmark.second_engine import exact_bytes_ratio, open_second_file
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.benchmark.table import bench_table
from powerinfer_bridge.engine.expert import ExpertEngine
from powerinfer_bridge.engine.perplexity import engine_score
from powerinfer_bridge.programs.sample import Phase
from powerinfer_bridge.programs.second_engine import (
    AMX_NOTE,
    MOST_THREADS,
    SecondEngine,
    activity,
    continued,
)
from results.bench import SECOND, Bench
from results.parts import METRICS, Metrics


@pytest.fixture(scope="module")
def model(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("pages") / "model", intermediate_size=1024)


@pytest.fixture(scope="module")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model for the first engine, the second, and llama.cpp."""
    out = tmp_path_factory.mktemp("engines")
    write_predictors(model, out / "predictors")
    first = ExportConfig(
        model=str(model), predictors=out / "predictors", out=out / "m.powerinfer.gguf"
    )
    return {
        "first": export(first).model_file,
        "second": exported(model, out / "m.smallthinker.gguf"),
        "llama.cpp": exported(model, out / "m.gguf", "llama.cpp"),
    }


def generated(engine: SecondEngine, model: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {"count": 5, "threads": 2, "context": 64} | changes
    return engine.generate(model, "A prompt\\n", **settings)


@pytest.mark.parametrize("text", [" and more", "", "a\n", "one\n\ntwo\n\n\n", "tab\t "])
def test_the_text_is_all_that_was_printed_before_the_counts(text: str) -> None:
    assert continued(f"{text}\n\n{COUNTED}\n") == text
    assert continued(f"{text}\n\n") == text


def test_a_text_that_speaks_of_counts_keeps_them() -> None:
    text = f"{COUNTED}\nand on"
    assert continued(f"{text}\n\n{COUNTED}\n") == text


def test_activity_is_read_from_the_counts() -> None:
    assert activity(f"x\n\n{COUNTED}\n") == 0.05
    assert activity("x\n\n") is None
    assert activity(COUNTED.replace("1600", "0") + "\n") is None


def test_a_run_is_read_and_called_as_it_must_be(tmp_path: Path) -> None:
    fake = FakeSecondEngine(tmp_path / "bin", text=" and\n more")
    run = generated(SecondEngine(tmp_path), tmp_path / "m.gguf", count=5)
    assert run.text == " and\n more"
    assert run.decode == Phase(seconds=pytest.approx(0.4), tokens=4)  # type: ignore[arg-type]
    assert run.prompt == Phase(seconds=0.01, tokens=5)
    assert run.device["active_share"] == 0.05
    assert run.notes == ()
    argv = fake.calls("cli")[0]
    options = dict(pairwise(argv))
    assert options["-p"] == "A prompt\\n"
    assert (options["-n"], options["-t"], options["-c"]) == ("5", "2", "64")
    assert {"--no-escape", "--no-display-prompt", "--ignore-eos", "-no-cnv"} <= set(argv)
    assert "-ub" not in argv


def test_a_build_with_amx_reads_prompts_in_small_batches(tmp_path: Path) -> None:
    fake = FakeSecondEngine(tmp_path, amx=True)
    engine = SecondEngine(tmp_path)
    engine.check(tmp_path / "m.gguf")
    run = generated(engine, tmp_path / "m.gguf")
    engine.score(tmp_path / "m.gguf", "text", 32, 2, threads=1)
    assert AMX_NOTE in run.notes
    for argv in (fake.calls("cli")[-1], fake.calls("perplexity")[-1]):
        assert int(argv[argv.index("-ub") + 1]) < 32


def test_a_score_has_its_windows(tmp_path: Path) -> None:
    fake = FakeSecondEngine(tmp_path)
    found = SecondEngine(tmp_path).score(tmp_path / "m.gguf", "text", 32, None, threads=1)
    assert found.perplexity == 12.5
    assert len(found.windows) == 2
    argv = fake.calls("perplexity")[0]
    assert argv[argv.index("--chunks") + 1] == "-1"


def test_a_score_that_was_not_printed_is_an_error(tmp_path: Path) -> None:
    FakeSecondEngine(tmp_path)
    write_program(tmp_path / "llama-perplexity", "print('nothing')")
    with refused(EngineError, "llama-perplexity", "no estimate"):
        SecondEngine(tmp_path).score(tmp_path / "m.gguf", "text", 32, 2, threads=1)


def test_llama_cpp_s_programs_are_told(tmp_path: Path) -> None:
    FakeSecondEngine(tmp_path, counted="")
    with refused(EngineError, "llama-cli", "llama.cpp", "--llama-cpp-bin"):
        SecondEngine(tmp_path).check(tmp_path / "m.gguf")
    fault = "sys.stderr.write('error loading model: tensor has wrong shape'); sys.exit(1)"
    FakeSecondEngine(tmp_path, fault=fault)
    with refused(EngineError, "llama-cli", "llama.cpp", "--llama-cpp-bin"):
        SecondEngine(tmp_path).check(tmp_path / "m.gguf")


def test_an_assertion_is_told_in_one_line(tmp_path: Path) -> None:
    fault = "sys.stderr.write('x.c:1: GGML_ASSERT(a == b) failed\\n'); sys.exit(134)"
    FakeSecondEngine(tmp_path, fault=fault)
    with refused(EngineError, "GGML_ASSERT(a == b)"):
        generated(SecondEngine(tmp_path), tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["llama-cli", "llama-perplexity"])
def test_a_missing_program_is_named(tmp_path: Path, name: str) -> None:
    FakeSecondEngine(tmp_path)
    (tmp_path / name).unlink()
    with refused(EngineError, name, "--second-engine-bin", "PSP_SECOND_ENGINE_BIN"):
        SecondEngine(tmp_path)


def test_more_threads_than_it_has_room_for_are_refused(tmp_path: Path) -> None:
    FakeSecondEngine(tmp_path)
    with refused(EngineError, f"--threads {MOST_THREADS + 1}", str(MOST_THREADS)):
        generated(SecondEngine(tmp_path), tmp_path / "m.gguf", threads=MOST_THREADS + 1)


def test_one_token_is_no_time(tmp_path: Path) -> None:
    FakeSecondEngine(tmp_path)
    with refused(EngineError, "1 tokens"):
        generated(SecondEngine(tmp_path), tmp_path / "m.gguf", count=1)


def test_exact_sparsity_reads_all_of_the_gate() -> None:
    zeros = dict.fromkeys(METRICS, 0.0)
    layers = [Metrics(**{**zeros, "activation_sparsity": share}) for share in (1.0, 0.4)]
    assert exact_bytes_ratio(layers) == pytest.approx((1 / 3 + (1 + 1.2) / 3) / 2)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("first", ("first engine",)), ("llama.cpp", ("llama.cpp", "transposed"))],
)
def test_files_of_other_engines_are_refused(
    files: dict[str, Path], kind: str, words: tuple[str, ...]
) -> None:
    with refused(FormatError, str(files[kind]), "--engine smallthinker", *words):
        open_second_file(files[kind])


def test_another_model_s_file_is_refused(
    files: dict[str, Path], make_model: ModelMaker, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", intermediate_size=1024, seed=1)
    file = exported(other, tmp_path / "o.smallthinker.gguf")
    with refused(FormatError, str(file), "another model"):
        described(open_second_file(file), GGUFFile(files["first"]))


@pytest.fixture
def run(files: dict[str, Path], tmp_path: Path, text_file: Path) -> Callable[..., Bench]:
    def measure(**changes: Any) -> Bench:
        programs = FakePrograms(tmp_path / "programs")
        FakeSecondEngine(tmp_path / "second")
        settings: dict[str, Any] = {
            "file": files["first"],
            "powerinfer_bin": programs.powerinfer,
            "second_engine_bin": tmp_path / "second",
            "second_engine_gguf": files["second"],
            "data": str(text_file),
            "context": 32,
            "chunks": 1,
            "generate": 4,
            "repeats": 1,
        }
        return bench(BenchConfig(**(settings | changes)))

    return measure


def test_it_is_one_more_arm_of_the_same_table(run: Callable[..., Bench]) -> None:
    found = run()
    assert [arm.name for arm in found.arms] == ["all_neurons", "predicted", SECOND]
    arm = found.arm(SECOND)
    assert arm is not None
    assert arm.decode.tokens_per_second == pytest.approx(10)
    assert arm.perplexity == 12.5
    active = 1 - found.activation_sparsity
    assert arm.ffn_bytes_ratio == pytest.approx((1 + 2 * active) / 3)
    assert arm.element_type == "Q4_0"
    assert not arm.dense
    assert found.over(SECOND) is not None
    assert found.versions.second_engine == "0 (unknown)"
    assert "second_engine_model" in {each.role for each in found.inputs}
    row = next(line for line in bench_table(found).splitlines() if "second engine  " in line)
    assert "12.5000" in row
    assert f"{arm.ffn_bytes_ratio:.3f}" in row


def test_it_goes_on_after_an_interruption(run: Callable[..., Bench], tmp_path: Path) -> None:
    before = run(out=tmp_path / "out")
    again = run(out=tmp_path / "out", resume=True)
    assert again.arm(SECOND) == before.arm(SECOND)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"second_engine_bin": None}, ("--second-engine-gguf", "pass --second-engine-bin")),
        ({"second_engine_gguf": None}, ("second engine", "pass --second-engine-gguf")),
        ({"threads": 9}, ("--threads 9",)),
    ],
)
def test_settings_that_lack_something_are_refused(
    run: Callable[..., Bench], changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    with refused(EngineError, *words):
        run(**changes)


def test_the_real_engine_computes_what_psp_computes(
    second_engine_bin: Path, files: dict[str, Path]
) -> None:
    """Perplexity of the same windows, in psp's own reading of the same Q4_0 weights."""
    engine, model = SecondEngine(second_engine_bin), files["second"]
    engine.check(model)
    text = TEXT * 20
    found = engine.score(model, text, 64, 8, threads=1)
    own = engine_score(ExpertEngine(model), text, 64, 8, "own")
    assert len(found.windows) == len(own.windows)
    assert found.perplexity == pytest.approx(own.perplexity, rel=5e-3)


def test_the_real_engine_computes_heads_of_another_size(
    second_engine_bin: Path, make_model: ModelMaker, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", intermediate_size=1024, head_dim=32)
    file, text = exported(model, tmp_path / "m.smallthinker.gguf"), TEXT * 8
    found = SecondEngine(second_engine_bin).score(file, text, 64, 4, threads=1)
    own = engine_score(ExpertEngine(file), text, 64, 4, "own")
    assert found.perplexity == pytest.approx(own.perplexity, rel=5e-3)


def test_the_real_engine_skips_neurons_and_says_how_many(
    second_engine_bin: Path, files: dict[str, Path]
) -> None:
    engine = SecondEngine(second_engine_bin)
    assert engine.check(files["second"]).kind == "second engine"
    sparse = generated(engine, files["second"], count=8)
    share = sparse.device["active_share"]
    assert isinstance(share, float)
    assert 0.3 < share < 0.7  # random gates
    assert sparse.decode.tokens == 7
    dense = generated(engine, files["llama.cpp"], count=8)
    assert "active_share" not in dense.device


def test_the_real_engine_stops_at_sizes_that_psp_refuses(
    second_engine_bin: Path, model_dir: Path, tmp_path: Path
) -> None:
    """Matrices that do not fill pages; llama.cpp has no such demand."""
    assert size_problem(64, 1012) is not None
    file = exported(model_dir, tmp_path / "m.gguf", "llama.cpp", "f16")
    with refused(EngineError, "GGML_ASSERT", "4096"):
        generated(SecondEngine(second_engine_bin), file)


def test_a_real_llama_cpp_is_told(llama_cpp_bin: Path, files: dict[str, Path]) -> None:
    from powerinfer_bridge.programs.build import build_directory

    programs = build_directory(llama_cpp_bin, ("llama-cli",))
    if not (programs / "llama-cli").exists() or not (programs / "llama-perplexity").exists():
        pytest.skip("this build has no llama-cli or llama-perplexity")
    with refused(EngineError, "llama-cli", "--llama-cpp-bin"):
        SecondEngine(llama_cpp_bin).check(files["second"])
