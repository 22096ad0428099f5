"""llama.cpp: a build's programs, best of them `llama-bench`, or the package llama-cpp-python."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common.errors import EXPORT_AGAIN, EngineError
from common.settings import LLAMA_CPP_VARIABLE
from common.typed_json import parse
from powerinfer_bridge.programs import llama_cpp_worker
from powerinfer_bridge.programs.build import build_directory, require_executable, require_success
from powerinfer_bridge.programs.output import (
    NO_GPU,
    has_cuda,
    parse_bench,
    parse_generation,
    parse_llama_perplexity,
    parse_version,
    parse_windows,
)
from powerinfer_bridge.programs.process import Finished, Heartbeat, run_program
from powerinfer_bridge.programs.sample import Measured, Phase, ProgramFacts, RunSample
from powerinfer_bridge.score import Score

_PERPLEXITY = "llama-perplexity"
_TRIES = 5
"""Runs until all of an output is there. llama.cpp@0c1e570 common/log.cpp: programs leave without
waiting for the thread that writes, so that one run in twelve ended well and lost its last lines."""

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
            f"point --llama-cpp-bin (or {LLAMA_CPP_VARIABLE}) at a llama.cpp build's bin directory",
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
        _require_timeable(model, count)
        options = ["-m", str(model.resolve()), "-t", str(threads), "-ngl", str(n_gpu_layers)]
        if self._program.name == "llama-bench":
            sizes = ["-p", str(prompt_tokens), "-n", str(count), "-r", "1", "-o", "json"]
            run = self._run(*options, *sizes)
            if run.code:
                self._explain(run)
            return RunSample.of(run, parse_bench(run.stdout, n_gpu_layers))
        for left in reversed(range(_TRIES)):
            run = self._run(*options, *self._generation(prompt_tokens, count))
            require_success(run)
            try:
                return RunSample.of(run, parse_generation(f"{run.stdout}\n{run.stderr}", count))
            except EngineError:
                if not left:
                    raise
        raise AssertionError("the last try returns or raises")

    def score(
        self,
        model: Path,
        text: str,
        context: int,
        chunks: int | None,
        *,
        threads: int,
        n_gpu_layers: int = 0,
    ) -> Score | None:
        """Score a text in PowerInfer's windows; None if the build has no `llama-perplexity`.

        Raises:
            EngineError: the program failed, hung or printed no estimate, nor when run again.
        """
        program = self._program.with_name(_PERPLEXITY)
        if not program.exists():
            return None
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "text.txt"
            file.write_bytes(text.encode("utf-8", "surrogateescape"))
            options = ["-m", str(model.resolve()), "-f", str(file), "-c", str(context)]
            options += ["-b", str(context), "--chunks", str(-1 if chunks is None else chunks)]
            options += ["-t", str(threads), "-ngl", str(n_gpu_layers)]
            for _ in range(_TRIES):
                run = run_program(
                    [str(program), *options], timeout=self._timeout, heartbeat=self._heartbeat
                )
                require_success(run)
                perplexity = parse_llama_perplexity(run.stdout, run.stderr)
                if perplexity is not None:
                    return Score(perplexity=perplexity, windows=parse_windows(run.stdout))
        raise EngineError(
            f"{program.name} did not print its estimate in {_TRIES} runs",
            "run it by hand to see why",
        )

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


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What `llama_cpp_worker` prints of the package, and of a run if it made one."""

    version: str
    gpu_offload: bool
    system_info: str
    load_seconds: float | None = None
    prompt_seconds: float | None = None
    decode_seconds: float | None = None
    windows: tuple[float, ...] = ()
    perplexity: float | None = None

    @property
    def cuda(self) -> bool:
        return "CUDA" in self.system_info


class LlamaCppPython:
    """The package, run in a Python of its own (`llama_cpp_worker`)."""

    def __init__(self, *, timeout: float = 3600.0, heartbeat: Heartbeat | None = None) -> None:
        """Look for the package.

        Args:
            timeout: longest a single run may take, seconds.
            heartbeat: told while a program runs how many seconds it has run.

        Raises:
            EngineError: it is not installed.
        """
        if importlib.util.find_spec("llama_cpp") is None:
            raise EngineError(
                "package llama_cpp: not installed",
                "pip install llama-cpp-python, or point --llama-cpp-bin at a llama.cpp build",
            )
        self._timeout, self._heartbeat = timeout, heartbeat

    def check(self) -> ProgramFacts:
        """Import the package, and say what it is.

        Raises:
            EngineError: it cannot be imported.
        """
        _, told = self._run()
        path, version = Path(sys.executable), told.version
        return ProgramFacts(path=path, kind="llama-cpp-python", version=version, cuda=told.cuda)

    def bench(
        self, model: Path, prompt_tokens: int, count: int, *, threads: int, n_gpu_layers: int = 0
    ) -> RunSample:
        """Time a model once; see `LlamaCpp.bench`.

        Raises:
            EngineError: the package failed, hung or measured nothing.
        """
        _require_timeable(model, count)
        tokens = {"prompt_tokens": prompt_tokens, "count": count}
        settings = {**tokens, "threads": threads, "n_gpu_layers": n_gpu_layers}
        run, told = self._run(str(model.resolve()), json.dumps(settings))
        prompt, decode = told.prompt_seconds, told.decode_seconds
        assert decode is not None  # the worker was told to measure
        measured = Measured(
            load_seconds=told.load_seconds,
            prompt=None if prompt is None else Phase(seconds=prompt, tokens=prompt_tokens),
            decode=Phase(seconds=decode, tokens=count),
            notes=(NO_GPU,) if n_gpu_layers and not told.gpu_offload else (),
            device={"cuda": told.cuda, "build": told.version},
        )
        return RunSample.of(run, measured)

    def score(
        self,
        model: Path,
        text: str,
        context: int,
        chunks: int | None,
        *,
        threads: int,
        n_gpu_layers: int = 0,
    ) -> Score:
        """Score a text; see `LlamaCpp.score`.

        Raises:
            EngineError: the package failed, hung or gave no perplexity.
        """
        settings = {"context": context, "chunks": chunks, "threads": threads}
        settings |= {"n_gpu_layers": n_gpu_layers}
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "text.txt"
            file.write_bytes(text.encode("utf-8", "surrogateescape"))
            _, told = self._run(str(model.resolve()), json.dumps(settings), str(file))
        if told.perplexity is None or not 0 < told.perplexity < math.inf:
            raise EngineError(
                f"{model}: its perplexity in llama.cpp is {told.perplexity}", EXPORT_AGAIN
            )
        return Score(perplexity=told.perplexity, windows=told.windows)

    def _run(self, *arguments: str) -> tuple[Finished, _Told]:
        run = run_program(
            [sys.executable, str(Path(llama_cpp_worker.__file__)), *arguments],
            timeout=self._timeout,
            heartbeat=self._heartbeat,
        )
        require_success(run)
        try:
            # The package may print before.
            return run, parse(_Told, json.loads(run.stdout.splitlines()[-1]))
        except (ValueError, IndexError) as error:
            raise EngineError(
                "package llama_cpp: printed no figures", "reinstall llama-cpp-python"
            ) from error


def _require_timeable(model: Path, count: int) -> None:
    """Do nothing if llama.cpp may be given a file, and tokens enough to be timed.

    Its programs would say what is wrong with a sparse file, but not reliably: they end before
    their logger has written.

    Raises:
        EngineError: the file cannot be read or is sparse, or fewer than 2 tokens.
    """
    if count < 2:
        raise EngineError(f"{count} tokens: nothing would be timed", "decode at least 2")
    try:
        with model.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise EngineError(
            f"{model}: cannot be read ({error.strerror or error})", "expected a dense GGUF file"
        ) from error
    if magic == b"PWRI":
        raise EngineError(
            f"{model}: a sparse file, which llama.cpp cannot read",
            "give it the dense one (psp export-gguf --dense)",
        )
