"""What a benchmark measures with what: all of it opened and checked before anything runs."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from common.documents import read_text, sample_text
from common.errors import EngineError
from common.machine import Gpu, cpu_name, read_gpus, read_memory, usable_threads
from common.version import tool_version
from cost_model.hardware import THIS, load_hardware
from gguf_export.origin import require_made_from
from gguf_export.pwri.gpu_index import index_path
from gguf_files.names import SMALLTHINKER
from gguf_files.reader import GGUFFile
from powerinfer_bridge.benchmark.beside import DenseFile, described, open_dense
from powerinfer_bridge.benchmark.inputs import (
    describe_files,
    describe_text,
    read_prompts,
    room_for,
    text_source,
)
from powerinfer_bridge.benchmark.placement import NeuronFacts, read_neuron_facts, vram_budget
from powerinfer_bridge.benchmark.second_engine import open_second_file
from powerinfer_bridge.benchmark.settings import PYTHON, BenchConfig
from powerinfer_bridge.engine.engine import Engine
from powerinfer_bridge.programs.build import THRESHOLD_VARIABLE
from powerinfer_bridge.programs.llama_cpp import LlamaCpp, LlamaCppPython
from powerinfer_bridge.programs.powerinfer import PowerInfer
from powerinfer_bridge.programs.sample import ProgramFacts
from powerinfer_bridge.programs.second_engine import SecondEngine, check_second_threads
from results.bench import (
    DENSE_LLAMA_CPP,
    DENSE_LLAMA_CPP_SILU,
    ArmName,
    Input,
    Versions,
)
from results.parts import GpuFacts, MachineFacts


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What runs the benchmark.

    Attributes:
        facts: what results say of it.
        gpus: NVIDIA GPUs whose memory their driver tells.
        load: mean number of running processes over the last minute, before the benchmark.
        threshold: what the environment has PowerInfer take instead of a file's; None if nothing.
    """

    facts: MachineFacts
    gpus: tuple[Gpu, ...] = ()
    load: float = 0.0
    threshold: str | None = None


def this_machine() -> Machine:
    """Look at the machine."""
    gpus = tuple(card for card in read_gpus().cards if card.memory)
    facts = MachineFacts(
        cpu=cpu_name(),
        cpus=usable_threads(),
        memory_bytes=read_memory().total,
        gpus=tuple(GpuFacts(name=card.name, memory_bytes=card.memory) for card in gpus),
    )
    told = os.environ.get(THRESHOLD_VARIABLE)
    return Machine(facts=facts, gpus=gpus, load=os.getloadavg()[0], threshold=told)


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
class SecondProgram:
    """PowerInfer's second engine with a model.

    Attributes:
        engine: its programs.
        facts: what they are.
        file: the model.
    """

    engine: SecondEngine
    facts: ProgramFacts
    file: DenseFile


@dataclass(frozen=True, kw_only=True)
class Programs:
    """Programs of others that run files, and the dense files for them.

    Attributes:
        powerinfer: PowerInfer's, or None.
        powerinfer_facts: what they are.
        llama_cpp: llama.cpp's, or None.
        llama_cpp_facts: what they are.
        powerinfer_dense: the dense file for PowerInfer, or None.
        llama_cpp_dense: the dense file for llama.cpp, or None.
        silu_dense: one of arch `llama` for llama.cpp beside one of experts, or None.
        unused_dense: a dense file that PowerInfer has no graph for, or None.
        second: PowerInfer's second engine, or None.
        heartbeat: told while one runs.
    """

    powerinfer: PowerInfer | None = None
    powerinfer_facts: ProgramFacts | None = None
    llama_cpp: LlamaCpp | LlamaCppPython | None = None
    llama_cpp_facts: ProgramFacts | None = None
    powerinfer_dense: DenseFile | None = None
    llama_cpp_dense: DenseFile | None = None
    silu_dense: DenseFile | None = None
    unused_dense: DenseFile | None = None
    second: SecondProgram | None = None
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    @property
    def llama_cpp_files(self) -> Mapping[ArmName, DenseFile]:
        """Dense files for llama.cpp by arm."""
        files: dict[ArmName, DenseFile | None]
        files = {DENSE_LLAMA_CPP: self.llama_cpp_dense, DENSE_LLAMA_CPP_SILU: self.silu_dense}
        return {name: file for name, file in files.items() if file is not None}

    @property
    def unsure(self) -> Iterator[Path]:
        """Files beside the sparse one of which nothing says that they are of its model."""
        second = None if self.second is None else self.second.file
        dense = (self.powerinfer_dense, self.unused_dense, *self.llama_cpp_files.values(), second)
        found = (file.path for file in dense if file is not None and not file.same_model)
        yield from dict.fromkeys(found)

    @property
    def cuda(self) -> bool | None:
        """Whether PowerInfer was built with CUDA; None if it does not tell, or does not run."""
        return None if self.powerinfer_facts is None else self.powerinfer_facts.cuda

    @property
    def exact_threads(self) -> int:
        """Most threads with which PowerInfer, which there must be, adds up exactly."""
        assert self.powerinfer_facts is not None
        return self.powerinfer_facts.exact_threads

    @property
    def llama_cpp_cuda(self) -> bool | None:
        """The same of llama.cpp."""
        return None if self.llama_cpp_facts is None else self.llama_cpp_facts.cuda


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that a benchmark needs.

    Attributes:
        config: settings.
        machine: what all of it runs on.
        file: the sparse file.
        engine: the embedded engine with it.
        programs: what else runs it, and dense files beside it.
        neurons: statistics and GPU index beside it.
        text: held-out text.
        prompts: what is continued.
        room: tokens that the longest prompt and its continuation take; PowerInfer's context.
        inputs: all that was read.
    """

    config: BenchConfig
    machine: Machine
    file: GGUFFile
    engine: Engine
    programs: Programs
    neurons: NeuronFacts
    text: str
    prompts: tuple[str, ...]
    room: int
    inputs: tuple[Input, ...]

    @property
    def context(self) -> int:
        """Tokens of a perplexity window: as asked for, at most the model's context."""
        return min(self.config.context, self.engine.hyper.context_length)

    @property
    def vram_budget(self) -> int | None:
        """VRAM that PowerInfer takes, None where it uses no GPU."""
        return vram_budget(self.config, self.programs.powerinfer_facts, self.machine.gpus)

    @property
    def versions(self) -> Versions:
        """Versions of what measures."""
        real, llama_cpp = self.programs.powerinfer_facts, self.programs.llama_cpp_facts
        second = self.programs.second
        return Versions(
            psp=tool_version(),
            python=platform.python_version(),
            torch=str(torch.__version__),
            powerinfer=None if real is None else real.version,
            second_engine=None if second is None else second.facts.version,
            llama_cpp=None if llama_cpp is None else llama_cpp.version,
        )


def open_setup(config: BenchConfig, note: Callable[[str], None]) -> Setup:
    """Open files and programs, and make sure that the programs start.

    Raises:
        PspError: an unreadable file or text or one of the wrong kind, a program that is missing,
            does not start or is another's, one thread for a GPU, or unknown hardware.
    """
    machine = this_machine()  # first, because all that follows is load too
    if config.hardware is not None and config.hardware != THIS:
        load_hardware(config.hardware)
    engine, file = Engine(config.file), GGUFFile(config.file)
    programs = open_programs(config)
    _check_model(config, file, note)
    text = read_text(config.data, config.field, note) if config.data else sample_text()
    prompts, hyper = read_prompts(config), engine.hyper
    room = room_for(prompts, engine.vocabulary, config.generate, hyper.context_length)
    return Setup(
        config=config,
        machine=machine,
        file=file,
        engine=engine,
        programs=programs,
        neurons=read_neuron_facts(file, hyper),
        text=text,
        prompts=tuple(prompts),
        room=room,
        inputs=(
            *describe_files(_files(config, programs)),
            describe_text("text", text_source(config), text),
            # A prompt of the command line has no path of its own.
            describe_text("prompts", str(config.prompts or "--prompt"), "\n".join(prompts)),
        ),
    )


def _files(config: BenchConfig, programs: Programs) -> dict[str, Path | None]:
    """Return the files that are read by their role."""
    index = index_path(config.file)
    dense, llama_cpp = programs.powerinfer_dense, programs.llama_cpp_dense
    return {
        "model": config.file,
        "dense_model": None if dense is None else dense.path,
        "llama_cpp_model": None if llama_cpp is None else llama_cpp.path,
        "second_engine_model": config.second_engine_gguf,
        "gpu_index": index if index.is_file() else None,
    }


def open_programs(config: BenchConfig) -> Programs:
    """Find the programs, start each once, and open the dense files for them.

    Raises:
        PspError: see `open_setup`.
    """
    real, heartbeat = None, Heartbeat()
    if config.powerinfer_bin is not None:
        timeout = config.timeout
        real = PowerInfer(config.powerinfer_bin, timeout=timeout, heartbeat=heartbeat)
    llama_cpp = _llama_cpp(config, heartbeat)
    facts = None if real is None else real.check(config.file)
    if facts is not None:
        check_threads(facts, config.threads)
    told = None if llama_cpp is None else llama_cpp.check()
    sparse = GGUFFile(config.file)
    dense = open_dense(config.dense_gguf, sparse)
    experts = dense is not None and dense.architecture == SMALLTHINKER
    own = None if llama_cpp is None else open_dense(config.llama_cpp_file, sparse)
    twins = own is not None and dense is not None and own.architecture == SMALLTHINKER
    return Programs(
        powerinfer=real,
        powerinfer_facts=facts,
        llama_cpp=llama_cpp,
        llama_cpp_facts=told,
        powerinfer_dense=None if real is None or experts else dense,
        llama_cpp_dense=own,
        silu_dense=dense if twins and dense is not None and not experts else None,
        unused_dense=dense if real is not None and experts else None,
        second=_second(config, sparse, heartbeat),
        heartbeat=heartbeat,
    )


def check_threads(facts: ProgramFacts, threads: int) -> None:
    """Refuse a number of threads with which PowerInfer would stop.

    Raises:
        EngineError: one thread for a build with CUDA.
    """
    if facts.cuda and threads < 2:
        raise EngineError(
            "--threads 1: PowerInfer with CUDA needs one thread for the GPU beside those of the "
            "CPU and stops with an assertion",
            "pass at least 2",
        )


def _llama_cpp(config: BenchConfig, heartbeat: Heartbeat) -> LlamaCpp | LlamaCppPython | None:
    if config.llama_cpp_bin is None:
        return None
    if config.llama_cpp_bin == PYTHON:
        return LlamaCppPython(timeout=config.timeout, heartbeat=heartbeat)
    return LlamaCpp(Path(config.llama_cpp_bin), timeout=config.timeout, heartbeat=heartbeat)


def _second(config: BenchConfig, file: GGUFFile, heartbeat: Heartbeat) -> SecondProgram | None:
    """Return PowerInfer's second engine and the model for it, if both are given."""
    path = config.second_engine_gguf
    if config.second_engine_bin is None or path is None:
        return None
    check_second_threads(config.threads)
    held = described(open_second_file(path), file)
    engine = SecondEngine(config.second_engine_bin, timeout=config.timeout, heartbeat=heartbeat)
    return SecondProgram(engine=engine, facts=engine.check(path), file=held)


def _check_model(config: BenchConfig, file: GGUFFile, note: Callable[[str], None]) -> None:
    """Demand that `--model` is what the file was made from, as far as the file tells."""
    if config.model is None:
        return
    from architectures.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(config.model)
    for line in checkpoint.notes:
        note(line)
    require_made_from(config.file, file, checkpoint, str(config.model))
