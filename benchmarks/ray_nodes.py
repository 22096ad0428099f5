"""Ray clusters on this machine: of one node, and of three of which all but the first may die."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

NODE: dict[str, Any] = {
    "num_cpus": 1,
    "object_store_memory": 80 << 20,
    "include_log_monitor": False,
}


_NOTICED = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 6,
}
"""A death within 3 s, instead of 15."""


class Nodes:
    """The cluster.

    Attributes:
        address: of its head, HOST:PORT.
    """

    def __init__(self) -> None:
        """Start the first; `fill` starts the others."""
        from ray.cluster_utils import Cluster

        head = NODE | {"include_dashboard": False, "no_monitor": True, "_system_config": _NOTICED}
        self._cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        self.address: str = self._cluster.address
        self._others: list[Any] = []
        self._silent: list[psutil.Process] = []

    def fill(self) -> None:
        """Start as many nodes as died."""
        while len(self._others) < 2:
            self._others.append(self._cluster.add_node(wait=False, **NODE))
        self._cluster.wait_for_nodes(timeout=60)

    def kill(self, chosen: random.Random) -> None:
        """Let a node die as by a loss of power."""
        node = self._others.pop(chosen.randrange(2))
        self._cluster.remove_node(node, allow_graceful=False)

    def hang(self, chosen: random.Random) -> None:
        """Let a node fall silent, as if its cable were drawn."""
        node = self._others.pop(chosen.randrange(2))
        for started in node.all_processes.values():
            for each in started:
                process = psutil.Process(each.process.pid)
                self._silent += [process, *process.children(recursive=True)]
        for process in self._silent:
            process.suspend()

    def close(self) -> None:
        """End all processes."""
        for process in self._silent:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._cluster.shutdown()


@contextmanager
def three_nodes() -> Iterator[Nodes]:
    """Start the cluster, and leave nothing of it."""
    place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets' names must be short
    given = {"RAY_TMPDIR": place, "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    before = {name: os.environ.get(name) for name in given}
    os.environ |= given
    try:
        nodes = Nodes()
        try:
            nodes.fill()
            yield nodes
        finally:
            nodes.close()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def cluster_of(cpus: int) -> Iterator[None]:
    """Let this process be connected to a cluster of its own."""
    import ray

    place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    os.environ["RAY_AUTH_TOKEN"] = "0" * 64
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=place,
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(place, ignore_errors=True)
