"""llama.cpp through the package llama-cpp-python, where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from common.errors import EngineError
from powerinfer_bridge.programs import llama_cpp_worker
from powerinfer_bridge.programs.failures import require_success
from powerinfer_bridge.programs.finding import require_dense
from powerinfer_bridge.programs.process import Finished, Heartbeat, run_program
from powerinfer_bridge.programs.sample import Phase, ProgramFacts, RunSample


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
        _, found = self._run([])
        return ProgramFacts(
            path=Path(sys.executable),
            kind="llama-cpp-python",
            version=found["version"],
            cuda="CUDA" in found["system_info"],
        )

    def bench(
        self, model: Path, prompt_tokens: int, count: int, *, threads: int, n_gpu_layers: int = 0
    ) -> RunSample:
        """Time a model once; see `LlamaCpp.bench`.

        Raises:
            EngineError: the package failed, hung or measured nothing.
        """
        if count < 2:
            raise EngineError(f"{count} tokens: nothing would be timed", "decode at least 2")
        require_dense(model)
        settings = {"model": str(model.resolve()), "prompt_tokens": prompt_tokens, "count": count}
        settings |= {"threads": threads, "n_gpu_layers": n_gpu_layers}
        run, found = self._run([json.dumps(settings)])
        seconds = found["prompt_seconds"]
        ignored = n_gpu_layers and not found["gpu_offload"]
        return RunSample(
            text=None,
            load_seconds=found["load_seconds"],
            prompt=None if seconds is None else Phase(seconds=seconds, tokens=prompt_tokens),
            decode=Phase(seconds=found["decode_seconds"], tokens=count),
            wall_seconds=run.seconds,
            notes=("no GPU in this build or machine: -ngl ignored",) if ignored else (),
            device={"cuda": "CUDA" in found["system_info"], "build": found["version"]},
            command=run.command,
            environment=run.environment,
        )

    def _run(self, arguments: list[str]) -> tuple[Finished, dict[str, Any]]:
        run = run_program(
            [sys.executable, str(Path(llama_cpp_worker.__file__)), *arguments],
            timeout=self._timeout,
            heartbeat=self._heartbeat,
        )
        require_success(run)
        try:
            # The package may print before.
            found = json.loads(run.stdout.splitlines()[-1])
            return run, {**found}
        except (ValueError, IndexError, TypeError) as error:
            raise EngineError(
                "package llama_cpp: printed no figures", "reinstall llama-cpp-python"
            ) from error
