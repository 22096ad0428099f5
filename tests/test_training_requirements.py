"""Traces that training cannot work with are refused before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from conftest import refused
from recollected import recommit

from common.errors import PredictorError
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.traces.store import TraceStore
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig


def settings(traces: Path, out: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {"traces": traces, "out": out, "rank": 32}
    return TrainConfig(**(values | changes))


def with_layer_1_off(store: TraceStore, copy: Path) -> Path:
    """Copy a store of whose layer 1 no neuron was ever active."""
    shutil.copytree(store.path, copy)

    def change(file: Path, tensors: dict[str, torch.Tensor]) -> None:
        if file.parent.name == "layer-01":
            tensors["counts"].fill_(0)

    recommit(copy, change)
    return copy


def test_a_layer_that_is_never_active_is_refused(ranked_traces: TraceStore, tmp_path: Path) -> None:
    traces, out = with_layer_1_off(ranked_traces, tmp_path / "traces"), tmp_path / "out"
    with refused(PredictorError, str(traces), "no neuron", "layer 1", "other text"):
        train_predictors(settings(traces, out))
    assert not out.exists()
    assert list(train_predictors(settings(traces, out, layers=(0,))).layers) == [0]


def test_rows_that_are_fewer_than_a_rank_are_refused(
    ranked_traces: TraceStore, tmp_path: Path
) -> None:
    path, out = ranked_traces.path, tmp_path / "out"
    train = int((~ranked_traces.holdout(0.9, 0)).sum())
    assert 32 <= train < 512
    with refused(PredictorError, str(path), f"{train} rows", "rank 512", "--tokens", "--rank"):
        train_predictors(settings(path, out, rank=(32, 512), recipe="dejavu", holdout=0.9))
    assert not out.exists()
    assert train_predictors(settings(path, out, holdout=0.9)).complete


def test_thresholds_need_importance(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    bare, out = tmp_path / "bare", tmp_path / "out"
    sizes: dict[str, Any] = {"tokens": 300, "context": 64, "importance_bits": 0}
    collect(CollectConfig(model=str(model_dir), data=str(data_file), out=bare, **sizes))
    with refused(PredictorError, str(bare), "no importance", "thresholds", "--importance-bits 2"):
        train_predictors(settings(bare, out, recipe="dejavu", ffn_bytes=0.5))
    assert not out.exists()
