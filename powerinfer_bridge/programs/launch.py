"""Becomes a program that dies with psp: run as `python launch.py PARENT PROGRAM [ARGUMENT…]`.

psp itself ends its programs on every exit that it lives to see. SIGKILL leaves it no time, so Linux
is asked to do it (prctl(2), PR_SET_PDEATHSIG, which outlives execve). Asking between fork and exec
inside psp would run Python in the child of a process with threads; a program of its own is sound.
Programs that the program has started are not reached this way, and other systems have no such call.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

CANNOT_START = 126
MARK = "psp cannot start the program: "
_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> int:
    """Replace this process by a program; return an exit code if that cannot be done."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before it could be watched
            return CANNOT_START
    try:
        os.execv(command[0], command)
    except OSError as error:
        print(f"{MARK}{error.strerror or error}", file=sys.stderr)
        return CANNOT_START


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
