"""New interpreters that have imported torch already, for what needs one: torch alone takes 2 s.

One process imports torch, and nothing else. It forks for each program; the fork runs it and ends as
any interpreter does, streams flushed and all.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

_SECONDS = 120
_SERVER = """
import json, os, socket, sys
import torch
line = socket.socket(fileno=int(sys.argv[1]))
while True:
    asked, streams, _, _ = socket.recv_fds(line, 1 << 20, 2)
    if not asked:
        os._exit(0)
    child = os.fork()
    if not child:
        break
    for stream in streams:
        os.close(stream)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    line.sendall(str(ended).encode())
line.close()
for number, stream in enumerate(streams, 1):
    os.dup2(stream, number)
    os.close(stream)
code, sys.argv[1:], environment, place = json.loads(asked)
os.environ.clear()
os.environ.update(environment)
os.chdir(place)
exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
"""


@dataclass(frozen=True)
class Readied:
    """Runs programs in forks of a process that has imported torch.

    Attributes:
        line: where that process takes programs and answers with exit codes.
    """

    line: socket.socket

    def __call__(
        self,
        code: str,
        *arguments: object,
        stdout: int | None = None,
        stderr: int | None = None,
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run code as `python -c` does; streams that are not given are read, as UTF-8."""
        given = [code, list(map(str, arguments)), os.environ | variables, os.getcwd()]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            files = [out.fileno() if stdout is None else stdout]
            files += [err.fileno() if stderr is None else stderr]
            socket.send_fds(self.line, [json.dumps(given).encode()], files)
            ended = int(self.line.recv(16))
            said = []
            for file in (out, err):
                file.seek(0)
                said.append(file.read().decode())
        return subprocess.CompletedProcess([code], ended, *said)


@pytest.fixture(scope="session")
def new_python() -> Iterator[Readied]:
    """Runs code in new interpreters in which torch is imported, and nothing else."""
    here, there = socket.socketpair(socket.AF_UNIX)
    with there:
        number = there.fileno()
        command = [sys.executable, "-c", _SERVER, str(number)]
        none, pipe = subprocess.DEVNULL, subprocess.PIPE
        # Pipes, for Python keeps in mind whether its streams could be gone back in.
        process = subprocess.Popen(command, stdin=none, stdout=pipe, stderr=pipe, pass_fds=[number])
    here.settimeout(_SECONDS)
    with process, here:  # it ends when its line is closed
        yield Readied(here)
