"""Steps, batches and layers at once: what training does between a trace row and a file."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from planted import labels_of, starting_at
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from common.errors import CheckpointError, PredictorError
from common.overlap import StoppedError, several_at_once
from predictor.artifact import Epoch, PredictorArtifact
from predictor.module import Predictor
from predictor.traces.rows import LabelledRows
from predictor.traces.store import TraceStore
from predictor.training.layer import LayerTrainer, jobs_for, product_dtype, train_layer
from predictor.training.loss import Batch, batches, set_gradients
from predictor.training.run import train_predictors
from predictor.training.settings import DEJAVU, PSP, Recipe, TrainConfig


@pytest.fixture
def rows(ranked_traces: TraceStore) -> LabelledRows:
    return LabelledRows(ranked_traces.layer(1), ranked_traces.weights(1), normalise=True)


def expected_weights(recipe: Recipe, rows: LabelledRows, index: torch.Tensor) -> torch.Tensor:
    """Return the weight of every label, written down from `Recipe`'s own words."""
    labels = labels_of(rows, index)
    negative = recipe.negative_weight * labels.float().mean() + recipe.negative_floor
    positive = torch.ones(labels.shape)
    if recipe.importance:
        power = (rows.importance(index) * labels) ** recipe.importance_power
        positive = (power / (power.sum() / labels.sum())).clamp(max=recipe.importance_cap)
    return torch.where(labels, positive, negative)


def weighted_losses(
    logits: torch.Tensor, recipe: Recipe, rows: LabelledRows, index: torch.Tensor
) -> torch.Tensor:
    """Return the loss of every label."""
    return binary_cross_entropy_with_logits(
        logits,
        labels_of(rows, index).float(),
        weight=expected_weights(recipe, rows, index),
        reduction="none",
    )


@pytest.mark.parametrize("top", [0, 20])
@pytest.mark.parametrize("recipe", [PSP, DEJAVU], ids=lambda recipe: recipe.name)
def test_gradients_are_those_of_the_weighted_cross_entropy(
    recipe: Recipe, rows: LabelledRows, top: int
) -> None:
    rows, generator = replace(rows, top=top), torch.Generator().manual_seed(0)
    predictor = Predictor(
        torch.randn(32, 64, generator=generator) / 8,
        torch.randn(rows.d_ff, 32, generator=generator) / 4,
    )
    index = torch.randperm(2000, generator=generator)[:200]
    for batch, part in zip(
        batches(replace(recipe, batch=96), rows, index), torch.split(index, 96), strict=True
    ):
        losses = weighted_losses(predictor(rows.inputs(part)), recipe, rows, part)
        expected = torch.autograd.grad(losses.mean(), [predictor.fc1, predictor.fc2])
        told = set_gradients(predictor, batch, torch.float32)
        torch.testing.assert_close(told, losses[:16].mean().detach(), rtol=1e-5, atol=0)
        for matrix, gradient in zip(predictor.parameters(), expected, strict=True):
            assert matrix.grad is not None
            torch.testing.assert_close(matrix.grad, gradient, rtol=1e-4, atol=1e-9)
        set_gradients(predictor, batch, torch.bfloat16)
        for matrix, gradient in zip(predictor.parameters(), expected, strict=True):
            assert matrix.grad is not None
            assert matrix.grad.dtype == torch.float32
            assert not torch.equal(matrix.grad, gradient)
            # Rounding is large where terms cancel, the direction stays.
            cosine = torch.cosine_similarity(matrix.grad.flatten(), gradient.flatten(), dim=0)
            assert cosine > 0.99


def test_batches_do_not_depend_on_how_many_are_read_together(rows: LabelledRows) -> None:
    order = torch.randperm(1500)[:1001]

    def read(together: int) -> list[Batch]:
        return list(batches(replace(PSP, batch=100), rows, order, together=together))

    alone = read(1)
    assert [len(batch.inputs) for batch in alone] == [100] * 10 + [1]
    for other in (read(350), read(4096)):
        for found, expected in zip(other, alone, strict=True):
            for name, value in vars(expected).items():
                torch.testing.assert_close(getattr(found, name), value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("recipe", [PSP, DEJAVU], ids=lambda recipe: recipe.name)
def test_epochs_are_told_by_rows_held_out_and_change_no_weight(
    recipe: Recipe, rows: LabelledRows
) -> None:
    rows = replace(rows, normalise=recipe.normalise)
    train, holdout = torch.arange(700), torch.arange(700, 900)
    recipe = replace(recipe, epochs=3, batch=256, stop_recall=1.1)

    def trained(**options: Any) -> Predictor:
        generator = torch.Generator().manual_seed(0)
        start = starting_at(recipe, rows, train, generator)
        chosen: dict[str, Any] = {"train": train, "holdout": holdout, "generator": generator}
        return train_layer(start, rows, **(chosen | options))

    epochs: list[Epoch] = []
    predictor = trained(on_epoch=epochs.append)
    for matrix, alone in zip(predictor.parameters(), trained().parameters(), strict=True):
        assert torch.equal(matrix, alone)
    assert len(epochs) == 3
    assert epochs[0].loss > epochs[1].loss > epochs[2].loss > 0
    with torch.no_grad():
        logits = predictor(rows.inputs(holdout))
    losses = weighted_losses(logits, recipe, rows, holdout)
    assert epochs[-1].held_out_loss == pytest.approx(float(losses.mean()), rel=1e-3)
    wrong = (logits >= 0) != rows.active(holdout)
    assert epochs[-1].held_out_error == pytest.approx(float(wrong.float().mean()), abs=1e-4)


def settings(narrow_traces: TraceStore, out: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {"traces": narrow_traces.path, "out": out, "rank": 32, "recipe": "psp"}
    return TrainConfig(**(values | changes))


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_layers_at_once_and_in_parts_are_those_of_one_run(
    narrow_traces: TraceStore, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        bound: dict[str, Any] = {"rank": "auto", "ffn_bytes": 0.6}
        one = train_predictors(settings(narrow_traces, tmp_path / "one", jobs=1, **bound))
        both = train_predictors(settings(narrow_traces, tmp_path / "both", jobs=2, **bound))
        assert contents(both.path) == contents(one.path)
        parts = tmp_path / "parts"
        first = train_predictors(settings(narrow_traces, parts, layers=(1,), **bound))
        assert list(first.layers) == [1]
        assert not first.search
        rest = train_predictors(settings(narrow_traces, parts, resume=True, **bound))
        assert contents(rest.path) == contents(one.path)
    finally:
        torch.set_num_threads(threads)


def test_products_in_bfloat16_train_as_well(narrow_traces: TraceStore, tmp_path: Path) -> None:
    exact, rounded = (
        train_predictors(settings(narrow_traces, tmp_path / precision, precision=precision))
        for precision in ("float32", "bfloat16")
    )
    assert not torch.equal(exact.layer(0).fc2, rounded.layer(0).fc2)
    for layer in range(2):
        for key in ("activation_recall", "predicted_sparsity"):
            assert rounded.layers[layer][key] == pytest.approx(exact.layers[layer][key], abs=0.02)


def test_the_bar_tells_epochs_and_ends_full_where_layers_take_more_steps(
    narrow_traces: TraceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars, told = [], io.StringIO()

    def shown(**values: Any) -> Any:
        bars.append(tqdm(**(values | {"disable": False, "file": told, "ncols": 200})))
        return bars[-1]

    monkeypatch.setattr("predictor.training.run.tqdm", shown)
    # A rank that is beyond the units of a start around the constant.
    artifact = train_predictors(settings(narrow_traces, tmp_path / "p", rank=96, jobs=2))
    batches = -(-int((~narrow_traces.holdout(0.1, 0)).sum()) // PSP.batch)
    assert [bars[0].n, bars[0].total] == [2 * PSP.with_pairs().epochs * batches] * 2
    last = artifact.epochs[1][-1]
    assert f"loss={last.loss:.3g}, held_out_loss={last.held_out_loss:.3g}" in told.getvalue()
    assert "layers=2/2" in told.getvalue()


def test_a_layer_that_is_not_there_is_refused(narrow_traces: TraceStore, tmp_path: Path) -> None:
    with refused(PredictorError, "--layers", "no layer 2", "from 0 to 1"):
        train_predictors(settings(narrow_traces, tmp_path / "p", layers=(1, 2)))
    assert not (tmp_path / "p").exists()


def test_a_device_that_is_not_there_is_refused_first(
    narrow_traces: TraceStore, tmp_path: Path
) -> None:
    with refused(CheckpointError, "'cuda:77'", "check --device"):
        train_predictors(settings(narrow_traces, tmp_path / "p", device="cuda:77"))
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_memory_that_runs_out_keeps_finished_layers(
    narrow_traces: TraceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    calls: list[int] = []

    def train(*args: Any, **kwargs: Any) -> Predictor:
        calls.append(len(calls))
        if len(calls) == 2:
            raise error
        return train_layer(*args, **kwargs)

    monkeypatch.setattr("predictor.training.layer.train_layer", train)
    config = settings(narrow_traces, tmp_path / "p", jobs=1)
    with refused(PredictorError, "layer 1: out of memory", "--jobs or --rank", "--resume"):
        train_predictors(config)
    assert list(PredictorArtifact.open(config.out).layers) == [0]
    assert train_predictors(replace(config, resume=True)).complete
    assert len(calls) == 3


def test_the_first_failure_stops_the_rest() -> None:
    begun, ended = threading.Barrier(2), dict[int, str]()

    def work(layer: int, go_on: Callable[[], None]) -> int:
        if layer < 2:
            begun.wait(60)
        if layer == 0:
            raise PredictorError("layer 0 is damaged")
        try:
            while True:
                go_on()
        except StoppedError:
            ended[layer] = "stopped"
            raise

    threads = torch.get_num_threads()
    with refused(PredictorError, "layer 0 is damaged"):
        list(several_at_once(work, [0, 1, 2], 2))
    # Layer 2 may have begun before the failure was seen.
    assert ended in ({1: "stopped"}, {1: "stopped", 2: "stopped"})
    assert torch.get_num_threads() == threads


def test_a_layer_has_as_many_threads_when_it_is_the_last_one_missing(
    narrow_traces: TraceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = LayerTrainer.run, dict[int, set[int]]()

    def run(self: LayerTrainer, layer: int, *given: Any) -> Any:
        seen.setdefault(layer, set()).add(torch.get_num_threads())
        return real(self, layer, *given)

    monkeypatch.setattr(LayerTrainer, "run", run)
    monkeypatch.setattr("predictor.training.layer.jobs_for", lambda *sizes: 2)
    torch.set_num_threads(4)
    try:
        train_predictors(settings(narrow_traces, tmp_path / "whole", recipe="svd"))
        first = settings(narrow_traces, tmp_path / "parts", recipe="svd", layers=(1,))
        train_predictors(first)
        train_predictors(replace(first, resume=True, layers=None))
    finally:
        torch.set_num_threads(1)
    assert seen == {layer: {2} for layer in range(narrow_traces.header.n_layers)}


def test_jobs_share_the_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for jobs, share in ((1, 4), (2, 2), (3, 1), (8, 1)):
            found = several_at_once(lambda layer, go_on: torch.get_num_threads(), range(3), jobs)
            assert dict(found) == dict.fromkeys(range(3), share)
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_small_layers_take_a_thread_each() -> None:
    config = TrainConfig(traces=Path("t"), out=Path("o"), rank=32)
    assert jobs_for(config, 512, 1536) == torch.get_num_threads()
    assert jobs_for(config, 4096, 11008) == 1
    assert jobs_for(replace(config, jobs=3), 4096, 11008) == 3
    on_gpu = replace(config, device="cuda")
    assert jobs_for(on_gpu, 512, 1536) == 1
    assert product_dtype(config) == torch.float32
    assert product_dtype(on_gpu) == torch.bfloat16
    assert product_dtype(replace(on_gpu, precision="float32")) == torch.float32
