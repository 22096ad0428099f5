"""A build of PowerInfer's second engine: called with its options, read back as figures.

It is a fork of llama.cpp in the folder smallthinker/, whose programs keep their names and options.
Source: PowerInfer@d3ebd7c smallthinker/tools/main/main.cpp, common/arg.cpp,
tools/perplexity/perplexity.cpp, powerinfer/fused_sparse_moe/fused_sparse_moe.cpp.

llama-bench decodes tokens by chance, which make more neurons active than a text does, so a prompt
is continued instead.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path

from common.errors import EngineError
from common.settings import SECOND_ENGINE_VARIABLE
from powerinfer_bridge.programs.build import build_directory, require_executable, require_success
from powerinfer_bridge.programs.output import (
    parse_generation,
    parse_llama_perplexity,
    parse_windows,
)
from powerinfer_bridge.programs.process import Finished, Heartbeat, last_words, run_program
from powerinfer_bridge.programs.sample import ProgramFacts, RunSample
from powerinfer_bridge.score import Score

MOST_THREADS = 8
"""With more it writes past its sums and crashes (fused_sparse_moe.cpp:max_n_threads)."""

_PROGRAMS = ("llama-cli", "llama-perplexity")
_COUNTED = re.compile(
    r"^fused_sparse_moe: #examined=(\d+), .*#activated=(\d+) \(.*\)\n?\Z", re.MULTILINE
)
"""What the engine prints at its end, if it computed a sparse FFN."""

_BUILT = re.compile(r"^version: (.*)$", re.MULTILINE)
_AMX = re.compile(r"\bAMX_INT8 = 1\b")
_RIGHT_BATCH = 16
"""Tokens of a prompt that are computed at once in a build with AMX, whose kernel multiplies 32
tokens with wrong weights of Q4_0 (ggml/src/ggml-cpu/amx/mmq.cpp:tinygemm_kernel_amx)."""

AMX_NOTE = (
    f"built with AMX, whose Q4_0 kernel is wrong for 32 tokens at once: run with -ub {_RIGHT_BATCH}"
)


class SecondEngine:
    """The programs of a build."""

    def __init__(
        self, directory: Path, *, timeout: float = 3600.0, heartbeat: Heartbeat | None = None
    ) -> None:
        """Find the programs.

        Args:
            directory: holds `llama-cli` and `llama-perplexity`; `bin` or `build/bin` below it will
                do too.
            timeout: longest a single run may take, seconds.
            heartbeat: told while a program runs how many seconds it has run.

        Raises:
            EngineError: a program is missing or not executable.
        """
        found = build_directory(directory, _PROGRAMS)
        self._cli, self._perplexity = (found / name for name in _PROGRAMS)
        for program in (self._cli, self._perplexity):
            require_executable(
                program,
                f"point --second-engine-bin (or {SECOND_ENGINE_VARIABLE}) at the bin directory of "
                "a build of PowerInfer's folder smallthinker/",
            )
        self._timeout, self._heartbeat, self._amx = timeout, heartbeat, False

    def check(self, model: Path) -> ProgramFacts:
        """Load a model and decode a token of it, and say what the program is.

        Args:
            model: file of arch `smallthinker` with transposed down matrices.

        Raises:
            EngineError: the program does not start, refuses the model, or is a llama.cpp's.
        """
        version = self._run(self._cli, "--version")
        require_success(version)
        run = self._run(self._cli, *_generation(model, "a", 1, threads=1, context=64))
        if "wrong shape" in run.stderr or (not run.code and activity(run.stdout) is None):
            raise EngineError(
                f"{self._cli}: did not skip neurons of {model}, so it is a llama.cpp's",
                "point --llama-cpp-bin at that, and --second-engine-bin at a build of PowerInfer's "
                "folder smallthinker/",
            )
        require_success(run)
        self._amx = bool(_AMX.search(run.stderr))
        told = _BUILT.search(version.stdout + version.stderr)
        name = told[1].strip() if told else None
        return ProgramFacts(path=self._cli, kind="second engine", version=name, cuda=False)

    def generate(
        self, model: Path, prompt: str, count: int, *, threads: int, context: int, seed: int = 0
    ) -> RunSample:
        """Generate greedily, end-of-sequence tokens ignored.

        Args:
            model: see `check`; one whose down matrices are not transposed computes every neuron.
            prompt: text to continue.
            count: tokens to generate, at least 2: the first comes from processing the prompt and is
                in no decoding time.
            threads: CPU threads, at most `MOST_THREADS`.
            context: room for prompt and continuation, tokens.
            seed: of the random numbers, which greedy decoding does not use.

        Raises:
            EngineError: the program failed, hung or printed no timings; too many threads.
        """
        if count < 2:
            raise EngineError(f"{count} tokens: nothing would be timed", "generate at least 2")
        check_second_threads(threads)
        options = _generation(model, prompt, count, threads=threads, context=context)
        run = self._run(self._cli, *options, "--seed", str(seed), *self._batch())
        require_success(run)
        measured = parse_generation(run.stderr, count)
        notes = list(measured.notes) + ([AMX_NOTE] if self._amx else [])
        if measured.decode.tokens != count - 1:
            notes.append(f"{measured.decode.tokens} tokens decoded, {count - 1} expected")
        text, device = continued(run.stdout), dict(measured.device)
        active = activity(run.stdout)
        if active is not None:
            device["active_share"] = active
        return RunSample.of(run, replace(measured, text=text, notes=tuple(notes), device=device))

    def score(
        self, model: Path, text: str, context: int, chunks: int | None, *, threads: int
    ) -> Score:
        """Score a text in PowerInfer's windows; see `powerinfer_bridge.engine.perplexity`.

        Raises:
            EngineError: the program failed, hung or printed no estimate; too many threads.
        """
        check_second_threads(threads)
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "text.txt"
            file.write_bytes(text.encode("utf-8", "surrogateescape"))
            options = ["-m", str(model.resolve()), "-f", str(file), "-c", str(context)]
            options += ["-b", str(context), "--chunks", str(-1 if chunks is None else chunks)]
            run = self._run(self._perplexity, *options, "-t", str(threads), *self._batch())
        require_success(run)
        perplexity = parse_llama_perplexity(run.stdout, run.stderr, "PowerInfer's second engine")
        if perplexity is None:
            raise EngineError(
                f"{self._perplexity}: printed no estimate{last_words(run.stderr)}",
                "give it more text",
            )
        return Score(perplexity=perplexity, windows=parse_windows(run.stdout))

    def _batch(self) -> list[str]:
        return ["-ub", str(_RIGHT_BATCH)] if self._amx else []

    def _run(self, program: Path, *options: str) -> Finished:
        return run_program(
            [str(program), *options],
            timeout=self._timeout,
            # Else an assertion starts a debugger first.
            environment={"GGML_NO_BACKTRACE": "1"},
            heartbeat=self._heartbeat,
        )


def check_second_threads(threads: int) -> None:
    """Refuse a number of threads with which the engine crashes.

    Raises:
        EngineError: more than it has room for.
    """
    if threads > MOST_THREADS:
        raise EngineError(
            f"--threads {threads}: PowerInfer's second engine has room for {MOST_THREADS} and "
            "crashes with more",
            f"pass at most {MOST_THREADS}",
        )


def _generation(
    model: Path, prompt: str, count: int, *, threads: int, context: int
) -> tuple[str, ...]:
    """Options for a greedy continuation that is printed without the prompt before it."""
    options = ["-m", str(model.resolve()), "-p", prompt, "-n", str(count), "-c", str(context)]
    options += ["-t", str(threads), "--temp", "0", "--ignore-eos"]
    return (*options, "-no-cnv", "--no-display-prompt", "--no-escape")


def activity(stdout: str) -> float | None:
    """Return which share of the neurons a run found active, warm-up and prompt included.

    Returns:
        None where it computed no sparse FFN, such as a file whose down matrices are llama.cpp's.
    """
    found = _COUNTED.search(stdout)
    if found is None or not int(found[1]):
        return None
    return int(found[2]) / int(found[1])


def continued(stdout: str) -> str:
    """Return the text that a run printed, without what follows it: two line feeds, the counts."""
    return _COUNTED.sub("", stdout).removesuffix("\n").removesuffix("\n")
