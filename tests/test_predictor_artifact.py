"""Predictors of a whole model: trained from traces, stored, resumed, refused when damaged."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import NARROW_D_FF, refused
from recollected import recommit
from safetensors.torch import load_file, save_file

from common.decisions import DecisionCounts, mean_metrics
from common.errors import OutputError, PredictorError, TraceError
from common.provenance import PROVENANCE
from common.sealed import SEAL
from predictor.artifact import PredictorArtifact
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.module import Predictor, decide
from predictor.traces.packing import unpack_active
from predictor.traces.store import TraceStore
from predictor.training.run import train_predictors
from predictor.training.settings import PSP, TrainConfig

RANK = 32


@pytest.fixture(scope="module")
def traces(narrow_traces: TraceStore) -> TraceStore:
    return narrow_traces


@pytest.fixture(scope="module")
def artifact(traces: TraceStore, tmp_path_factory: pytest.TempPathFactory) -> PredictorArtifact:
    out = tmp_path_factory.mktemp("predictors") / "whole"
    return train_predictors(TrainConfig(traces=traces.path, out=out, rank=RANK))


@pytest.fixture
def copy(artifact: PredictorArtifact, tmp_path: Path) -> Path:
    """Return a copy of the predictors that a test may damage."""
    return Path(shutil.copytree(artifact.path, tmp_path / "copy"))


@pytest.fixture
def train(traces: TraceStore) -> Callable[..., PredictorArtifact]:
    def run(out: Path, **changes: Any) -> PredictorArtifact:
        chosen: dict[str, Any] = {"traces": traces.path, "rank": RANK}
        return train_predictors(TrainConfig(out=out, **(chosen | changes)))

    return run


Train = Callable[..., PredictorArtifact]


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.iterdir() if path.name != PROVENANCE)
    return {path.name: path.read_bytes() for path in files}


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(file.read_text())
    document.pop(SEAL)
    change(document)
    file.write_text(json.dumps(document))


def copy_traces(traces: TraceStore, tmp_path: Path) -> Path:
    return Path(shutil.copytree(traces.path, tmp_path / "traces"))


def interrupt_after_layer_0(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> None:
    add = PredictorArtifact.add

    def add_or_stop(artifact: PredictorArtifact, *arguments: Any) -> None:
        if artifact.layers:
            raise InterruptedError("stopped by the test")
        add(artifact, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(PredictorArtifact, "add", add_or_stop)
        with pytest.raises(InterruptedError, match="stopped by the test"):
            run()


@pytest.mark.parametrize("recipe", ["psp", "dejavu"])
def test_predictors_are_measured_as_stored_on_documents_held_out(
    train: Train, traces: TraceStore, tmp_path: Path, recipe: str
) -> None:
    """Metrics in predictors.json follow from the files alone."""
    train(tmp_path / "out", recipe=recipe, holdout=0.2, seed=3)
    artifact = PredictorArtifact.open(tmp_path / "out")
    artifact.require_complete()
    held = traces.holdout(0.2, 3).nonzero()[:, 0]
    assert 0.2 * traces.rows <= len(held) < traces.rows / 2
    for number, metrics in artifact.layers.items():
        stored, rows = artifact.layer(number), traces.layer(number)
        assert (stored.fc1.dtype, stored.fc2.dtype) == (torch.float16, torch.float16)
        assert stored.fc1.shape == (RANK, 64)
        assert stored.fc2.shape == (NARROW_D_FF, RANK)
        assert stored.activation_counts is not None
        assert torch.equal(stored.activation_counts, rows.counts)
        predictor = Predictor(stored.fc1.float(), stored.fc2.float())
        counts = DecisionCounts()
        decided = decide(predictor, rows.inputs_at(held), 0.0)
        counts.add(unpack_active(rows.active_at(held), NARROW_D_FF), decided)
        expected = counts.metrics(rank=RANK, d_model=64, d_ff=NARROW_D_FF)
        # Normalised inputs, which psp trains and measures on, may round the other way at zero.
        assert metrics == pytest.approx(expected, abs=1e-4)
        # Better than guessing at the same density, whose recall is that density.
        assert metrics["activation_recall"] > 1 - metrics["predicted_sparsity"] + 0.05


def test_the_index_names_model_traces_recipe_and_means(
    artifact: PredictorArtifact, traces: TraceStore
) -> None:
    document = json.loads((artifact.path / "predictors.json").read_text())
    header = document["header"]
    assert header["model"] == traces.header.model
    assert header["model_fingerprint"] == traces.header.model_fingerprint
    assert header["traces_identity"] == traces.identity
    assert (header["n_layers"], header["d_model"], header["d_ff"]) == (2, 64, NARROW_D_FF)
    assert (header["rank"], header["threshold"], header["recipe"]["name"]) == (RANK, 0, "psp")
    assert document["layers"] == [{"layer": n, **artifact.layers[n]} for n in range(2)]
    assert len(artifact.layers) == 2
    assert document["mean"] == mean_metrics(list(artifact.layers.values()))
    assert document["epochs"] == {str(n): [vars(e) for e in artifact.epochs[n]] for n in range(2)}
    assert [len(epochs) for epochs in artifact.epochs.values()] == [PSP.epochs] * 2
    assert contents(artifact.path).keys() == {
        *("predictors.json", "layer-00.safetensors", "layer-01.safetensors"),
    }


def test_full_rank_predicts_almost_everything_but_saves_nothing(
    train: Train, traces: TraceStore, tmp_path: Path
) -> None:
    """At rank 2 · d_model the start is exact; training may trade a little of it."""
    artifact = train(tmp_path / "out", rank=128)
    held = traces.holdout(0.1, 0).nonzero()[:, 0]
    for number in range(2):
        predictor, rows = artifact.layer(number, folded=False).predictor(), traces.layer(number)
        counts = DecisionCounts()
        decided = decide(predictor, rows.inputs_at(held), 0.0)
        counts.add(unpack_active(rows.active_at(held), NARROW_D_FF), decided)
        metrics = counts.metrics(rank=128, d_model=64, d_ff=NARROW_D_FF)
        assert metrics["activation_recall"] > 0.8
        assert metrics["precision"] > 0.8
        assert artifact.dense[number] == pytest.approx(metrics["ffn_bytes_ratio"], abs=1e-4)
        assert artifact.dense[number] > 1


def test_two_runs_give_the_same_bytes_and_another_seed_others(
    train: Train, artifact: PredictorArtifact, tmp_path: Path
) -> None:
    train(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(artifact.path)
    train(tmp_path / "other", seed=1)
    layer = "layer-00.safetensors"
    assert contents(tmp_path / "other")[layer] != contents(artifact.path)[layer]


def test_clipped_labels_give_sparser_predictions(
    train: Train, artifact: PredictorArtifact, tmp_path: Path
) -> None:
    clipped = train(tmp_path / "clipped", label_top_fraction=0.1)
    assert clipped.layers.keys() == artifact.layers.keys()
    for layer, ours in clipped.layers.items():
        whole = artifact.layers[layer]
        assert ours["activation_sparsity"] == whole["activation_sparsity"]
        assert ours["predicted_sparsity"] > whole["predicted_sparsity"]
        assert ours["activation_recall"] < whole["activation_recall"]


def test_held_out_documents_do_not_reach_the_weights(
    train: Train, traces: TraceStore, artifact: PredictorArtifact, tmp_path: Path
) -> None:
    spoilt = copy_traces(traces, tmp_path)

    def without_holdout(file: Path, tensors: dict[str, torch.Tensor]) -> None:
        tensors["inputs"][traces.holdout(0.1, 0)] = 0

    recommit(spoilt, without_holdout)
    made = train(tmp_path / "out", traces=spoilt)
    for layer in range(2):
        ours, theirs = (each.layer(layer, folded=False) for each in (made, artifact))
        assert torch.equal(ours.fc1, theirs.fc1)
        assert torch.equal(ours.fc2, theirs.fc2)
    assert made.layers != artifact.layers


def test_an_interrupted_run_resumes_to_the_same_bytes(
    train: Train, artifact: PredictorArtifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt_after_layer_0(monkeypatch, lambda: train(out))
    half = PredictorArtifact.open(out)
    assert len(half.layers) == 1
    with refused(
        PredictorError,
        str(out),
        "1 of 2 layers are missing, the first is 1",
        "psp train-predictor ... --resume",
    ):
        half.require_complete()
    train(out, resume=True)
    assert contents(out) == contents(artifact.path)


def test_a_run_killed_before_its_index_resumes(
    train: Train, artifact: PredictorArtifact, tmp_path: Path
) -> None:
    """A directory with nothing but an unfinished temporary file counts as nothing done."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".predictors.json.part").write_bytes(b"{")
    train(tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(artifact.path)


def test_resume_of_nothing_starts_and_of_a_complete_run_changes_nothing(
    train: Train, artifact: PredictorArtifact, tmp_path: Path
) -> None:
    for _ in range(2):
        train(tmp_path / "out", resume=True)
        assert contents(tmp_path / "out") == contents(artifact.path)


@pytest.mark.parametrize(
    ("key", "name", "value"),
    [
        ("rank", "rank", 64),
        ("recipe", "recipe", "dejavu"),
        ("holdout", "holdout", 0.2),
        ("label_top_fraction", "label_top_fraction", 0.15),
        ("seed", "seed", 1),
    ],
)
def test_resume_with_other_settings_is_refused(
    train: Train, copy: Path, key: str, name: str, value: object
) -> None:
    before = contents(copy)
    with refused(PredictorError, str(copy), f"another {name}", "same settings", "--force"):
        train(copy, resume=True, **{key: value})
    assert contents(copy) == before


def test_resume_with_other_traces_is_refused(
    train: Train, traces: TraceStore, copy: Path, tmp_path: Path
) -> None:
    other = copy_traces(traces, tmp_path)
    edit(other / "manifest.json", lambda manifest: manifest["header"].update(data="other.txt"))
    with refused(PredictorError, str(copy), "traces_identity", "traces", "--force"):
        train(copy, resume=True, traces=other)


def test_an_existing_output_needs_force(train: Train, copy: Path) -> None:
    (copy / "stray").write_text("old")
    before = contents(copy)
    with refused(OutputError, f"{copy} exists", "--resume", "--force", "another --out"):
        train(copy)
    assert contents(copy) == before
    train(copy, seed=1, force=True)
    assert PredictorArtifact.open(copy).header.seed == 1
    assert not (copy / "stray").exists()


def test_missing_traces_are_refused(train: Train, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with refused(TraceError, str(gone / "manifest.json"), "No such file", "'psp collect'"):
        train(tmp_path / "out", traces=gone)
    assert not (tmp_path / "out").exists()


def test_incomplete_traces_are_refused(train: Train, traces: TraceStore, tmp_path: Path) -> None:
    half = copy_traces(traces, tmp_path)
    edit(half / "manifest.json", lambda manifest: manifest["progress"].update(complete=False))
    with refused(TraceError, str(half), "interrupted", "'psp collect ... --resume'"):
        train(tmp_path / "out", traces=half)
    assert not (tmp_path / "out").exists()


def test_traces_without_importance_train_the_recipe_that_needs_none(
    train: Train, traces: TraceStore, tmp_path: Path
) -> None:
    bare = collect(
        CollectConfig(
            model=traces.header.model,
            data=traces.header.data,
            out=tmp_path / "bare",
            tokens=300,
            context=64,
            importance_bits=0,
        )
    ).path
    with refused(PredictorError, str(bare), "no importance", "--importance-bits 2", "dejavu"):
        train(tmp_path / "out", traces=bare)
    assert not (tmp_path / "out").exists()
    assert train(tmp_path / "out", traces=bare, recipe="dejavu").complete


def test_clipping_needs_importance_that_ranks_neurons(
    train: Train, traces: TraceStore, tmp_path: Path
) -> None:
    coarse = copy_traces(traces, tmp_path)
    edit(coarse / "manifest.json", lambda manifest: manifest["header"].update(importance_bits=2))
    with refused(PredictorError, str(coarse), "2 bits", "--importance-bits 8", "--label-top"):
        train(tmp_path / "out", traces=coarse, label_top_fraction=0.15)


@pytest.mark.parametrize("rank", [0, 1, 16, 33, -32])
def test_a_rank_that_powerinfer_cannot_run_is_refused(
    train: Train, tmp_path: Path, rank: int
) -> None:
    with refused(PredictorError, f"rank {rank}", "positive multiple of 32"):
        train(tmp_path / "out", rank=rank)


def test_a_rank_beyond_exactness_is_refused(train: Train, tmp_path: Path) -> None:
    with refused(PredictorError, "rank 160", "128", "lower --rank"):
        train(tmp_path / "out", rank=160)
    assert not (tmp_path / "out").exists()


def test_an_unknown_recipe_is_refused_with_the_known_ones(train: Train, tmp_path: Path) -> None:
    with refused(PredictorError, "'best'", "psp", "dejavu"):
        train(tmp_path / "out", recipe="best")


def test_inputs_that_are_no_numbers_are_refused_with_their_file(
    train: Train, traces: TraceStore, tmp_path: Path
) -> None:
    spoilt = copy_traces(traces, tmp_path)
    file = spoilt / "layer-01" / "shard-00000.safetensors"
    recommit(
        spoilt, lambda each, tensors: tensors["inputs"].fill_(math.nan) if each == file else None
    )
    with refused(TraceError, str(file), "NaN or inf", "psp traces check"):
        train(tmp_path / "out", traces=spoilt, recipe="dejavu")
    assert len(PredictorArtifact.open(tmp_path / "out").layers) == 1


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage"])
def test_a_missing_or_damaged_layer_is_named(copy: Path, damage: str) -> None:
    file = copy / "layer-01.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] if damage == "truncated" else b"garbage")
    artifact = PredictorArtifact.open(copy)
    artifact.layer(0)
    with refused(PredictorError, str(file), "missing or damaged", "train the predictors again"):
        artifact.layer(1)


@pytest.mark.parametrize("name", ["fc1", "fc2", "activation_counts"])
@pytest.mark.parametrize("cut", [True, False], ids=["short", "absent"])
def test_a_layer_of_the_wrong_shape_is_named(copy: Path, name: str, cut: bool) -> None:
    file = copy / "layer-00.safetensors"
    tensors = load_file(file)
    whole = tensors.pop(name)
    if cut:
        tensors[name] = whole[1:].clone()
    save_file(tensors, file)
    with refused(PredictorError, str(file), "its checksum differs", "train the predictors again"):
        PredictorArtifact.open(copy).layer(0)
    edit(copy / "predictors.json", lambda document: document.pop("files"))  # of an older psp
    told = f"{name} is (" if cut else f"{name} is missing"
    with refused(PredictorError, str(file), told, "implies", "train the predictors again"):
        PredictorArtifact.open(copy).layer(0)


def test_a_directory_without_predictors_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "predictors.json"
    with refused(PredictorError, str(file), "No such file", "'psp train-predictor'"):
        PredictorArtifact.open(tmp_path)


@pytest.mark.parametrize("version", [0, 1, 2, 3, 7, "4", None])
def test_another_schema_version_is_refused(copy: Path, version: object) -> None:
    edit(copy / "predictors.json", lambda document: document.update(schema_version=version))
    with refused(PredictorError, str(copy), f"version is {version!r}", "reads 4, 5, 6", "again"):
        PredictorArtifact.open(copy)


def test_predictors_from_before_epochs_were_told_are_read(copy: Path) -> None:
    edit(copy / "predictors.json", lambda document: document.pop("epochs"))
    artifact = PredictorArtifact.open(copy)
    artifact.require_complete()
    assert artifact.epochs == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.pop("header"),
        lambda document: document.pop("layers"),
        lambda document: document["header"].pop("rank"),
        lambda document: document["header"].update(extra=1),
        lambda document: document.update(epochs=[]),
        lambda document: document["epochs"].update({"0": [{"loss": 1.0}]}),
        lambda document: document.update(dense={"first": 1.0}),
    ],
    ids=[
        "no header",
        "no layers",
        "no rank",
        "extra key",
        "epochs a list",
        "half an epoch",
        "dense",
    ],
)
def test_a_damaged_index_is_refused(copy: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(copy / "predictors.json", change)
    with refused(PredictorError, str(copy / "predictors.json"), "damaged", "train the predictors"):
        PredictorArtifact.open(copy)


def test_the_command_prints_the_metrics_of_the_artifact(
    psp: Callable[..., Result], traces: TraceStore, artifact: PredictorArtifact, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--traces", traces.path, "--out", out, "--rank", RANK, "--json")
    result = json.loads(psp("train-predictor", *options).stdout)
    assert result.pop("layers") == artifact.rows()
    assert result.pop("predictors") == str(out)
    assert result.pop("recipe") == "psp"
    assert result.pop("ranks") == {"0": RANK, "1": RANK}
    assert result.pop("types") == {"0": "f16", "1": "f16"}
    assert result.pop("search") == []
    assert result.pop("dense") == {}
    assert result == mean_metrics(list(artifact.layers.values()))
    assert contents(out) == contents(artifact.path)
