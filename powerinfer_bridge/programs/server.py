"""A PowerInfer build's `server`: started on this machine alone, asked over HTTP, always ended.

It is ended by `close`, at the end of psp's process, and by Linux where psp is killed (`launch`).
What it answers is read in `completion`. Source: PowerInfer@d3ebd7c examples/server/server.cpp.
"""

from __future__ import annotations

import atexit
import json
import socket
import tempfile
import time
import uuid
from collections.abc import Mapping
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from common.errors import EngineError
from gguf_export.pwri.memory_plan import vram_option
from powerinfer_bridge.programs.build import (
    THRESHOLD_VARIABLE,
    build_directory,
    require_executable,
    require_success,
)
from powerinfer_bridge.programs.process import (
    Finished,
    end_program,
    last_words,
    raise_unstarted,
    start_program,
)

SERVER = "server"
_HOST = "127.0.0.1"
_TICK = 0.05
_SAID = 64 * 1024
"""Bytes of what it printed last that are looked at."""
_BUSY, _PATIENCE = 0.02, 30.0
"""Seconds until a server that is still letting go of the last request is asked again, and how long
that is tried."""


def server_program(directory: Path) -> Path | None:
    """Return a build's server; None if it was not built."""
    program = build_directory(directory, (SERVER,)) / SERVER
    return program if program.is_file() else None


class Server:
    """A running server with one model and room for one request at a time."""

    def __init__(
        self,
        program: Path,
        model: Path,
        *,
        context: int,
        threads: int,
        threshold: float | None = None,
        vram_budget: int | None = None,
        timeout: float = 3600.0,
    ) -> None:
        """Start it and wait until it has loaded the model.

        Args:
            program: `server` of a build.
            model: PWRI file.
            context: tokens of a prompt and what follows it.
            threads: of the CPU.
            threshold: overrides the file's.
            vram_budget: bytes; None takes what is free. A build without CUDA ignores it.
            timeout: longest that loading, and later an answer, may take, seconds.

        Raises:
            EngineError: the program is not executable, does not start, refuses the model, or hangs.
        """
        require_executable(program, "build PowerInfer's target 'server'")
        self._timeout, self._start, self._name = timeout, time.monotonic(), uuid.uuid4().hex
        self._port, self._closed = _free_port(), False
        command = [str(program), "--model", str(model.resolve()), "--alias", self._name]
        command += ["--host", _HOST, "--port", str(self._port), "-c", str(context)]
        command += ["--threads", str(threads)]
        if vram_budget is not None:
            command += ["--vram-budget", vram_option(vram_budget)[0]]
        self._command = tuple(command)
        told = None if threshold is None else repr(threshold)
        self._directory = tempfile.TemporaryDirectory()
        self._log = Path(self._directory.name) / "server.log"
        with self._log.open("wb") as log:
            self._process = start_program(
                self._command,
                {THRESHOLD_VARIABLE: told},
                self._directory.name,
                stdout=log,
                stderr=log,
            )
        atexit.register(self.close)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        """Wait for an answer that can only be this server's."""
        while True:
            self._require_running()
            try:
                told = json.loads(self._call("GET", "/model.json", None, _TICK * 20)[1])
                if told["model"] == self._name:
                    return
            except (OSError, HTTPException, ValueError, LookupError, TypeError):
                pass
            if time.monotonic() - self._start > self._timeout:
                raise self._no_answer(self._timeout)
            time.sleep(_TICK)

    def complete(self, request: Mapping[str, Any]) -> bytes:
        """Return the body of the answer to a `/completion`.

        It is asked again while it answers that it is still busy with the last request, which it
        does for a moment after each.

        Raises:
            EngineError: the program ended, hangs, or refuses the request.
        """
        body, start = json.dumps(request), time.monotonic()
        patience = min(self._timeout, _PATIENCE)
        while time.monotonic() - start <= patience:
            try:
                status, answer = self._call("POST", "/completion", body, self._timeout)
            except TimeoutError as error:
                raise self._no_answer(self._timeout) from error
            except (OSError, HTTPException) as error:
                time.sleep(_TICK)  # it may be about to end
                self._require_running()
                raise EngineError(
                    f"{self._command[0]}: broke off its answer ({error or type(error).__name__})"
                    f"{last_words(self._said())}",
                    "run it by hand to see why",
                ) from error
            # A stream then holds nothing; else its words, `slot unavailable`, are replaced by
            # those for any status 404.
            if not answer or status == HTTPStatus.NOT_FOUND:
                time.sleep(_BUSY)
                continue
            if status != HTTPStatus.OK:
                said = answer.decode("utf-8", "replace")
                raise EngineError(
                    f"{self._command[0]}: answered with status {status}: {said}",
                    "build PowerInfer at d3ebd7c",
                )
            return answer
        raise self._no_answer(patience)

    def _call(self, method: str, path: str, body: str | None, timeout: float) -> tuple[int, bytes]:
        """Ask once; no proxy of the environment's is in between.

        Returns:
            Status and body.
        """
        connection = HTTPConnection(_HOST, self._port, timeout=timeout)
        try:
            connection.request(method, path, body, {"Connection": "close"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _require_running(self) -> None:
        code = self._process.poll()
        if code is None:
            return
        said = self._said()
        finished = Finished(
            command=self._command,
            environment={},
            code=code or 1,
            stdout="",
            stderr=said,
            seconds=time.monotonic() - self._start,
        )
        raise_unstarted(finished)
        require_success(finished)

    def _no_answer(self, seconds: float) -> EngineError:
        return EngineError(
            f"{self._command[0]}: no answer after {seconds:g} s{last_words(self._said())}",
            "allow it more time with --timeout, or run it by hand to see where it hangs",
        )

    def _said(self) -> str:
        """Return the end of what it printed."""
        try:
            with self._log.open("rb") as log:
                log.seek(max(0, self._log.stat().st_size - _SAID))
                return log.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def close(self) -> None:
        """End it; nothing happens the second time."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        end_program(self._process)
        self._process.wait()
        self._directory.cleanup()


def _free_port() -> int:
    """Return a port that nothing listens at now."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])
