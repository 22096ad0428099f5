"""What a benchmark is of: the file, the programs that run it and the dense baselines."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gguf import GGUFValueType
from tqdm import tqdm

from common.errors import EngineError, FormatError
from gguf_export.pwri.gpu_index import index_path
from gguf_export.pwri.reader import GGUFFile
from powerinfer_bridge.benchmark.settings import PYTHON, BenchConfig
from powerinfer_bridge.engine.engine import Engine
from powerinfer_bridge.programs.llama_cpp import LlamaCpp, LlamaCppPython
from powerinfer_bridge.programs.powerinfer import PowerInfer
from powerinfer_bridge.programs.sample import ProgramFacts


@dataclass
class Heartbeat:
    """Keeps a progress bar's clock going while a program runs.

    Attributes:
        bar: the bar of what is measured now.
    """

    bar: tqdm | None = None

    def __call__(self, seconds: float) -> None:
        """Be told that a program is running."""
        if self.bar is not None:
            self.bar.refresh()


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Everything that is measured, opened and checked.

    Attributes:
        file: the sparse file.
        engine: the embedded engine with it.
        powerinfer: PowerInfer's programs, or None.
        powerinfer_facts: what they are.
        llama_cpp: llama.cpp, or None.
        llama_cpp_facts: what it is.
        dense: the dense file for PowerInfer's dense mode, or None.
        llama_cpp_file: the dense file for llama.cpp, or None.
        heartbeat: told while a program runs.
    """

    file: GGUFFile
    engine: Engine
    powerinfer: PowerInfer | None = None
    powerinfer_facts: ProgramFacts | None = None
    llama_cpp: LlamaCpp | LlamaCppPython | None = None
    llama_cpp_facts: ProgramFacts | None = None
    dense: GGUFFile | None = None
    llama_cpp_file: GGUFFile | None = None
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    @property
    def index(self) -> Path | None:
        """The GPU index beside the file, if one is there."""
        path = index_path(self.file.path)
        return path if path.is_file() else None

    @property
    def cuda(self) -> bool:
        """Whether PowerInfer says that it was built with CUDA."""
        return self.powerinfer_facts is not None and bool(self.powerinfer_facts.cuda)


def open_subject(config: BenchConfig) -> Subject:
    """Open files and programs, and make sure that the programs start.

    Raises:
        PspError: an unreadable file or one of the wrong kind, a program that is missing, does not
            start or is another's, or one thread for a GPU.
    """
    real, heartbeat = None, Heartbeat()
    if config.powerinfer_bin is not None:
        timeout = config.timeout
        real = PowerInfer(config.powerinfer_bin, timeout=timeout, heartbeat=heartbeat)
    llama_cpp = _llama_cpp(config, heartbeat)
    engine = Engine(config.file)
    facts = None if real is None else real.check(config.file)
    if facts is not None and facts.cuda and config.threads < 2:
        raise EngineError(
            "--threads 1: PowerInfer with CUDA needs one thread for the GPU beside those of the "
            "CPU and stops with an assertion",
            "pass at least 2",
        )
    needs_dense = real is not None and config.dense_gguf is not None
    return Subject(
        file=GGUFFile(config.file),
        engine=engine,
        powerinfer=real,
        powerinfer_facts=facts,
        llama_cpp=llama_cpp,
        llama_cpp_facts=None if llama_cpp is None else llama_cpp.check(),
        dense=_dense(config.dense_gguf) if needs_dense else None,
        llama_cpp_file=None if llama_cpp is None else _dense(config.llama_cpp_file),
        heartbeat=heartbeat,
    )


def _llama_cpp(config: BenchConfig, heartbeat: Heartbeat) -> LlamaCpp | LlamaCppPython | None:
    if config.llama_cpp_bin is None:
        return None
    if config.llama_cpp_bin == PYTHON:
        return LlamaCppPython()
    directory, timeout = Path(config.llama_cpp_bin), config.timeout
    return LlamaCpp(directory, timeout=timeout, heartbeat=heartbeat)


def _dense(path: Path | None) -> GGUFFile:
    assert path is not None  # the settings were checked
    file = GGUFFile(path)
    if file.sparse:
        raise FormatError(
            f"{path}: is a sparse file (magic PWRI)",
            "pass a dense one, such as 'psp export-gguf --dense' writes",
        )
    return file


def element_type(file: GGUFFile) -> str:
    """Return the type that most of a file's bytes have, predictors aside."""
    sizes: dict[str, int] = {}
    for name, info in file.tensors.items():
        if not name.endswith((".fc1.weight", ".fc2.weight")):
            sizes[info.kind.name] = sizes.get(info.kind.name, 0) + info.size
    return max(sizes, key=lambda kind: sizes[kind], default="none")


def architecture(file: GGUFFile) -> str:
    """Return a file's `general.architecture`."""
    name: str = file.value("general.architecture", GGUFValueType.STRING)
    return name
