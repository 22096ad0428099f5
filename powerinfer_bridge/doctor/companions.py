"""What lies beside a model file: activation statistics, a GPU index, a predictor directory."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import numpy as np
import torch

from common.errors import FormatError, PredictorError, PspError
from common.files import read_json
from common.finding import (
    Finding,
    from_error,
    guarded,
    note,
    ok,
    problem,
    warning,
)
from common.hot_neurons import SHARES, hot_neuron_curve
from common.machine import Gpu
from common.units import GIB, size
from gguf_export.contract import OpenedFile
from gguf_export.gpu_split import captured_share, choose_neurons, split_bytes
from gguf_export.pwri.gpu_index import file_groups, index_path, read_gpu_index
from gguf_export.pwri.memory_plan import KEPT_FREE, MemorySettings, plan_memory
from gguf_export.pwri.statistics import (
    ACTIVATION_DIRECTORY,
    may_have_statistics,
    read_statistics,
)
from gguf_export.settings import SUFFIX

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
    counts = yield from check_statistics(opened, has_gpu=bool(gpus))
    yield from guarded("GPU index", lambda: check_index(opened, counts, gpus))
    yield from guarded("predictors", lambda: check_directory(opened))


def check_statistics(
    opened: OpenedFile, *, has_gpu: bool
) -> Generator[Finding, None, list[torch.Tensor] | None]:
    """Judge the statistics: complete, this model's, and of use.

    Returns:
        Per layer, (d_ff,) int64; None if there are none that can be read.
    """
    directory, hyper, counts = opened.path.parent, opened.hyper, None
    files = len(list((directory / ACTIVATION_DIRECTORY).glob("activation_*.pt")))
    if not files:
        found = "no activation/ beside the file: no neurons can be chosen for a GPU"
        yield warning("statistics", found, _EXPORT) if has_gpu else note("statistics", found)
        return None
    if not hyper.skips_neurons:
        found = "activation/ beside the file is not its own: it was made without predictors"
        yield note("statistics", found)
        return None
    try:
        counts = read_statistics(directory, hyper.n_layers, hyper.d_ff)
    except PspError as error:
        yield from_error("statistics", error)
    else:
        yield _counted(counts, files)
    others = sorted(set(directory.glob(f"*{SUFFIX}")) - {opened.path})
    if foreign := [path.name for path in others if may_have_statistics(path)]:
        found = f"{foreign[0]} lies in the same directory, activation/ can be of one model"
        yield warning("statistics", found, "give every model a directory of its own")
    return counts


def _counted(counts: Sequence[torch.Tensor], files: int) -> Finding:
    if files != len(counts):
        found = f"activation/ holds {files} files, the model has {len(counts)} layers"
        return warning("statistics", found, "export again: some are another model's")
    curve = hot_neuron_curve(torch.stack(list(counts)))
    if curve is None:
        return warning("statistics", "no neuron was ever active", _EXPORT)
    hot = curve[SHARES.index(_HOT)]
    found = f"{len(counts)} layers; the hottest {_HOT:.0%} of neurons make {hot:.0%}"
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
    yield index_finding(facts, opened.path)


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
    settings = MemorySettings.of(opened.hyper, budget=max(0, memory - KEPT_FREE))
    plan = plan_memory(opened.file.tensors.values(), settings)
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


def index_finding(facts: IndexFacts, file: Path) -> Finding:
    """Judge an index that can be read; the first thing that is wrong counts."""
    again = remake(file, facts.memory, force=True)
    share = f"{facts.neurons / facts.total:.1%}"
    found = f"{share} of all neurons on the GPU, {size(facts.capacity)} of VRAM"
    if not facts.neurons:
        return warning("GPU index", "puts no neuron on the GPU", again)
    if facts.room is not None and facts.capacity > facts.room:
        found = (
            f"needs {size(facts.capacity)} of VRAM for neurons, the GPU leaves {size(facts.room)}: "
            "PowerInfer refuses it and writes over it"
        )
        return problem("GPU index", found, again)
    if facts.needed > facts.capacity:
        found = f"says {size(facts.capacity)} of VRAM, its neurons take {size(facts.needed)}"
        return warning("GPU index", found, again)
    if facts.share is None or facts.best is None:
        older = f"{found}; older than the model file"
        return warning("GPU index", older, again) if facts.older else ok("GPU index", found)
    if facts.share < facts.best - _LOSS:
        found += f"; they make {facts.share:.1%} of activations, the best of that size "
        found += f"{facts.best:.1%}: of other statistics, or not psp's"
        return warning("GPU index", found, again)
    return ok("GPU index", f"{found}, {facts.share:.1%} of activations")


def check_directory(opened: OpenedFile) -> Iterator[Finding]:
    """Judge the predictor directory against the file's layers and threshold.

    Raises:
        PredictorError: a config.json that is no JSON object.
    """
    path = opened.path.with_name(f"{opened.path.name.removesuffix(SUFFIX)}.predictors")
    if not path.is_dir():
        yield note("predictors", f"no {path.name} beside the file; PowerInfer does not need it")
        return
    n_layers, threshold, config = opened.hyper.n_layers, opened.hyper.threshold, {}
    names = {entry.name for entry in path.iterdir()}
    layers = next(n for n in range(len(names) + 1) if f"model_{n}.pt" not in names)
    if "config.json" in names:
        config = read_json(path / "config.json", PredictorError, _AGAIN)
    said = config.get("sparse_threshold")
    if layers != n_layers:
        found = f"{path.name} holds {layers} layers, the file {n_layers}"
        yield warning("predictors", found, _AGAIN)
    elif not _same(said, threshold):
        found = f"{path.name} says threshold {said}, the file {threshold:g}"
        yield warning("predictors", found, _AGAIN)
    else:
        yield ok("predictors", f"{path.name}: {n_layers} layers, threshold {threshold:g}")


def _same(found: object, threshold: float) -> bool:
    """Compare as the file stores it, in float32."""
    number = isinstance(found, int | float) and not isinstance(found, bool)
    return number and bool(np.float32(str(found)) == np.float32(threshold))
