"""A Ray cluster that is started or reached for a command, and left as it was found."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from cluster.address import SAME_VERSIONS, found_address
from cluster.settings import LOCAL
from common.errors import ClusterError, reason
from common.scratch import Scratch
from common.version import package_version

_STORE_BYTES = 80 << 20
"""Of a local cluster's object store, about the least that Ray takes: results are files."""


@contextmanager
def reached(address: str, store: int = 0) -> Iterator[None]:
    """Let Ray be connected while the block runs.

    A cluster that this process is connected to already is used and stays so. One that is started
    here ends with the block, its processes and its temporary files too; a process that is killed
    takes it along, and the next one removes its files.

    Args:
        address: HOST:PORT, `auto`, or `local` to start one.
        store: bytes of its object store, if one is started; at least what Ray wants.

    Raises:
        ClusterError: there is none, or it cannot be joined.
    """
    if package_version("ray") is None:
        raise ClusterError("--ray needs Ray", "install it with: pip install 'psp[ray]'")
    import ray

    if ray.is_initialized():
        yield
    elif address == LOCAL:
        with _started(max(store, _STORE_BYTES)):
            yield
    else:
        found = found_address(address)
        with _connected(f"--ray {address}", SAME_VERSIONS, address=found):
            yield


@contextmanager
def _started(store: int) -> Iterator[None]:
    # A token of its own: Ray would write one into the user's home, for all clusters.
    own = {"RAY_AUTH_TOKEN": _token(), "RAY_USAGE_STATS_ENABLED": "0"}
    with (
        _environment(own),
        Scratch() as place,
        _connected(
            "--ray local",
            "if it is a path that is too long, set TMPDIR to a short one",
            address=LOCAL,
            include_dashboard=False,
            object_store_memory=store,
            _temp_dir=str(place),
        ),
    ):
        yield


@contextmanager
def _connected(asked: str, remedy: str, **settings: object) -> Iterator[None]:
    import ray
    from ray.exceptions import RayError

    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
    except (RayError, RuntimeError, ValueError, OSError) as error:
        ray.shutdown()
        raise ClusterError(f"{asked}: Ray does not start ({reason(error)})", remedy) from error
    try:
        with _silent():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _silent() -> Iterator[None]:
    """Keep what Ray says of dying workers, some pages each, out of the command's output."""
    import ray._private.worker as said

    before = said._worker_logs_enabled
    said._worker_logs_enabled = False
    try:
        with _environment({"RAY_IGNORE_UNHANDLED_ERRORS": "1"}):
            yield
    finally:
        said._worker_logs_enabled = before


@cache
def _token() -> str:
    """Return this process's token; Ray reads it once."""
    return secrets.token_hex(32)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Give this process, and those that it starts meanwhile, variables that they do not have.

    What Ray sets of its own is taken back too: it would hold for the next cluster.
    """
    before = dict(os.environ)
    os.environ.update({name: value for name, value in values.items() if name not in before})
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            if name not in before:
                del os.environ[name]
