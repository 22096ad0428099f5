"""A model file and what lies beside it, each on the ground of the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from powerinfer_bridge.contract import Subject
from powerinfer_bridge.doctor.finding import Finding, Status, guarded
from powerinfer_bridge.doctor.gpu import Gpu
from powerinfer_bridge.doctor.model_file import file_findings
from powerinfer_bridge.doctor.predictor_directory import directory_findings, read_directory
from powerinfer_bridge.doctor.split_index import check_index
from powerinfer_bridge.doctor.statistics import read_facts, statistics_findings


def check_bundle(path: Path, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """Judge a file; what lies beside it only if the file itself is sound."""
    findings = list(file_findings(path))
    yield from findings
    if any(finding.status is Status.PROBLEM for finding in findings):
        return
    subject = Subject(path)
    hyper = subject.hyper
    facts = read_facts(path, hyper.n_layers, hyper.d_ff)
    yield from statistics_findings(facts, has_gpu=bool(gpus))
    yield from guarded("GPU index", lambda: check_index(subject, facts.counts, gpus))
    yield from guarded(
        "predictors",
        lambda: directory_findings(read_directory(path), hyper.n_layers, hyper.threshold),
    )
