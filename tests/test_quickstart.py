"""The quickstart at its smallest size, and what it exports in a real PowerInfer."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli import main
from common.errors import OutputError, ResultError
from common.sealed import read_sealed
from common.typed_json import plain
from gguf_export.pwri.schema import DENSE_THRESHOLD
from powerinfer_bridge.engine.engine import Engine, generate
from powerinfer_bridge.engine.perplexity import engine_perplexity
from powerinfer_bridge.programs.powerinfer import PowerInfer
from quickstart.model import library_files, write_corpus
from quickstart.pipeline import Paths, quickstart
from quickstart.settings import QuickstartConfig
from report.runs import load_runs
from results.evaluation import EVALUATION


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuickstartConfig, str]:
    """Run `psp quickstart --size tiny` once; returns its settings and what it printed."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    result = CliRunner().invoke(
        main, ["quickstart", "--size", "tiny", "--threads", "1", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    return QuickstartConfig(out=out, size="tiny", threads=1), result.stdout


def test_prints_the_summary_and_every_path(finished: tuple[QuickstartConfig, str]) -> None:
    config, printed = finished
    for column in ("sparsity %", "recall %", "pred. sparsity %", "FFN bytes", "perplexity"):
        assert column in printed
    assert "embedded engine" in printed
    for path in Paths(config.out).all().values():
        assert path.exists()
        assert str(path) in printed


def test_model_is_sparse_and_predictors_are_useful(
    finished: tuple[QuickstartConfig, str],
) -> None:
    config, _ = finished
    result = json.loads(Paths(config.out).result.read_text())
    assert 0.80 <= result["activation_sparsity"] <= 0.95
    assert result["activation_recall"] > 0.7
    assert result["predicted_sparsity"] > 0.6
    assert abs(result["ppl_gap"]) < 0.03
    # Untrained, the model would be at the vocabulary's size.
    assert result["ppl_dense"] < 150


def test_second_run_reuses_every_step(finished: tuple[QuickstartConfig, str]) -> None:
    config, _ = finished
    files = [path for path in config.out.rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    result, paths = quickstart(config)
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert plain(result) == read_sealed(paths.result, ResultError, "")


def test_evaluate_asks_model_predictors_and_file(finished: tuple[QuickstartConfig, str]) -> None:
    config, _ = finished
    command = ["quickstart", "--size", "tiny", "--threads", "1", "--out", str(config.out)]
    result = CliRunner().invoke(main, [*command, "--evaluate"])
    assert result.exit_code == 0, result.output
    assert "tiny_next_line" in result.stdout
    found = EVALUATION.read(Paths(config.out).evaluation)
    assert [arm.kind for arm in found.arms] == ["dense", "predictors", "engine"]
    assert {task.questions for task in found.tasks} == {10}
    for task in found.tasks:
        ours, file = (found.difference(task.name, arm.name) for arm in found.arms[1:])
        assert ours is not None
        assert file is not None
        assert abs(ours.difference - file.difference) <= 0.1
    assert load_runs([config.out])[0].evaluation == found
    assert "tiny_next_line" in Paths(config.out).page.read_text(encoding="utf-8")
    assert str(Paths(config.out).page) in result.stdout


def test_other_settings_need_another_directory(
    finished: tuple[QuickstartConfig, str], tmp_path: Path
) -> None:
    config, _ = finished
    with pytest.raises(OutputError, match="choose another --out"):
        quickstart(QuickstartConfig(out=config.out, size="tiny", seed=1))
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="no quickstart"):
        quickstart(QuickstartConfig(out=tmp_path, size="tiny"))
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_the_library_is_listed_in_order_and_without_what_is_installed() -> None:
    files, root = library_files(), Path(sysconfig.get_paths()["stdlib"])
    assert files == sorted(files)
    directories = {part for file in files for part in file.relative_to(root).parts[:-1]}
    assert {"json", "email"} <= directories
    assert not {"site-packages", "dist-packages", "test", "tests"} & directories


def test_corpus_depends_on_the_seed_alone(tmp_path: Path) -> None:
    first, again, other = (
        write_corpus(tmp_path / name, characters=50_000, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.train.read_bytes() == again.train.read_bytes()
    assert first.valid.read_bytes() == again.valid.read_bytes()
    assert first.train.read_bytes() != other.train.read_bytes()


@pytest.mark.powerinfer
@pytest.mark.parametrize("threshold", [None, DENSE_THRESHOLD], ids=["sparse", "dense"])
def test_real_powerinfer_agrees(
    finished: tuple[QuickstartConfig, str], powerinfer_bin: Path, threshold: float | None
) -> None:
    paths = Paths(finished[0].out)
    file, text = paths.bundle.model_file, paths.corpus.valid.read_text(encoding="utf-8")
    engine, real = Engine(file, threshold=threshold), PowerInfer(powerinfer_bin)
    theirs = real.perplexity(file, text, 128, 16, threads=1, threshold=threshold)
    assert engine_perplexity(engine, text, 128, 16, "ours") == pytest.approx(theirs, rel=5e-3)
    run = real.generate(file, "def main(", 24, threads=1, threshold=threshold)
    ours = generate(engine, "def main(", 24).text
    assert run.text is not None
    assert run.text.strip() == ours.strip()
