"""What is asked of a cluster's nodes before work begins: room, versions, and the same files."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ClusterError, reason
from common.files import sha256
from common.units import GIB
from common.version import package_version

_SAME = ("psp", "torch")
"""Packages whose versions are this machine's on every node."""

_SECONDS = 120
"""That a node has to start a process and to answer."""

_LOOK = 1.0
"""Seconds between two looks at which nodes are there."""

_NEWS = 5.0
"""Seconds until everybody knows of a node that died."""

_BEGINNING = 1 << 20
"""Bytes of a file that are compared."""

_SHARE = "use paths that every machine of the cluster sees under the same name"


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What a task takes of a node.

    Attributes:
        cpus: CPUs, and threads.
        gpus: GPUs.
        memory: bytes.
    """

    cpus: int
    gpus: float
    memory: int

    def times(self, node: Mapping[str, Any]) -> int:
        """Return how many workers a node, as Ray tells of it, could run at once."""
        has = node["Resources"]
        wanted = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}
        return min(int(has.get(name, 0) / amount) for name, amount in wanted.items() if amount)


def alive_nodes() -> list[dict[str, Any]]:
    """Return the nodes that are there, as Ray tells of them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def room_for(worker: Worker) -> int:
    """Return how many workers the nodes could run at once."""
    return sum(map(worker.times, alive_nodes()))


def require_room(worker: Worker) -> None:
    """Refuse tasks that no node can ever run.

    Raises:
        ClusterError: naming what the nodes lack.
    """
    nodes = alive_nodes()
    if any(worker.times(node) for node in nodes):
        return

    def most(name: str) -> float:
        return max((node["Resources"].get(name, 0) for node in nodes), default=0)

    raise ClusterError(
        f"no node of the cluster has {worker.cpus} CPUs, {worker.gpus:g} GPUs and "
        f"{worker.memory / GIB:.1f} GiB for a worker; the most are {most('CPU'):g}, "
        f"{most('GPU'):g} and {most('memory') / GIB:.1f}",
        "lower --ray-cpus or --ray-gpus, or add a node",
    )


def require_store(size: int) -> None:
    """Refuse nodes whose object stores are too small: Ray would go on with files, slowly.

    Args:
        size: bytes that a node may have to hold at once.

    Raises:
        ClusterError: naming the node.
    """
    for node in alive_nodes():
        held = node["Resources"].get("object_store_memory", 0)
        if held < size:
            raise ClusterError(
                f"node {node_name(node)}: its object store holds {held / GIB:.2f} GiB, stages hand "
                f"over up to {size / GIB:.2f}",
                f"start Ray there with --object-store-memory={size}",
            )


def node_name(node: Mapping[str, Any]) -> str:
    """Return what messages call a node."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def first_that_fits(*workers: Worker) -> Worker:
    """Return the first that a node has room for.

    Raises:
        ClusterError: no node has room for the last one.
    """
    nodes = alive_nodes()
    for worker in workers:
        if any(worker.times(node) for node in nodes):
            return worker
    require_room(workers[-1])
    return workers[-1]


def require_alike(read: Sequence[Path], write: Path | None) -> None:
    """Refuse nodes with other versions, or that do not see the same files.

    Args:
        read: files that every node must see as they are here; their sizes and beginnings are
            compared.
        write: a directory of this process's that every node must be able to write to, if any.

    Raises:
        ClusterError: naming the node.
    """
    stated = {str(path.absolute()): _looked_at(path) for path in read}
    here = {name: package_version(name) for name in _SAME}
    for name, found in _answers(stated, None if write is None else str(write.absolute())):
        for package, version in here.items():
            if found["versions"][package] != version:
                raise ClusterError(
                    f"node {name} has {package} {found['versions'][package] or 'not at all'}, this "
                    f"machine {version}",
                    "install the same on every node",
                )
        if found["unseen"]:
            raise ClusterError(f"node {name}: {found['unseen']}", _SHARE)
        try:
            if write is not None:
                (write / found["written"]).unlink()
        except OSError as error:
            raise ClusterError(
                f"node {name}: what it writes to {write} is not seen here", _SHARE
            ) from error


def _looked_at(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, sha256(file.read(_BEGINNING))


def _answers(
    stated: Mapping[str, tuple[int, str]], write: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of every node and what it found."""
    import ray
    from ray.exceptions import NodeDiedError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(_looker())
    nodes = alive_nodes()
    asked = [
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(_SAME, stated, _BEGINNING, write, node["NodeID"])
        for node in nodes
    ]
    waiting = dict(zip(asked, nodes, strict=True))
    deadline = time.monotonic() + _SECONDS
    while waiting:
        for reference in ray.wait(list(waiting), timeout=_LOOK)[0]:
            node = waiting.pop(reference)
            try:
                yield node_name(node), ray.get(reference)
            except NodeDiedError:
                continue
            except RayError as error:
                if not _has_died(node):
                    raise ClusterError(
                        f"node {node_name(node)} cannot run a task ({reason(error)})"
                    ) from error
        # Of a call that was on its way to a node which fell silent, Ray never tells.
        there = {node["NodeID"] for node in alive_nodes()}
        waiting = {call: node for call, node in waiting.items() if node["NodeID"] in there}
        if waiting and time.monotonic() > deadline:
            silent = node_name(next(iter(waiting.values())))
            raise ClusterError(f"node {silent} did not answer within {_SECONDS} s")


def _has_died(node: Mapping[str, Any]) -> bool:
    """Whether a node is gone, which its tasks know a little before the others do."""
    deadline = time.monotonic() + _NEWS
    while time.monotonic() < deadline:
        if node["NodeID"] not in {each["NodeID"] for each in alive_nodes()}:
            return True
        time.sleep(0.1)
    return False


def _looker() -> Any:
    """Return what a node does; as an inner function it runs also where there is no psp."""

    def look(
        packages: Sequence[str],
        stated: Mapping[str, tuple[int, str]],
        beginning: int,
        write: str | None,
        node: str,
    ) -> dict[str, Any]:
        import hashlib
        from importlib.metadata import PackageNotFoundError, version

        versions: dict[str, str | None] = {}
        for package in packages:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                versions[package] = None
        unseen, written = "", f"seen-{node}"
        try:
            for path, known in stated.items():
                with open(path, "rb") as file:
                    digest = hashlib.sha256(file.read(beginning)).hexdigest()
                    if (os.fstat(file.fileno()).st_size, digest) != tuple(known):
                        unseen = f"{path} is another file there"
            if write is not None:
                with open(os.path.join(write, written), "xb"):
                    pass
        except OSError as error:
            unseen = f"{error.filename or write}: {error.strerror}"
        return {"versions": versions, "unseen": unseen, "written": written}

    return look
