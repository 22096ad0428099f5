"""Settings of `psp bench-powerinfer`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common.errors import EngineError
from common.settings import (
    LLAMA_CPP_VARIABLE,
    MODEL_FORMS,
    Field,
    Force,
    ModelFile,
    Option,
    PowerInferBin,
    Resume,
    SecondEngineBin,
    Seed,
    Threads,
    check_settings,
    text_option,
)
from common.text_sources.names import Sources
from common.units import parse_size

PYTHON = "python"
"""What `--llama-cpp-bin` is where the package llama-cpp-python shall run."""

_NOT_MEASURED = ("out", "resume", "force")
"""Settings that say where results go and change none."""

_BESIDE = ("timeout", "hardware")
"""Settings that change no measurement, so that an interrupted benchmark may go on with others."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Settings of a benchmark."""

    file: ModelFile
    powerinfer_bin: PowerInferBin = None
    vram_budget: Annotated[
        str | None, Option("VRAM for PowerInfer, such as 24GiB.", "SIZE", unset="what is free")
    ] = None
    dense_gguf: Annotated[
        Path | None,
        Option(
            "The dense model: measured in PowerInfer's dense mode and in llama.cpp, where given; "
            "of arch smallthinker in llama.cpp alone.",
            "FILE",
        ),
    ] = None
    llama_cpp_bin: Annotated[
        str | None,
        Option(
            "Directory of llama.cpp's programs, or python for the package llama-cpp-python.",
            "DIR|python",
            envvar=LLAMA_CPP_VARIABLE,
        ),
    ] = None
    llama_cpp_gguf: Annotated[
        Path | None, Option("The dense model for llama.cpp.", "FILE", unset="that of --dense-gguf")
    ] = None
    second_engine_bin: SecondEngineBin = None
    second_engine_gguf: Annotated[
        Path | None,
        Option(
            "The model for PowerInfer's second engine, from export-gguf --engine smallthinker.",
            "NAME.smallthinker.gguf",
        ),
    ] = None
    n_gpu_layers: Annotated[
        int, Option("Layers of dense models on the GPU.", names=("-ngl", "--n-gpu-layers"), least=0)
    ] = 0
    data: Annotated[Sources, text_option("Held-out text.", unset="prose shipped with Python")] = ()
    field: Field = "text"
    context: Annotated[
        int,
        Option(
            "Perplexity window, tokens; at most the model's context.", names=("--ctx",), least=8
        ),
    ] = 512
    chunks: Annotated[int, Option("Perplexity windows, at most.", least=1)] = 16
    model: Annotated[
        str | None, Option("The file's checkpoint, for transformers' perplexity.", MODEL_FORMS)
    ] = None
    prompt: Annotated[str, Option("Text to continue.")] = "The first thing to know about"
    prompts: Annotated[
        Path | None,
        Option(
            "Instead: several texts, one a line of a .txt file, or one a row under --field.", "FILE"
        ),
    ] = None
    generate: Annotated[int, Option("Tokens to generate.", names=("-n",), least=2)] = 128
    repeats: Annotated[int, Option("Rounds of every arm on every prompt.", least=1)] = 5
    warm_up: Annotated[int, Option("Rounds before them that do not count.", least=0)] = 1
    threads: Threads = 2
    seed: Seed = 0
    timeout: Annotated[
        float, Option("Longest that a run of a program may take, seconds.", above=0)
    ] = 3600.0
    hardware: Annotated[
        str | None,
        Option(
            "Put the estimate of psp estimate for this hardware beside the figures.",
            "NAME|FILE.yaml|this",
        ),
    ] = None
    out: Annotated[
        Path | None, Option("Keep results there, each run as soon as it is done.", "DIR")
    ] = None
    resume: Resume = False
    force: Force = False

    def __post_init__(self) -> None:
        """Refuse settings that measure nothing or contradict each other."""
        check_settings(self, EngineError)
        for wrong, problem, remedy in self._contradictions():
            if wrong:
                raise EngineError(problem, remedy)

    def _contradictions(self) -> Iterator[tuple[bool, str, str]]:
        """Yield whether something contradicts itself, how to say so, and the remedy."""
        empty = not self.prompt and self.prompts is None
        yield empty, "the prompt is empty", "pass some text to continue"
        dense, real = self.dense_gguf is not None, self.powerinfer_bin is not None
        llama_cpp = self.llama_cpp_bin is not None
        problem = f"{self.dense_gguf}: no program for --dense-gguf"
        remedy = "pass --powerinfer-bin or --llama-cpp-bin"
        yield dense and not (real or llama_cpp), problem, remedy
        problem = f"{self.llama_cpp_bin}: no model for llama.cpp"
        remedy = "pass --llama-cpp-gguf or --dense-gguf"
        yield llama_cpp and self.llama_cpp_file is None, problem, remedy
        problem = f"{self.llama_cpp_gguf}: no program for --llama-cpp-gguf"
        yield self.llama_cpp_gguf is not None and not llama_cpp, problem, "pass --llama-cpp-bin"
        second, file = self.second_engine_bin is not None, self.second_engine_gguf
        problem = f"{file}: no program for --second-engine-gguf"
        yield file is not None and not second, problem, "pass --second-engine-bin"
        problem = f"{self.second_engine_bin}: no model for PowerInfer's second engine"
        yield second and file is None, problem, "pass --second-engine-gguf"
        problem = f"--n-gpu-layers {self.n_gpu_layers} is for dense models"
        yield self.n_gpu_layers > 0 and not (dense or llama_cpp), problem, "pass --dense-gguf"
        budget = self.vram_budget is not None
        problem = f"--vram-budget {self.vram_budget} is for PowerInfer"
        yield budget and not real, problem, "pass --powerinfer-bin"
        problem = f"--vram-budget {self.vram_budget} is no memory"
        yield budget and self.vram_budget_bytes == 0, problem, "pass a size such as 24GiB"
        kept, problem = self.resume or self.force, "nothing is kept without a directory"
        yield kept and self.out is None, problem, "pass --out with --resume or --force"
        problem = "--resume goes on, --force begins anew"
        yield self.resume and self.force, problem, "pass one of them"

    @property
    def llama_cpp_file(self) -> Path | None:
        """The dense model for llama.cpp."""
        return self.llama_cpp_gguf or self.dense_gguf

    @property
    def vram_budget_bytes(self) -> int | None:
        """VRAM for PowerInfer, bytes."""
        return None if self.vram_budget is None else parse_size(self.vram_budget)

    def document(self) -> dict[str, object]:
        """Return the settings as a result records them, ready for JSON."""
        from common.typed_json import plain

        return {key: value for key, value in plain(self).items() if key not in _NOT_MEASURED}

    def identity(self) -> dict[str, object]:
        """Return the settings that must be the same for a benchmark to go on."""
        return {key: value for key, value in self.document().items() if key not in _BESIDE}
