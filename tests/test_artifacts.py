"""Artifacts as readers see them: what they are, what they were made with, how two differ."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import made_up_results
import pytest
from click.testing import Result
from conftest import refused

from common.clock import now
from common.errors import ResultError
from common.hashing import HashedFile
from common.provenance import PROVENANCE, Ingredient, read, record, shortened, source_commit
from common.sealed import seal_of
from gguf_export.bundle import Bundle
from gguf_export.manifest import manifest_path
from pipeline.artifacts import describe
from predictor.artifact import PredictorArtifact
from predictor.traces.store import TraceStore
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig
from results.bench import BENCH

Psp = Callable[..., Result]
MODEL = Ingredient(
    role="model",
    name="m",
    identity="5ca1ab1e",
    files=(HashedFile(name="model.safetensors", bytes=3, xxh3_128="00"),),
)


def write(path: Path, *, seed: int = 0, resumed: bool = False, identity: str = "abc") -> None:
    record(
        path,
        "2026-01-02T03:04:05Z",
        artifact="predictors",
        identity=identity,
        seed=seed,
        settings={"seed": seed, "out": Path("/elsewhere/out"), "ranks": (32, 64), "bound": 0.001},
        ingredients=[MODEL],
        resumed=resumed,
    )


@pytest.fixture(scope="module")
def predictors(traces: TraceStore, tmp_path_factory: pytest.TempPathFactory) -> PredictorArtifact:
    out = tmp_path_factory.mktemp("artifacts") / "predictors"
    return train_predictors(TrainConfig(traces=traces.path, out=out, rank=32, recipe="svd"))


def test_provenance_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / PROVENANCE
    write(file)
    found = read(file)
    assert found.ingredients == (MODEL,)
    assert found.settings == {"seed": 0, "out": "…/out", "ranks": [32, 64], "bound": 0.001}
    [run] = found.runs
    assert (run.begun, run.command) == ("2026-01-02T03:04:05Z", None)
    assert run.ended <= now()
    assert {"python", "torch", "gguf"} <= run.versions.keys()
    whole = file.read_bytes()
    write(file, resumed=True)
    assert file.read_bytes() == whole, "nothing has changed"
    write(file, resumed=True, identity="other")
    assert [run.resumed for run in read(file).runs] == [False, False]
    file.unlink()
    write(file, resumed=True)
    assert [run.resumed for run in read(file).runs] == [True]
    write(file)
    assert len(read(file).runs) == 1


def test_damaged_provenance_is_one_line_and_costs_no_run(tmp_path: Path) -> None:
    file = tmp_path / PROVENANCE
    write(file)
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    with refused(ResultError, str(file), "its checksum differs", "remove it"):
        read(file)
    file.write_text(json.dumps({"kind": "psp.provenance", "schema_version": 2}))
    with refused(ResultError, str(file), "remove it"):
        read(file)
    write(file, resumed=True)
    assert len(read(file).runs) == 1


def test_a_command_shows_no_path_outside_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    outside, inside = str(tmp_path / "secret" / "model"), str(tmp_path / "here" / "data.txt")
    argv = ["/usr/bin/psp", "collect", "--model", outside, f"--data={inside}", "--out", "../t"]
    monkeypatch.setattr(sys, "argv", argv)
    write(tmp_path / PROVENANCE)
    command = read(tmp_path / PROVENANCE).runs[0].command
    assert command == "psp collect --model '…/model' --data=data.txt --out '…/t'"
    assert shortened("hf:name:config") == "hf:name:config"


def test_the_commit_is_that_of_the_checkout(tmp_path: Path) -> None:
    assert source_commit(tmp_path) is None
    git, tree = tmp_path / ".git", tmp_path / "tree"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text("# pack\n1234 refs/heads/other\nabcd refs/heads/main\n")
    assert source_commit(tmp_path) == "abcd"
    (git / "refs" / "heads" / "main").write_text("ef01\n")
    assert source_commit(tmp_path) == "ef01"
    (git / "worktrees" / "tree").mkdir(parents=True)
    tree.mkdir()
    (tree / ".git").write_text(f"gitdir: {git / 'worktrees' / 'tree'}\n")
    (git / "worktrees" / "tree" / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "worktrees" / "tree" / "commondir").write_text("../..\n")
    assert source_commit(tree) == "ef01"
    (git / "HEAD").write_text("0a0b\n")
    assert source_commit(tmp_path) == "0a0b"


def test_any_artifact_is_shown(
    psp: Psp, traces: TraceStore, predictors: PredictorArtifact, exact_bundle: Bundle
) -> None:
    shown = psp("inspect", traces.path)
    assert shown.exit_code == 0, shown.output
    assert re_in(shown.stdout, "what ", " traces")
    assert "made with: not known" in shown.stdout
    document = json.loads(psp("inspect", predictors.path, "--json").stdout)
    assert document["kind"] == "predictors"
    assert document["facts"]["header"]["rank"] == 32
    assert "layer-00.safetensors" in document["files"]
    file = psp("inspect", exact_bundle.model_file)
    assert file.exit_code == 0, file.output


def test_what_it_was_made_with_is_shown(
    psp: Psp, predictors: PredictorArtifact, exact_bundle: Bundle, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(predictors.path, tmp_path / "p"))
    write(copy / PROVENANCE)
    shown = psp("inspect", copy).stdout
    assert re_in(shown, "made with", "2026-01-02T03:04:05Z", "psp ", "made from", "model", "5ca1")
    file = Path(shutil.copy(exact_bundle.model_file, tmp_path))
    write(manifest_path(file))
    assert re_in(psp("inspect", file).stdout, "made with", "2026-01-02T03:04:05Z")
    assert describe(file).provenance is not None


def re_in(text: str, *parts: str) -> bool:
    """Whether all parts are in a text, in this order."""
    at = 0
    for part in parts:
        at = text.find(part, at)
        if at < 0:
            return False
    return True


def test_two_are_compared(
    psp: Psp, traces: TraceStore, predictors: PredictorArtifact, tmp_path: Path
) -> None:
    same = Path(shutil.copytree(predictors.path, tmp_path / "same"))
    write(same / PROVENANCE)  # is no part of it
    shown = psp("inspect", predictors.path, same).stdout
    assert "all files are the same, byte for byte" in shown
    other = train_predictors(
        TrainConfig(traces=traces.path, out=tmp_path / "other", rank=64, recipe="svd", seed=1)
    )
    document = json.loads(psp("inspect", predictors.path, other.path, "--json").stdout)
    told = {each["what"]: (each["one"], each["other"]) for each in document["differences"]}
    assert told["header.rank"] == (32, 64)
    assert told["header.seed"] == (0, 1)
    assert "layers[0].activation_recall" in told
    assert "layer-01.safetensors" in document["files"]
    assert not document["same_bytes"]
    table = psp("inspect", predictors.path, other.path).stdout
    assert "header.rank" in table
    assert "files that differ: layer-00.safetensors" in table


def test_results_are_sealed_shown_and_compared(psp: Psp, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / BENCH.name).write_text(json.dumps(made_up_results.bench(seed=seed)))
    old = psp("inspect", tmp_path / "a").stdout
    assert re_in(old, "results", "bench.model", "Made-up-7B", "checksum", "none (an older psp")
    assert "samples[" not in old
    BENCH.write(tmp_path / "b", BENCH.read(tmp_path / "b"))
    assert seal_of(tmp_path / "b" / BENCH.name) is not None
    new = psp("inspect", tmp_path / "b").stdout
    assert "checksum" not in new
    document = json.loads(psp("inspect", tmp_path / "a", tmp_path / "b", "--json").stdout)
    assert "bench.activation_recall" in {each["what"] for each in document["differences"]}


def test_bad_input_is_one_line(
    psp: Psp, traces: TraceStore, predictors: PredictorArtifact, tmp_path: Path
) -> None:
    for arguments, code, part in (
        ((traces.path, predictors.path), 1, "compare like with like"),
        ((tmp_path,), 1, "holds no traces, predictors, sparsified model or results"),
        ((tmp_path / "none",), 1, "none"),
        ((traces.path,) * 3, 2, "these are more"),
    ):
        result = psp("inspect", *arguments)
        assert (result.exit_code, part in result.stderr) == (code, True), result.output
        assert "Traceback" not in result.output


def test_commands_write_what_they_used(
    psp: Psp, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    traces, out = tmp_path / "t", tmp_path / "p"
    command = ("collect", "--model", model_dir, "--data", data_file, "--out", traces)
    assert psp(*command, "--tokens", 500).exit_code == 0
    made = read(traces / PROVENANCE)
    roles = {each.role: each for each in made.ingredients}
    assert roles.keys() == {"model", "text"}
    assert [file.name for file in roles["model"].files] == ["model.safetensors"]
    train = ("train-predictor", "--traces", traces, "--out", out, "--recipe", "svd", "--rank", 32)
    assert psp(*train).exit_code == 0
    chain = {each.role: each.identity for each in read(out / PROVENANCE).ingredients}
    assert chain == {"traces": made.identity, "model": roles["model"].identity}
    before = (out / PROVENANCE).read_bytes()
    assert psp(*train, "--resume").exit_code == 0
    assert (out / PROVENANCE).read_bytes() == before
    assert psp(*train, "--force", "--seed", 3).exit_code == 0
    assert read(out / PROVENANCE).seed == 3
