"""What lies beside a model file: activation statistics, a GPU index, a predictor directory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import numpy as np
import torch

from common.errors import FormatError, PredictorError, PspError
from common.files import read_json
from common.machine import Gpu
from common.units import GIB, size
from gguf_export.contract import OpenedFile
from gguf_export.pwri.gpu_index import file_groups, index_path, read_gpu_index
from gguf_export.pwri.gpu_split import captured_share, choose_neurons, split_bytes
from gguf_export.pwri.memory_plan import KEPT_FREE, MemoryPlan, MemorySettings, plan_memory
from gguf_export.pwri.statistics import ACTIVATION_DIRECTORY, read_statistics
from powerinfer_bridge.doctor.finding import (
    Finding,
    from_error,
    guarded,
    note,
    ok,
    problem,
    warning,
)

_SUFFIX = ".powerinfer.gguf"
_HOT = 0.1
_EXPORT = "export with predictors from psp train-predictor, which come with statistics"
_AGAIN = "export again"
_LOSS = 0.001
"""Share of all activations that an index may lack of the best one of its size: equal counts may be
ordered otherwise."""

_SORTED_AS_TEXT = 10
"""Up to so many layers, file names sorted as text come in the order of the layers."""


def check_companions(opened: OpenedFile, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """Judge what lies beside a sound file, each on the ground of the others."""
    path, hyper = opened.path, opened.hyper
    facts = read_statistics_facts(path, hyper.n_layers, hyper.d_ff)
    yield from statistics_findings(facts, has_gpu=bool(gpus))
    yield from guarded("GPU index", lambda: check_index(opened, facts.counts, gpus))
    yield from guarded(
        "predictors",
        lambda: directory_findings(read_directory(path), hyper.n_layers, hyper.threshold),
    )


@dataclass(frozen=True, kw_only=True)
class StatisticsFacts:
    """What lies in `activation/`.

    Attributes:
        n_layers: of the model.
        files: statistics files there, whatever their number.
        foreign: other model files in the same directory, whose statistics these may be.
        counts: per layer, (d_ff,) int64; None if there are none that can be read.
        error: why they cannot be read; None without an error.
    """

    n_layers: int
    files: int
    foreign: tuple[str, ...] = ()
    counts: Sequence[torch.Tensor] | None = None
    error: PspError | None = None


def read_statistics_facts(file: Path, n_layers: int, d_ff: int) -> StatisticsFacts:
    """Read the statistics beside a model file."""
    files = len(list((file.parent / ACTIVATION_DIRECTORY).glob("activation_*.pt")))
    others = sorted(path.name for path in file.parent.glob("*.powerinfer.gguf"))
    foreign = tuple(name for name in others if name != file.name)
    counts, error = None, None
    if files:
        try:
            counts = read_statistics(file.parent, n_layers, d_ff)
        except PspError as found:
            error = found
    return StatisticsFacts(
        n_layers=n_layers, files=files, foreign=foreign, counts=counts, error=error
    )


def statistics_findings(facts: StatisticsFacts, *, has_gpu: bool) -> Iterator[Finding]:
    """Judge the statistics: complete, this model's, and of use."""
    if not facts.files:
        found = "no activation/ beside the file: no neurons can be chosen for a GPU"
        yield warning("statistics", found, _EXPORT) if has_gpu else note("statistics", found)
    elif facts.error is not None:
        yield from_error("statistics", facts.error)
    elif facts.counts is not None:
        yield _counted(facts, facts.counts)
    if facts.files and facts.foreign:
        found = f"{facts.foreign[0]} lies in the same directory, activation/ can be of one model"
        yield warning("statistics", found, "give every model a directory of its own")


def _counted(facts: StatisticsFacts, counts: Sequence[torch.Tensor]) -> Finding:
    if facts.files != facts.n_layers:
        found = f"activation/ holds {facts.files} files, the model has {facts.n_layers} layers"
        return warning("statistics", found, "export again: some are another model's")
    every = torch.cat(list(counts)).sort(descending=True).values
    total = int(every.sum())
    if not total:
        return warning("statistics", "no neuron was ever active", _EXPORT)
    hot = int(every[: max(1, int(_HOT * len(every)))].sum())
    found = f"{facts.n_layers} layers; the hottest {_HOT:.0%} of neurons make {hot / total:.0%}"
    return ok("statistics", f"{found} of all activations")


@dataclass(frozen=True, kw_only=True)
class IndexFacts:
    """What an index says, beside what the file and the machine say.

    Attributes:
        neurons: neurons on the GPU.
        total: neurons of all layers.
        capacity: bytes of VRAM that it says its neurons need.
        needed: bytes that they do need.
        older: than the model file.
        share: share of all activations that its neurons account for; None without statistics.
        best: the same of the best choice of the same capacity.
        memory: bytes of the largest card; 0 without one.
        room: bytes that it leaves for neurons; None without one.
    """

    neurons: int
    total: int
    capacity: int
    needed: int
    older: bool
    share: float | None = None
    best: float | None = None
    memory: int = 0
    room: int | None = None


def check_index(
    opened: OpenedFile, counts: Sequence[torch.Tensor] | None, gpus: Sequence[Gpu]
) -> Iterator[Finding]:
    """Read the index beside a file, or say what follows from its absence."""
    path = index_path(opened.path)
    memory = max((gpu.memory for gpu in gpus), default=0)
    if not os.path.lexists(path):
        yield absent(
            opened.path,
            opened.hyper.n_layers,
            has_statistics=counts is not None,
            has_gpu=bool(gpus),
            memory=memory,
        )
        return
    try:
        facts = read_index_facts(opened, path, counts, memory)
    except FormatError as error:
        yield problem("GPU index", error.problem, remake(opened.path, memory, force=True))
        return
    yield from index_findings(facts, opened.path)


def read_index_facts(
    opened: OpenedFile, path: Path, counts: Sequence[torch.Tensor] | None, memory: int
) -> IndexFacts:
    """Read an index and compare it.

    Raises:
        FormatError: damaged, of another model, or one that PowerInfer would refuse or misread.
    """
    d_ff, layers = opened.hyper.d_ff, opened.hyper.n_layers
    groups = file_groups(opened.file)
    chosen, capacity = read_gpu_index(path, layers, d_ff, groups)
    plan = _plan(opened, max(0, memory - KEPT_FREE))
    share = best = None
    if counts is not None:
        share = captured_share(counts, chosen)
        best_choice = choose_neurons(counts, plan.bytes_per_neuron, capacity, groups=groups)
        best = captured_share(counts, best_choice)
    return IndexFacts(
        neurons=sum(int(layer.sum()) for layer in chosen),
        total=layers * d_ff,
        capacity=capacity,
        needed=split_bytes(chosen, plan.bytes_per_neuron),
        older=path.stat().st_mtime < opened.path.stat().st_mtime,
        share=share,
        best=best,
        memory=memory,
        room=plan.ffn_budget if memory else None,
    )


def _plan(opened: OpenedFile, budget: int) -> MemoryPlan:
    settings = MemorySettings.of(opened.hyper, budget=budget)
    return plan_memory(opened.file.tensors.values(), settings)


def absent(
    file: Path, n_layers: int, *, has_statistics: bool, has_gpu: bool, memory: int
) -> Finding:
    """Say what PowerInfer does without an index."""
    if not has_gpu:
        return note("GPU index", "none beside the file; only builds with CUDA read one")
    if not has_statistics:
        found = "none beside the file, and no statistics to make one: all neurons stay on the CPU"
        return warning("GPU index", found, "export with predictors from psp train-predictor")
    found = "none beside the file: PowerInfer will run its own solver, 'python3 -m powerinfer'"
    if n_layers > _SORTED_AS_TEXT:
        found += f", which mixes up the statistics of {n_layers} layers"
    return warning("GPU index", found, remake(file, memory))


def remake(file: Path, memory: int = 0, *, force: bool = False) -> str:
    """Return the command that makes an index."""
    tenths = max(0, memory - KEPT_FREE) * 10 // GIB
    budget = f"{tenths / 10:g}GiB" if tenths else "SIZE"
    return f"psp gpu-split {quote(str(file))} --vram-budget {budget}{' --force' if force else ''}"


def index_findings(facts: IndexFacts, file: Path) -> Iterator[Finding]:
    """Judge an index that can be read; the first thing that is wrong counts."""
    again = remake(file, facts.memory, force=True)
    share = f"{facts.neurons / facts.total:.1%}"
    found = f"{share} of all neurons on the GPU, {size(facts.capacity)} of VRAM"
    if not facts.neurons:
        yield warning("GPU index", "puts no neuron on the GPU", again)
    elif facts.room is not None and facts.capacity > facts.room:
        found = (
            f"needs {size(facts.capacity)} of VRAM for neurons, the GPU leaves {size(facts.room)}: "
            "PowerInfer refuses it and writes over it"
        )
        yield problem("GPU index", found, again)
    elif facts.needed > facts.capacity:
        found = f"says {size(facts.capacity)} of VRAM, its neurons take {size(facts.needed)}"
        yield warning("GPU index", found, again)
    elif facts.share is not None and facts.best is not None:
        yield _by_statistics(facts, found, facts.share, facts.best, again)
    elif facts.older:
        yield warning("GPU index", f"{found}; older than the model file", again)
    else:
        yield ok("GPU index", found)


def _by_statistics(facts: IndexFacts, found: str, share: float, best: float, again: str) -> Finding:
    if share < best - _LOSS:
        found += f"; they make {share:.1%} of activations, the best of that size {best:.1%}"
        return warning("GPU index", f"{found}: of other statistics, or not psp's", again)
    return ok("GPU index", f"{found}, {share:.1%} of activations")


@dataclass(frozen=True, kw_only=True)
class DirectoryFacts:
    """What the directory holds.

    Attributes:
        name: of the directory.
        layers: numbered `model_N.pt` without a gap, from 0 on; None if there is no directory.
        threshold: of its config.json; None without one.
    """

    name: str
    layers: int | None
    threshold: object = None


def read_directory(file: Path) -> DirectoryFacts:
    """Count files and read the threshold.

    Raises:
        PredictorError: a config.json that is no JSON object.
    """
    path = file.with_name(f"{file.name.removesuffix(_SUFFIX)}.predictors")
    if not path.is_dir():
        return DirectoryFacts(name=path.name, layers=None)
    names = {entry.name for entry in path.iterdir()}
    layers = next(n for n in range(len(names) + 1) if f"model_{n}.pt" not in names)
    config = {}
    if "config.json" in names:
        config = read_json(path / "config.json", PredictorError, _AGAIN)
    return DirectoryFacts(name=path.name, layers=layers, threshold=config.get("sparse_threshold"))


def directory_findings(facts: DirectoryFacts, n_layers: int, threshold: float) -> Iterator[Finding]:
    """Judge the directory against the file's layers and threshold."""
    if facts.layers is None:
        found = f"no {facts.name} beside the file; PowerInfer does not need it"
        yield note("predictors", found)
    elif facts.layers != n_layers:
        found = f"{facts.name} holds {facts.layers} layers, the file {n_layers}"
        yield warning("predictors", found, _AGAIN)
    elif not _same(facts.threshold, threshold):
        found = f"{facts.name} says threshold {facts.threshold}, the file {threshold:g}"
        yield warning("predictors", found, _AGAIN)
    else:
        yield ok("predictors", f"{facts.name}: {n_layers} layers, threshold {threshold:g}")


def _same(found: object, threshold: float) -> bool:
    """Compare as the file stores it, in float32."""
    number = isinstance(found, int | float) and not isinstance(found, bool)
    return number and bool(np.float32(str(found)) == np.float32(threshold))
