"""A llama.cpp build's programs: `llama-bench`, else `llama-completion` or `llama-cli`."""

from __future__ import annotations

from pathlib import Path

from common.errors import EngineError
from powerinfer_bridge.programs.failures import require_success
from powerinfer_bridge.programs.finding import build_directory, require_dense, require_executable
from powerinfer_bridge.programs.llama_cpp_output import (
    Measured,
    has_cuda,
    parse_bench,
    parse_timings,
    parse_version,
)
from powerinfer_bridge.programs.process import Finished, Heartbeat, run_program
from powerinfer_bridge.programs.sample import ProgramFacts, RunSample

BINARY_VARIABLE = "PSP_LLAMA_CPP_BIN"
_PROGRAMS = ("llama-bench", "llama-completion", "llama-cli")
"""Best first: llama-bench times exact numbers of tokens, warmed up; the others a text."""


class LlamaCpp:
    """The programs of a llama.cpp build."""

    def __init__(
        self, directory: Path, *, timeout: float = 3600.0, heartbeat: Heartbeat | None = None
    ) -> None:
        """Find the programs.

        Args:
            directory: holds one of `llama-bench`, `llama-completion`, `llama-cli`; `bin` or
                `build/bin` below it will do too.
            timeout: longest a single run may take, seconds.
            heartbeat: told while a program runs how many seconds it has run.

        Raises:
            EngineError: none is there or it is not executable.
        """
        found = build_directory(directory, _PROGRAMS)
        held = (found / name for name in _PROGRAMS if (found / name).exists())
        self._program = next(held, found / _PROGRAMS[0])
        self._timeout, self._heartbeat = timeout, heartbeat
        require_executable(
            self._program,
            f"point --llama-cpp-bin (or {BINARY_VARIABLE}) at a llama.cpp build's bin directory",
        )

    def check(self) -> ProgramFacts:
        """Start the program, and say what it is.

        Raises:
            EngineError: it does not start, or is PowerInfer's, which has a `llama-bench` too.
        """
        self._refuse_powerinfer()
        require_success(self._run("--help"))
        # Older ones know neither option, and then do not tell.
        version, listed = self._run("--version"), self._run("--list-devices")
        return ProgramFacts(
            path=self._program,
            kind="llama.cpp",
            version=parse_version(version.stdout + version.stderr),
            cuda=None if listed.code else has_cuda(listed.stdout + listed.stderr),
        )

    def _refuse_powerinfer(self) -> None:
        main = self._program.parent / "main"
        if not main.is_file():
            return
        seen = run_program([str(main), "--help"], timeout=self._timeout)
        if "--vram-budget" in seen.stdout:
            raise EngineError(
                f"{self._program}: of a PowerInfer, not of a llama.cpp",
                "point --powerinfer-bin at it and --llama-cpp-bin at a llama.cpp build",
            )

    def bench(
        self, model: Path, prompt_tokens: int, count: int, *, threads: int, n_gpu_layers: int = 0
    ) -> RunSample:
        """Time a model once, on tokens of the program's choice.

        Args:
            model: GGUF file.
            prompt_tokens: tokens of the prompt; 0 times decoding alone.
            count: tokens to decode.
            threads: CPU threads.
            n_gpu_layers: layers on the GPU; 99 puts all there.

        Raises:
            EngineError: a sparse file; the program failed, hung or measured nothing.
        """
        if count < 2:
            raise EngineError(f"{count} tokens: nothing would be timed", "decode at least 2")
        require_dense(model)
        options = ["-m", str(model.resolve()), "-t", str(threads), "-ngl", str(n_gpu_layers)]
        if self._program.name == "llama-bench":
            sizes = ["-p", str(prompt_tokens), "-n", str(count), "-r", "1", "-o", "json"]
            run = self._run(*options, *sizes)
            if run.code:
                self._explain(run)
            return _sample(run, parse_bench(run.stdout, n_gpu_layers))
        run = self._run(*options, *self._generation(prompt_tokens, count))
        require_success(run)
        return _sample(run, parse_timings(f"{run.stdout}\n{run.stderr}", count))

    def _generation(self, prompt_tokens: int, count: int) -> list[str]:
        """Options for a greedy continuation of a prompt of about as many tokens."""
        single = "-no-cnv" if self._program.name == "llama-completion" else "--single-turn"
        # Two tokens for " a" at most, and a template's.
        sizes = ["-n", str(count), "-c", str(2 * prompt_tokens + count + 64)]
        prompt = ["-p", " a" * max(prompt_tokens, 1)]
        return [*sizes, *prompt, "--temp", "0", "--seed", "0", "--ignore-eos", single, "--perf"]

    def _explain(self, run: Finished) -> None:
        """Raise for a failed run; llama-bench tells why only if asked to (`-v`)."""
        again = self._run(*run.command[1:], "-v")
        require_success(again if again.code else run)
        raise AssertionError("a run that failed is no success")

    def _run(self, *options: str) -> Finished:
        return run_program(
            [str(self._program), *options], timeout=self._timeout, heartbeat=self._heartbeat
        )


def _sample(run: Finished, measured: Measured) -> RunSample:
    return RunSample(
        text=None,
        load_seconds=measured.load_seconds,
        prompt=measured.prompt,
        decode=measured.decode,
        wall_seconds=run.seconds,
        notes=measured.notes,
        device=measured.device,
        command=run.command,
        environment=run.environment,
    )
