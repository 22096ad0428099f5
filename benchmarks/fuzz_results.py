"""Formats of results for `benchmarks.fuzz`: a report's documents, a head, a GPU index."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.fuzz_examples import example
from benchmarks.fuzz_formats import D_FF, RANK, Format, make_exported
from report.runs import FILES
from results.estimate import ESTIMATE
from results.parts import ResultFile

PAGE_SECONDS = 10.0
"""Damage can make a hundred arms of one, which all are drawn."""


def make_head(path: Path) -> Path:
    """Write a predictor of an output head."""
    from predictor.head.artifact import HeadHeader, write_head
    from predictor.head.rule import HeadPredictor
    from results.head import HeadPoint

    sizes = {"d_model": 8, "vocab_size": 64, "rank": RANK, "tokens": 100, "seed": 0}
    bounds = {"max_ppl_gap": 0.01, "max_changed": 0.02, "holdout": 0.1}
    names = {"model": "made by hand", "model_fingerprint": "0", "head_sha256": "0"}
    header: dict[str, Any] = {**sizes, **bounds, **names, "recipe": "psp"}
    amounts = ("price", "predictor_share", "ppl_head", "ppl_levelled", "ppl_predicted")
    others = ("standard_error", "kl_divergence", "ppl_renormalised")
    shares = dict.fromkeys(("rows_read", "missed", "changed"), 0.1)
    point: dict[str, Any] = dict.fromkeys((*amounts, *others), 1.5) | shares
    points = (HeadPoint(method="psp", rank=RANK, chosen=True, **point),)
    predictor = HeadPredictor(torch.ones(RANK, 8), torch.ones(64, RANK))
    write_head(path / "head", HeadHeader(**header), points, predictor, torch.ones(8))
    return path


def read_head(path: Path) -> None:
    """Show it and read its tensors."""
    from predictor.head.artifact import HeadArtifact
    from predictor.head.table import head_table

    artifact = HeadArtifact.open(path / "head")
    head_table(artifact)
    artifact.read()


def make_estimate(path: Path) -> Path:
    """Estimate an exported file's speed."""
    from powerinfer_bridge.estimate.run import estimate
    from powerinfer_bridge.estimate.settings import EstimateConfig

    file = make_exported(path) / "m.powerinfer.gguf"
    hardware = "a100-80g+ddr4-8ch"
    estimate(EstimateConfig(file=file, hardware=hardware, density=0.2, out=path / "run"))
    (path / "run" / ESTIMATE.name).rename(path / ESTIMATE.name)
    return path


def make_index(path: Path) -> Path:
    """Write a GPU index."""
    from gguf_export.pwri.gpu_index import write_gpu_index

    write_gpu_index(path / "m.gpuidx", [torch.arange(D_FF) < 32], 1 << 20)
    return path


def read_index(path: Path) -> object:
    """Read it as `psp verify` does."""
    from gguf_export.pwri.gpu_index import read_gpu_index

    return read_gpu_index(path / "m.gpuidx", 1, D_FF)


def make_result(path: Path, file: ResultFile[Any]) -> Path:
    """Write a result of one kind, every optional part in it."""
    (path / file.name).write_text(json.dumps(example(file.content)))
    return path


def read_result(path: Path) -> None:
    """Read it and draw its page."""
    from report.page import render
    from report.runs import load_runs

    assert render(load_runs([path]))


RESULTS = {
    "gpu index": Format(make_index, ("*",), read_index),
    "head.json": Format(make_head, ("head/*",), read_head),
}
PAGES = {
    file.name: Format(partial(make_result, file=file), (file.name,), read_result, PAGE_SECONDS)
    for file in FILES
} | {ESTIMATE.name: Format(make_estimate, (ESTIMATE.name,), read_result, PAGE_SECONDS)}
