"""Settings of a benchmark."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.errors import EngineError
from gguf_export.pwri.memory_plan import parse_size

PYTHON = "python"
"""What `--llama-cpp-bin` is where the package llama-cpp-python shall run."""

_NOT_MEASURED = ("out", "resume", "force")
"""Settings that say where results go and change none."""

_BESIDE = ("timeout", "hardware")
"""Settings that change no measurement, so that an interrupted benchmark may go on with others."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Settings of a benchmark.

    Attributes:
        file: `*.powerinfer.gguf`.
        powerinfer_bin: directory of a PowerInfer build, or None for the embedded engine.
        dense_gguf: the dense model, for PowerInfer's dense mode and for llama.cpp.
        llama_cpp_bin: directory of a llama.cpp build, or `PYTHON`.
        llama_cpp_gguf: the dense model for llama.cpp, if it is another than `dense_gguf`.
        n_gpu_layers: layers that dense arms offload.
        data: held-out text, see `common.documents`; None takes `sample_text`.
        field: key of the text in structured sources.
        context: perplexity window, tokens.
        chunks: perplexity windows, at most.
        prompt: text to continue.
        prompts: file of several, see `benchmark.prompts`; replaces `prompt`.
        generate: tokens to generate a run.
        repeats: rounds that count; each runs every arm on every prompt.
        warm_up: rounds before them that do not.
        threads: CPU threads.
        timeout: longest a run of a program may take, seconds.
        vram_budget: VRAM for PowerInfer, such as `24GiB`.
        seed: passed to PowerInfer; decoding is greedy.
        model: the checkpoint, for transformers' own perplexity.
        hardware: what to estimate for, see `powerinfer_bridge.estimate.run`.
        out: directory for results and the journal.
        resume: go on with an interrupted benchmark in `out`.
        force: replace what `out` holds.
    """

    file: Path
    powerinfer_bin: Path | None = None
    dense_gguf: Path | None = None
    llama_cpp_bin: str | None = None
    llama_cpp_gguf: Path | None = None
    n_gpu_layers: int = 0
    data: str | None = None
    field: str = "text"
    context: int = 512
    chunks: int = 16
    prompt: str = "The first thing to know about"
    prompts: Path | None = None
    generate: int = 128
    repeats: int = 5
    warm_up: int = 1
    threads: int = 2
    timeout: float = 3600.0
    vram_budget: str | None = None
    seed: int = 0
    model: str | None = None
    hardware: str | None = None
    out: Path | None = None
    resume: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that measure nothing or contradict each other."""
        if self.generate < 2 or self.repeats < 1 or self.chunks < 1 or self.context < 8:
            raise EngineError(
                "nothing to measure: need at least 2 tokens, 1 repeat, 1 chunk and a context of 8"
            )
        if not self.prompt and self.prompts is None:
            raise EngineError("the prompt is empty", "pass some text to continue")
        for wrong, problem in self._contradictions():
            if wrong:
                raise EngineError(problem)

    def _contradictions(self) -> list[tuple[bool, str]]:
        dense = self.dense_gguf is not None
        llama_cpp, real = self.llama_cpp_bin is not None, self.powerinfer_bin is not None
        budget = self.vram_budget is not None
        return [
            (
                dense and not (real or llama_cpp),
                f"{self.dense_gguf}: no program for --dense-gguf; pass --powerinfer-bin or "
                "--llama-cpp-bin",
            ),
            (
                llama_cpp and self.llama_cpp_file is None,
                f"{self.llama_cpp_bin}: no model for llama.cpp; pass --llama-cpp-gguf or "
                "--dense-gguf",
            ),
            (
                self.llama_cpp_gguf is not None and not llama_cpp,
                f"{self.llama_cpp_gguf}: no program for --llama-cpp-gguf; pass --llama-cpp-bin",
            ),
            (
                self.n_gpu_layers > 0 and not (dense or llama_cpp),
                f"--n-gpu-layers {self.n_gpu_layers} is for dense models; pass --dense-gguf",
            ),
            (
                budget and not real,
                f"--vram-budget {self.vram_budget} is for PowerInfer; pass --powerinfer-bin",
            ),
            (
                budget and self.vram_budget_bytes == 0,
                f"--vram-budget {self.vram_budget} is no memory; pass a size such as 24GiB",
            ),
            (
                (self.resume or self.force) and self.out is None,
                "nothing is kept without a directory; pass --out with --resume or --force",
            ),
            (self.resume and self.force, "--resume goes on, --force begins anew; pass one of them"),
            (
                not self.timeout > 0,
                f"--timeout {self.timeout:g} is too short; pass seconds above 0",
            ),
        ]

    @property
    def llama_cpp_file(self) -> Path | None:
        """The dense model for llama.cpp."""
        return self.llama_cpp_gguf or self.dense_gguf

    @property
    def vram_budget_bytes(self) -> int | None:
        """VRAM for PowerInfer, bytes."""
        return None if self.vram_budget is None else parse_size(self.vram_budget)

    def document(self) -> dict[str, Any]:
        """Return the settings as a result records them, ready for JSON."""
        return {
            key: str(value) if isinstance(value, Path) else value
            for key, value in asdict(self).items()
            if key not in _NOT_MEASURED
        }

    def identity(self) -> dict[str, Any]:
        """Return the settings that must be the same for a benchmark to go on."""
        return {key: value for key, value in self.document().items() if key not in _BESIDE}
