"""Real PowerInfer by its own programs: `server` for all requests, or `main` for texts alone.

What each of them can and cannot answer is in docs/evaluate-engines.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.errors import EngineError
from evaluation.backends.backend import (
    KINDS,
    Decoding,
    Prompt,
    RequestKind,
    Score,
    Scoring,
    Zeros,
)
from evaluation.backends.fit import room_for
from gguf_export.contract import OpenedFile
from powerinfer_bridge.programs.completion import EXTRA, LEAST_WRITTEN, Completion
from powerinfer_bridge.programs.powerinfer import PowerInfer
from powerinfer_bridge.programs.server import Server, server_program

_SERVER = "build its server too: cmake --build DIR --target server"


def find_programs(directory: Path) -> Path | None:
    """Return a build's server; None where `main` alone is there to answer.

    Raises:
        EngineError: neither is.
    """
    program = server_program(directory)
    if program is None:
        PowerInfer(directory)
    return program


def _exact_threads(directory: Path) -> int:
    """Return the most threads with which sums are exact; 2 where no `main` tells of CUDA.

    Both kinds of build run with 2; without CUDA they are then nearly exact.
    """
    try:
        programs = PowerInfer(directory)
    except EngineError:
        return 2
    return programs.check().exact_threads


class PowerInferBackend:
    """PowerInfer's programs with an exported file."""

    def __init__(
        self,
        path: Path,
        directory: Path,
        *,
        threads: int | None = None,
        threshold: float | None = None,
        vram_budget: int | None = None,
        timeout: float = 3600.0,
    ) -> None:
        """Start the server where the build has one, else make sure that `main` runs the file.

        Args:
            path: `*.powerinfer.gguf`.
            directory: holds the programs; `bin` or `build/bin` below it will do too.
            threads: of the CPU; None: as many as keep PowerInfer's sums exact.
            threshold: replaces the file's.
            vram_budget: bytes; None takes what is free. A build without CUDA ignores it.
            timeout: longest that a run, or an answer of the server, may take, seconds.

        Raises:
            FormatError: the file breaks the contract.
            EngineError: a program is missing, does not start, refuses the file, or hangs.
        """
        opened = OpenedFile(path)
        self._path, self._hyper, self._vocabulary = path, opened.hyper, opened.vocabulary
        threads = threads or _exact_threads(directory)
        self._threads, self._threshold, self._budget = threads, threshold, vram_budget
        self._server: Server | None = None
        program = find_programs(directory)
        if program is None:
            self._main = PowerInfer(directory, timeout=timeout)
            self._main.check(path)
            return
        self._server = Server(
            program,
            path,
            context=self.max_length + EXTRA,
            threads=threads,
            threshold=threshold,
            vram_budget=vram_budget,
            timeout=timeout,
        )
        self._completion = Completion(self._server, self._vocabulary)

    @property
    def kinds(self) -> Sequence[RequestKind]:
        """All with a server, texts alone without."""
        return ("generate_until",) if self._server is None else KINDS

    @property
    def why_not(self) -> str:
        """What is missing for log-likelihoods."""
        if self._server is not None:
            return ""
        return f"PowerInfer's main tells no probabilities; {_SERVER}"

    @property
    def max_length(self) -> int:
        """The file's context; with learned positions less by what the server writes beyond it."""
        context = self._hyper.context_length
        return context if self._hyper.graph.rotary else context - LEAST_WRITTEN

    def score(self, batch: Sequence[Scoring]) -> list[list[Score]]:
        """Score each request, a token at a time.

        Raises:
            EngineError: there is no server, it failed, or its answer cannot be read.
        """
        return [self._score(request) for request in batch]

    def _score(self, request: Scoring) -> list[Score]:
        if self._server is None:
            raise EngineError("PowerInfer's main tells no probabilities", _SERVER)
        self._require_room(len(request.ids))
        found = self._completion.score(request.ids, request.targets)
        return [
            Score(sum(token.log for token in tokens), all(token.greedy for token in tokens))
            for tokens in found
        ]

    def generate(self, batch: Sequence[Prompt], decoding: Decoding) -> list[str]:
        """Continue each prompt greedily.

        Raises:
            EngineError: a temperature above 0, or as for `score`; without a server also prompts
                that `main` would read as other ids.
        """
        if decoding.temperature != 0:
            raise EngineError(
                f"PowerInfer's programs draw otherwise than transformers: temperature "
                f"{decoding.temperature:g} would compare two samplers",
                "use temperature 0",
            )
        if self._server is None:
            return self._by_main(batch, decoding)
        return [self._continue(prompt.ids, decoding) for prompt in batch]

    def _continue(self, ids: tuple[int, ...], decoding: Decoding) -> str:
        self._require_room(len(ids))
        count = room_for(len(ids), decoding.max_new_tokens, self.max_length)
        return self._completion.continue_greedily(ids, count, decoding.stop) if count else ""

    def _by_main(self, batch: Sequence[Prompt], decoding: Decoding) -> list[str]:
        texts = [self._as_main_reads(prompt) for prompt in batch]
        told = [text for text in texts if text is not None]
        if len(told) < len(batch):
            raise EngineError(
                f"PowerInfer's main would read other ids of {len(batch) - len(told)} of "
                f"{len(batch)} prompts",
                _SERVER,
            )
        return [self._run(p, text, decoding) for p, text in zip(batch, told, strict=True)]

    def _as_main_reads(self, prompt: Prompt) -> str | None:
        """Return the text of which `main`, which adds no space, makes a prompt's ids, if any."""
        texts = (prompt.text, f" {prompt.text}")
        usable = (text for text in texts if "\0" not in text)
        same = (t for t in usable if self._vocabulary.prompt_ids(t) == list(prompt.ids))
        return next(same, None)

    def _run(self, prompt: Prompt, text: str, decoding: Decoding) -> str:
        self._require_room(len(prompt.ids))
        count = room_for(len(prompt.ids), decoding.max_new_tokens, self.max_length)
        if not count:
            return ""
        return self._main.complete(
            self._path,
            text,
            count,
            threads=self._threads,
            context=self.max_length + EXTRA,
            threshold=self._threshold,
            vram_budget=self._budget,
        )

    def _require_room(self, length: int) -> None:
        if length > self.max_length:
            raise EngineError(
                f"{length} tokens: PowerInfer's context is {self.max_length}", "shorten the request"
            )

    def zeros(self) -> Zeros | None:
        """Return None: PowerInfer does not tell."""
        return None

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.close()
