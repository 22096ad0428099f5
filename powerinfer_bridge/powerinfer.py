"""Running a real PowerInfer: its `main` and `perplexity` programs, and what they print.

No shell is involved: paths go to the programs as single arguments. Output formats:
PowerInfer@d3ebd7c llama.cpp:llama_print_timings and examples/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import EngineError

BINARY_VARIABLE = "PSP_POWERINFER_BIN"
_THRESHOLD_VARIABLE = "LLAMA_SPARSE_PRED_THRESHOLD"
_TIMINGS = re.compile(
    r"llama_print_timings:\s+(?P<phase>sample|prompt eval|eval) time =\s+(?P<ms>[\d.]+) ms /"
    r"\s+(?P<count>\d+) (?:runs|tokens)"
)
_PERPLEXITY = re.compile(r"Final estimate: PPL = ([\d.]+|-?nan|inf)")


@dataclass(frozen=True)
class Timing:
    """One phase of a run.

    Attributes:
        seconds: its duration.
        count: tokens in it.
    """

    seconds: float
    count: int

    @property
    def tokens_per_second(self) -> float:
        """Speed of the phase."""
        return self.count / self.seconds


@dataclass(frozen=True)
class Run:
    """A finished run of `main`.

    Attributes:
        text: what it wrote to stdout, the prompt included.
        timings: by phase: `sample`, `prompt eval`, `eval`.
    """

    text: str
    timings: dict[str, Timing]


def parse_timings(output: str) -> dict[str, Timing]:
    """Return the phases of `llama_print_timings` lines.

    Raises:
        EngineError: no decoding line, or one with no token.
    """
    found = {
        match["phase"]: Timing(float(match["ms"]) / 1000, int(match["count"]))
        for match in _TIMINGS.finditer(output)
    }
    decoding = found.get("eval")
    if decoding is None or not decoding.count or not decoding.seconds:
        raise EngineError("PowerInfer printed no decoding time; run its main by hand to see why")
    return found


def parse_perplexity(output: str) -> float:
    """Return the final estimate of a `perplexity` run.

    Raises:
        EngineError: none was printed, or it is not a number.
    """
    match = _PERPLEXITY.search(output)
    if match is None:
        raise EngineError("PowerInfer's perplexity printed no final estimate; give it more text")
    value = float(match[1])
    if not 0 < value < float("inf"):
        raise EngineError(
            f"PowerInfer's perplexity is {match[1]}: it computed wrongly; export the file again"
        )
    return value


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"was ended by {names.get(-code, f'signal {-code}')}"


class PowerInfer:
    """The programs of a PowerInfer build."""

    def __init__(self, directory: Path, *, timeout: float = 3600.0) -> None:
        """Find the programs.

        Args:
            directory: holds `main` and `perplexity`; `bin` or `build/bin` below it will do too.
            timeout: longest a single run may take, seconds.

        Raises:
            EngineError: a program is missing or not executable.
        """
        places = [directory, directory / "bin", directory / "build" / "bin"]
        found = next((place for place in places if (place / "main").is_file()), directory)
        self._main, self._perplexity = found.resolve() / "main", found.resolve() / "perplexity"
        self._timeout = timeout
        for program in (self._main, self._perplexity):
            if not os.access(program, os.X_OK) or program.is_dir():
                raise EngineError(
                    f"{program}: no executable program; point --powerinfer-bin (or "
                    f"{BINARY_VARIABLE}) at a PowerInfer build's bin directory"
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
    ) -> Run:
        """Generate greedily, end-of-sequence ignored.

        Args:
            model: PWRI file.
            prompt: text to continue.
            count: tokens to generate.
            threads: CPU threads.
            context: room for prompt and continuation, tokens.
            threshold: overrides the file's.

        Raises:
            EngineError: the program failed, hung or printed no timings.
        """
        options = ["--model", str(model.resolve()), "--prompt", prompt, "-n", str(count)]
        options += ["--threads", str(threads), "--temp", "0", "--repeat-penalty", "1.0"]
        options += ["-c", str(context), "--seed", "0", "--ignore-eos", "--log-disable"]
        stdout, stderr = self._run([str(self._main), *options], threshold)
        return Run(stdout, parse_timings(stderr))

    def perplexity(
        self,
        model: Path,
        text: str,
        context: int,
        chunks: int | None,
        *,
        threads: int,
        threshold: float | None = None,
    ) -> float:
        """Score a text; see `powerinfer_bridge.perplexity` for the windows.

        Raises:
            EngineError: the program failed, hung or printed no estimate.
        """
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "text.txt"
            file.write_bytes(text.encode("utf-8", "surrogateescape"))
            options = ["--model", str(model.resolve()), "--file", str(file), "-c", str(context)]
            options += [
                "--threads",
                str(threads),
                "--chunks",
                str(-1 if chunks is None else chunks),
            ]
            stdout, _ = self._run([str(self._perplexity), *options], threshold)
        return parse_perplexity(stdout)

    def _run(self, command: list[str], threshold: float | None) -> tuple[str, str]:
        environment = {
            key: value for key, value in os.environ.items() if key != _THRESHOLD_VARIABLE
        }
        if threshold is not None:
            environment[_THRESHOLD_VARIABLE] = repr(threshold)
        program = Path(command[0])
        # The programs leave log files in the working directory: give them one that goes away.
        with tempfile.TemporaryDirectory() as directory:
            code, stdout, stderr = self._wait(command, environment, directory)
        if code:
            last = next((line for line in reversed(stderr.splitlines()) if line.strip()), "")
            said = f": {last.strip()}" if last else ""
            raise EngineError(f"{program}: {_ending(code)}{said}; run it by hand to see more")
        return stdout, stderr

    def _wait(
        self, command: list[str], environment: dict[str, str], directory: str
    ) -> tuple[int, str, str]:
        program = command[0]
        try:
            process = subprocess.Popen(
                command,
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            reason = error.strerror or str(error)
            raise EngineError(
                f"{program}: cannot be started ({reason}); build PowerInfer for this machine"
            ) from error
        with process:
            try:
                stdout, stderr = process.communicate(timeout=self._timeout)
            except subprocess.TimeoutExpired as error:
                raise EngineError(
                    f"{program}: no end after {self._timeout:g} s; run it by hand to see why"
                ) from error
            finally:
                # PowerInfer may have started programs of its own: end all that are left.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return (
            process.returncode,
            stdout.decode("utf-8", "replace"),
            stderr.decode("utf-8", "replace"),
        )
