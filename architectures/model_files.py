"""The files of a model's weights, by everything that is in them.

`Checkpoint.fingerprint` looks at a sample, cheaply, and is the same for a model that was saved in
other files. This looks at all bytes, and can say nothing of other files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from architectures.checkpoint import Checkpoint
from common.errors import CheckpointError
from common.hashing import HashedFile, hash_files


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """Return the files that hold the model's tensors, by name."""
    return sorted(set(checkpoint.files.shards.values()))


@contextmanager
def hashed_meanwhile(checkpoint: Checkpoint) -> Iterator[Future[tuple[HashedFile, ...]]]:
    """Hash a model's files in a thread while the block does something else with them.

    Yields:
        The hashes, once they are there; asking for them waits.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(hash_files, weight_files(checkpoint))
        try:
            yield future
        finally:
            future.cancel()


def compare_files(
    checkpoint: Checkpoint,
    found: Sequence[HashedFile],
    known: Sequence[HashedFile],
    made: str | Path,
) -> str | None:
    """Refuse weights that have changed since something was made from them.

    Args:
        checkpoint: the model.
        found: its files.
        known: those that it had.
        made: what was made.

    Returns:
        A line if the files are others, of which nothing can be said; None if they are the same or
        nothing is known.

    Raises:
        CheckpointError: one of the same name and size holds something else.
    """
    if not known:
        return None
    sizes = [{file.name: file.bytes for file in files} for files in (found, known)]
    if sizes[0] != sizes[1]:
        return (
            f"{checkpoint.path}: its weights lie in other files than those that {made} was made "
            "from; only a sample of them was compared"
        )
    hashes = {file.name: file.xxh3_128 for file in known}
    for file in found:
        if file.xxh3_128 != hashes[file.name]:
            raise CheckpointError(
                f"{checkpoint.path}: {file.name} has changed since {made} was made from it",
                "fetch the model again, or collect and train for this one",
            )
    return None
