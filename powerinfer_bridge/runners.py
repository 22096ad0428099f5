"""The two engines behind one face, so that a benchmark need not know which it measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from powerinfer_bridge.engine import Engine
from powerinfer_bridge.generate import generate
from powerinfer_bridge.perplexity import engine_perplexity
from powerinfer_bridge.powerinfer import PowerInfer


@dataclass(frozen=True)
class Decoded:
    """A timed greedy continuation: its text without the prompt, and its decoding speed."""

    text: str
    tokens_per_second: float


class Runner(Protocol):
    """An engine with a file; `threshold` None means the file's own."""

    @property
    def name(self) -> str:
        """What it calls itself in results."""
        ...

    def perplexity(self, text: str, context: int, chunks: int, threshold: float | None) -> float:
        """Score a text over PowerInfer's windows."""
        ...

    def decode(self, prompt: str, count: int, threshold: float | None) -> Decoded:
        """Continue a prompt greedily by `count` tokens."""
        ...


@dataclass(frozen=True)
class EmbeddedRunner:
    """The embedded engine."""

    engine: Engine
    name: str = "embedded engine"

    def _at(self, threshold: float | None) -> Engine:
        return self.engine if threshold is None else self.engine.with_threshold(threshold)

    def perplexity(self, text: str, context: int, chunks: int, threshold: float | None) -> float:
        """See `Runner`."""
        kind = "sparse" if threshold is None else "dense"
        return engine_perplexity(self._at(threshold), text, context, chunks, f"perplexity, {kind}")

    def decode(self, prompt: str, count: int, threshold: float | None) -> Decoded:
        """See `Runner`."""
        done = generate(self._at(threshold), prompt, count)
        return Decoded(done.text, done.tokens_per_second)


@dataclass(frozen=True)
class PowerInferRunner:
    """Real PowerInfer on a file.

    Attributes:
        powerinfer: its programs.
        file: PWRI file.
        threads: CPU threads to decode with.
        room: tokens that prompt and continuation take.
    """

    powerinfer: PowerInfer
    file: Path
    threads: int
    room: int
    name: str = "PowerInfer"

    def perplexity(self, text: str, context: int, chunks: int, threshold: float | None) -> float:
        """See `Runner`; one thread, since its parallel sum is not exact (docs/powerinfer.md)."""
        return self.powerinfer.perplexity(
            self.file, text, context, chunks, threads=1, threshold=threshold
        )

    def decode(self, prompt: str, count: int, threshold: float | None) -> Decoded:
        """See `Runner`."""
        done = self.powerinfer.generate(
            self.file,
            prompt,
            count,
            threads=self.threads,
            context=self.room,
            threshold=threshold,
        )
        text = done.text.strip().removeprefix(prompt.strip())
        return Decoded(text, done.timings["eval"].tokens_per_second)
