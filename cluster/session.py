"""A cluster that can do a command's work, with a place for what its workers write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os.path import exists
from pathlib import Path

from cluster.connection import reached
from cluster.nodes import Worker, alive_nodes, require_alike, require_room
from common.files import write_error
from common.scratch import Scratch
from common.units import GIB


def path_on_nodes(name: str) -> str:
    """Return a path that leads to the same from everywhere; what is none, such as a hub's name."""
    return str(Path(name).absolute()) if exists(name) else name


@contextmanager
def cluster_for(
    address: str,
    worker: Callable[[], Worker] | Worker,
    *,
    read: Sequence[Path],
    write: Path | None = None,
    note: Callable[[str], None],
    store: int = 0,
) -> Iterator[Worker]:
    """Start or reach a cluster, and make sure that it can do the work.

    Args:
        address: HOST:PORT, `auto`, or `local` to start one.
        worker: what a worker takes of a node, or what says so once the cluster is there.
        read: files that every node must see as they are here.
        write: what `parts_beside` gave, if workers write files.
        note: takes a line for the user.
        store: bytes of the object store, if one is started.

    Yields:
        What a worker takes.

    Raises:
        ClusterError: there is no cluster, or its nodes lack room, versions or files.
    """
    with reached(address, store):
        takes = worker if isinstance(worker, Worker) else worker()
        require_room(takes)
        require_alike(read, write)
        nodes = alive_nodes()
        gpus = f", {takes.gpus:g} GPUs" if takes.gpus else ""
        note(
            f"cluster: {len(nodes)} {'node' if len(nodes) == 1 else 'nodes'} with room for "
            f"{sum(map(takes.times, nodes))} workers of {takes.cpus} CPUs{gpus} and "
            f"{takes.memory / GIB:.1f} GiB"
        )
        yield takes


@contextmanager
def parts_beside(out: Path) -> Iterator[Path]:
    """Make a directory for workers' files, on the disk of what they will be part of.

    It is gone afterwards, with what is left in it.

    Raises:
        OutputError: the system refused.
    """
    target = out.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Scratch(target.parent, f".{target.name}.parts-")
    except OSError as error:
        raise write_error(out, error) from error
    with scratch as path:
        yield path
