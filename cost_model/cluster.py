"""Clusters: nodes of one kind of hardware, what connects them, and the file system they share."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from common.typed_json import Closed, Count, JsonError, Positive, Range, parse
from cost_model.hardware import Device, Hardware, HardwareError, load_hardware, read_yaml

_NAMED = re.compile(r"(\d{1,6})\s*[x×]\s*(\S.*)")
_OPTION = "--cluster"
_YAML = (".yaml", ".yml")
_MOST_NODES = 100_000
_GB = 1e9
_NETWORK, _WRITE, _READ = 12.5, 5.0, 10.0
"""Of a cluster that is only named, GB/s: 100 Gbit/s Ethernet, and a middling parallel file system.
Nobody measured them."""

_Speed = Annotated[float, Range(0, 1e6, open=True)]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes that are alike; bandwidths in bytes a second.

    Attributes:
        name: as it was asked for.
        hardware: of a node; if it has a GPU, a node has one such for each worker.
        nodes: their number.
        workers_per_node: processes that do items, each with a GPU or a part of the CPU.
        network: of a node, in either direction.
        write: to the shared file system, of all nodes together.
        read: from it, likewise.
        assumed: what nobody said, a line each.
    """

    name: str
    hardware: Hardware
    nodes: Count
    workers_per_node: Count
    network: Positive
    write: Positive
    read: Positive
    assumed: tuple[str, ...] = ()

    @property
    def workers(self) -> int:
        """All of them."""
        return self.nodes * self.workers_per_node

    @property
    def on_gpu(self) -> bool:
        """Whether workers have GPUs."""
        return self.hardware.gpu is not None

    @property
    def device(self) -> Device:
        """What computes: a worker's GPU, or the CPU that a node's workers share."""
        return self.hardware.gpu or self.hardware.cpu

    @property
    def compute(self) -> float:
        """Operations per second that a worker reaches in a model's layers.

        Raises:
            HardwareError: the hardware's description does not tell.
        """
        if self.device.compute is None:
            raise HardwareError(
                f"hardware {self.hardware.name} does not tell what {self.device.name} computes",
                "describe it in a YAML file with compute_tflop_per_s, see docs/estimate.md",
            )
        reached = self.device.compute * self.device.compute_efficiency
        return reached if self.on_gpu else reached / self.workers_per_node

    @property
    def memory(self) -> float:
        """Bytes of memory that a worker has to compute in."""
        return self.device.memory if self.on_gpu else self.device.memory / self.workers_per_node

    def of(self, nodes: int) -> Cluster:
        """Return a cluster of as many such nodes."""
        return replace(self, nodes=nodes)


@dataclass(frozen=True, kw_only=True)
class _StorageEntry(Closed):
    write_gb_per_s: _Speed = _WRITE
    read_gb_per_s: _Speed = _READ


@dataclass(frozen=True, kw_only=True)
class _ClusterEntry(Closed):
    hardware: str
    nodes: Annotated[int, Range(1, _MOST_NODES)]
    workers_per_node: Annotated[int, Range(1, 1024)] | None = None
    network_gb_per_s: _Speed | None = None
    storage: _StorageEntry | None = None


def load_cluster(name_or_path: str, threads: int = 1) -> Cluster:
    """Return the cluster of a name.

    Args:
        name_or_path: `N×HARDWARE`, also with an x, where HARDWARE is what `load_hardware` takes; or
            a YAML file of one's own.
        threads: CPU threads that `this` is measured with.

    Raises:
        HardwareError: it is neither, no such hardware, or a file that is damaged.
    """
    named = _NAMED.fullmatch(name_or_path.strip())
    if named is not None:
        nodes = int(named[1])
        if not 1 <= nodes <= _MOST_NODES:
            raise HardwareError(f"cluster {name_or_path!r}: expected 1 to {_MOST_NODES:,} nodes")
        return _cluster(_ClusterEntry(hardware=named[2], nodes=nodes), name_or_path, threads)
    path = Path(name_or_path)
    if path.suffix not in _YAML:
        raise HardwareError(
            f"cluster {name_or_path!r}: expected FILE.yaml or N×HARDWARE, such as 8xh100-80g"
        )
    try:
        entry = parse(_ClusterEntry, read_yaml(path, _OPTION))
    except JsonError as error:
        raise HardwareError(f"{path}: {error}", "mend the file") from error
    beside = path.parent / entry.hardware
    if beside.suffix in _YAML:
        entry = replace(entry, hardware=str(beside))
    return _cluster(entry, path.stem, threads)


def _cluster(entry: _ClusterEntry, name: str, threads: int) -> Cluster:
    hardware = load_hardware(entry.hardware, threads, _OPTION)
    workers = entry.workers_per_node
    storage = entry.storage or _StorageEntry()
    assumed = []
    if workers is None:
        workers = 1 if hardware.gpu else hardware.threads
        if workers is None:
            raise HardwareError(
                f"cluster {name}: hardware {hardware.name} has no GPU and tells no threads, so how "
                "many workers a node has is not known",
                "describe the cluster in a YAML file with workers_per_node",
            )
        each = "the one GPU" if hardware.gpu else "each CPU thread"
        assumed.append(f"a worker for {each} of a node")
    if entry.network_gb_per_s is None:
        assumed.append(f"a node's network carries {_NETWORK:g} GB/s")
    if entry.storage is None:
        assumed.append(f"the shared file system takes {_WRITE:g} GB/s and gives {_READ:g} in all")
    return Cluster(
        name=name,
        hardware=hardware,
        nodes=entry.nodes,
        workers_per_node=workers,
        network=(entry.network_gb_per_s or _NETWORK) * _GB,
        write=storage.write_gb_per_s * _GB,
        read=storage.read_gb_per_s * _GB,
        assumed=tuple(assumed),
    )
