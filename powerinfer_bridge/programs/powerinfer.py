"""A PowerInfer build's `main` and `perplexity`: called with its options, read back as figures."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import EngineError
from common.settings import POWERINFER_VARIABLE
from gguf_export.pwri.memory_plan import vram_option
from powerinfer_bridge.programs.build import (
    THRESHOLD_VARIABLE,
    build_directory,
    require_executable,
    require_success,
)
from powerinfer_bridge.programs.output import (
    NO_PROMPT,
    continuation,
    parse_main,
    parse_perplexity,
    parse_windows,
)
from powerinfer_bridge.programs.process import Finished, Heartbeat, run_program
from powerinfer_bridge.programs.sample import ProgramFacts, RunSample
from powerinfer_bridge.score import Score

_VERSION = re.compile(r"^main: (build = .*)$", re.MULTILINE)


class PowerInfer:
    """The programs of a PowerInfer build."""

    def __init__(
        self, directory: Path, *, timeout: float = 3600.0, heartbeat: Heartbeat | None = None
    ) -> None:
        """Find the programs.

        Args:
            directory: holds `main` and `perplexity`; `bin` or `build/bin` below it will do too.
            timeout: longest a single run may take, seconds.
            heartbeat: told while a program runs how many seconds it has run.

        Raises:
            EngineError: a program is missing or not executable.
        """
        found = build_directory(directory, ("main",))
        self._main, self._perplexity = found / "main", found / "perplexity"
        for program in (self._main, self._perplexity):
            require_executable(
                program,
                f"point --powerinfer-bin (or {POWERINFER_VARIABLE}) at a PowerInfer build's bin "
                "directory",
            )
        self._timeout, self._heartbeat = timeout, heartbeat

    def check(self, model: Path | None = None) -> ProgramFacts:
        """Start the programs, and say what they are.

        Args:
            model: file to load too, which takes the time that loading takes.

        Raises:
            EngineError: a program does not start, is a llama.cpp's, or refuses the model.
        """
        helps = [self._run(program, "--help") for program in (self._main, self._perplexity)]
        for text in helps:
            require_success(text)
            # The option that PowerInfer added; an old llama.cpp has programs of the same names.
            if "--vram-budget" not in text.stdout:
                raise EngineError(
                    f"{text.command[0]}: no PowerInfer, perhaps an old llama.cpp",
                    "point --llama-cpp-bin at that and --powerinfer-bin at a PowerInfer build",
                )
        # Both name themselves before they look for the file.
        options = ["-n", "1", "--vram-budget", "0", "--disable-gpu-index"]
        probe = self._run(self._main, *_model(model or Path("none")), *options)
        if model is not None:
            require_success(probe)
        version = _VERSION.search(probe.stderr)
        return ProgramFacts(
            path=self._main,
            kind="powerinfer",
            version=version[1].strip() if version else None,
            # Printed by builds with LLAMA_SUPPORTS_GPU_OFFLOAD (common/common.cpp).
            cuda="--n-gpu-layers" in helps[0].stdout,
        )

    def generate(
        self,
        model: Path,
        prompt: str,
        count: int,
        *,
        threads: int,
        context: int = 512,
        threshold: float | None = None,
        vram_budget: int | None = None,
        n_gpu_layers: int | None = None,
        seed: int = 0,
    ) -> RunSample:
        """Generate greedily, end-of-sequence tokens ignored.

        Args:
            model: PWRI file, or a dense GGUF file.
            prompt: text to continue.
            count: tokens to generate, at least 2: the first comes from processing the prompt and
                is in no decoding time.
            threads: CPU threads.
            context: room for prompt and continuation, tokens.
            threshold: overrides the file's.
            vram_budget: bytes, for a PWRI file; None takes what is free. A build without CUDA
                ignores it.
            n_gpu_layers: layers in VRAM, for a dense file, for which PowerInfer has no budget.
            seed: of the random numbers, which greedy decoding does not use.

        Raises:
            EngineError: the program failed, hung or printed no timings.
        """
        if count < 2:
            raise EngineError(f"{count} tokens: nothing would be timed", "generate at least 2")
        options = [*_model(model), "--prompt", prompt, "-n", str(count), "-c", str(context)]
        options += ["--threads", str(threads), "--seed", str(seed)]
        options += ["--temp", "0", "--repeat-penalty", "1.0", "--ignore-eos"]
        options += [] if n_gpu_layers is None else ["--n-gpu-layers", str(n_gpu_layers)]
        index = Path(f"{model.resolve()}.generated.gpuidx")
        before = _state(index)
        run = self._run(self._main, *options, *_budget(vram_budget), threshold=threshold)
        require_success(run)
        measured, (text, odd) = parse_main(run.stderr), continuation(run.stdout, prompt)
        notes = dict.fromkeys((*measured.notes, *odd))
        if _state(index) not in (before, None):
            notes["GPU index rebuilt"] = None
        if measured.decode.tokens != count - 1:
            notes[f"{measured.decode.tokens} tokens decoded, {count - 1} expected"] = None
        return RunSample.of(run, replace(measured, text=text, notes=tuple(notes)))

    def complete(
        self,
        model: Path,
        prompt: str,
        count: int,
        *,
        threads: int,
        context: int,
        threshold: float | None = None,
        vram_budget: int | None = None,
    ) -> str:
        """Return the text that follows a prompt greedily, up to the end-of-sequence token.

        Takes what `generate` takes; one token is enough, because nothing is timed.

        Raises:
            EngineError: the program failed, hung or did not print the prompt before the text.
        """
        options = [*_model(model), "--prompt", prompt, "-n", str(count), "-c", str(context)]
        options += ["--threads", str(threads), "--temp", "0", "--repeat-penalty", "1.0"]
        run = self._run(self._main, *options, *_budget(vram_budget), threshold=threshold)
        require_success(run)
        text, odd = continuation(run.stdout, prompt)
        if NO_PROMPT in odd:
            raise EngineError(f"{self._main}: {NO_PROMPT}", "run it by hand to see what it prints")
        return text

    def perplexity(
        self, model: Path, text: str, context: int, chunks: int | None, **options: Any
    ) -> float:
        """Return the perplexity of `score`, which takes the same."""
        return self.score(model, text, context, chunks, **options).perplexity

    def score(
        self,
        model: Path,
        text: str,
        context: int,
        chunks: int | None,
        *,
        threads: int,
        threshold: float | None = None,
        vram_budget: int | None = None,
    ) -> Score:
        """Score a text; see `powerinfer_bridge.engine.perplexity` for the windows.

        Raises:
            EngineError: the program failed, hung or printed no estimate.
        """
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "text.txt"
            file.write_bytes(text.encode("utf-8", "surrogateescape"))
            options = [*_model(model), "--file", str(file), "-c", str(context)]
            options += ["--threads", str(threads)]
            options += ["--chunks", str(-1 if chunks is None else chunks), *_budget(vram_budget)]
            run = self._run(self._perplexity, *options, threshold=threshold)
        require_success(run)
        return Score(perplexity=parse_perplexity(run.stdout), windows=parse_windows(run.stdout))

    def _run(self, program: Path, *options: str, threshold: float | None = None) -> Finished:
        """Run a program; a threshold in psp's own environment does not reach it."""
        return run_program(
            [str(program), *options],
            timeout=self._timeout,
            environment={THRESHOLD_VARIABLE: None if threshold is None else repr(threshold)},
            heartbeat=self._heartbeat,
        )


def _model(model: Path) -> list[str]:
    return ["--model", str(model.resolve())]


def _budget(vram_budget: int | None) -> list[str]:
    return [] if vram_budget is None else ["--vram-budget", vram_option(vram_budget)[0]]


def _state(index: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is written: size and time; None if there is no file."""
    try:
        found = index.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
