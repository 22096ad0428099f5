"""Whether there is a cluster at an address that lets this machine in.

Ray waits without end where there is none, or one with another token, deaf to signals; so both are
tried here before, the second by a process that can be killed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from functools import cache

from cluster.settings import AUTO
from common.errors import ClusterError

_SECONDS = 5.0
"""That a cluster has to answer."""

_JOINING = 30.0
"""Seconds that a process has to join it."""

_JOIN = (
    "import sys, ray;ray.init(address=sys.argv[1], log_to_driver=False, logging_level='CRITICAL')"
)

_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_HEADER, _SETTINGS = 9, 4
"""Of an HTTP/2 frame: bytes of its header, and the kind that a server's first one is (RFC 9113)."""

SAME_VERSIONS = "the cluster's token, Python and Ray must be this one's"
START_ONE = "start one with 'ray start --head', or pass --ray local"


def found_address(address: str) -> str:
    """Return the HOST:PORT of a cluster that can be joined.

    Args:
        address: HOST:PORT, or `auto`.

    Raises:
        ClusterError: it is no address, there is no cluster, or it lets nobody from here in.
    """
    if "://" in address:
        raise ClusterError(
            f"--ray {address}: psp joins a cluster as one of its machines does",
            "run psp on one of them with --ray auto, or through 'ray job submit'",
        )
    found = _automatic() if address == AUTO else address
    host, port = _parts(found)
    try:
        answered = _greeted(host, port)
    except OSError as error:
        raise ClusterError(
            f"--ray {address}: no cluster at {found} ({error.strerror or error})", START_ONE
        ) from error
    if not answered:
        raise ClusterError(
            f"--ray {address}: what listens at {found} is no Ray cluster, or one that wants TLS",
            START_ONE,
        )
    _require_joinable(found)
    return found


def _automatic() -> str:
    from ray._private.services import get_ray_address_from_environment

    try:
        return str(get_ray_address_from_environment(AUTO, None))
    except ConnectionError as error:
        raise ClusterError("--ray auto: no cluster runs on this machine", START_ONE) from error


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise ClusterError(f"--ray {address}: is no HOST:PORT, {AUTO} or local")
    return host.strip("[]"), int(port)


@cache
def _require_joinable(address: str) -> None:
    """Let a process join a cluster; once for each."""
    command = [sys.executable, "-c", _JOIN, address]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_JOINING
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterError(
            f"--ray {address}: the cluster did not let this machine in within {_JOINING:g} s",
            "use the cluster's own token and TLS settings, on one of its machines",
        ) from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1]
        raise ClusterError(f"--ray {address}: cannot be joined ({said})", SAME_VERSIONS)


def _greeted(host: str, port: int) -> bool:
    """Return whether a gRPC server answers, which Ray's head is.

    Raises:
        OSError: nobody does.
    """
    with socket.create_connection((host, port), timeout=_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
            return True  # nothing is said before the certificates
        connection.sendall(_GREETING)
        header = b""
        while len(header) < _HEADER and (part := connection.recv(_HEADER - len(header))):
            header += part
    return len(header) == _HEADER and header[3] == _SETTINGS
