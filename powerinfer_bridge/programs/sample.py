"""What a program is, and what a run of it measured, whatever the program."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from common.typed_json import Positive, Range
from powerinfer_bridge.programs.process import Finished


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a run: processing the prompt, or decoding.

    Attributes:
        seconds: its duration.
        tokens: tokens evaluated in it.
    """

    seconds: Positive
    tokens: Annotated[int, Range(1)]

    @property
    def tokens_per_second(self) -> float:
        """Speed of the phase."""
        return self.tokens / self.seconds


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a program told of one run of one prompt.

    Attributes:
        text: continuation without the prompt; None if the program prints none.
        load_seconds: reading the file; None if not told.
        prompt: processing the prompt; None if not measured.
        decode: decoding.
        notes: what a reader of the figures must know.
        device: what it said about devices, a key missing if it said nothing. Of all: `cuda` (bool);
            `gpus` (names). Of PowerInfer: `vram_budget_bytes`, `vram_used_bytes`, `kv_vram_bytes`,
            `layers_offloaded` (`3/32`), `ffn_offloaded_bytes`. Of llama-bench: `backends`,
            `cpu_info`, `n_gpu_layers`, `model_type`, `build_commit`, `build_number`. Of the second
            engine: `active_share` of the neurons, prompt and warm-up included.
    """

    text: str | None = None
    load_seconds: float | None
    prompt: Phase | None
    decode: Phase
    notes: tuple[str, ...] = ()
    device: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunSample(Measured):
    """A finished run.

    Attributes:
        wall_seconds: from before the program's start to after its end; some hundredths of a second
            are psp's own.
        command: the program and its arguments.
        environment: variables that were set for it.
    """

    wall_seconds: float
    command: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Finished, measured: Measured) -> RunSample:
        """Return what was measured together with how the program was run."""
        return cls(
            **vars(measured),
            wall_seconds=run.seconds,
            command=run.command,
            environment=run.environment,
        )


@dataclass(frozen=True, kw_only=True)
class ProgramFacts:
    """What a program is.

    Attributes:
        path: the program.
        kind: whose it is.
        version: what it says of its version or commit; None if nothing.
        cuda: whether it was built with CUDA; None if it does not tell.
    """

    path: Path
    kind: Literal["powerinfer", "second engine", "llama.cpp", "llama-cpp-python"]
    version: str | None
    cuda: bool | None

    @property
    def exact_threads(self) -> int:
        """Most threads with which PowerInfer's sums are those of one thread.

        More of them add their neurons to the same numbers without a lock and overwrite each other's
        (PowerInfer@d3ebd7c:ggml.c:ggml_compute_forward_mul_mat_axpy). With CUDA one thread drives
        the card and computes nothing.
        """
        return 2 if self.cuda else 1
