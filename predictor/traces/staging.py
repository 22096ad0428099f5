"""Files of a store: those that another process writes beside it, for the store to count later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from common.files import flush_to_disk
from predictor.tensor_files import save_tensors
from predictor.traces.rows import LayerWeights
from predictor.traces.shard_file import ShardLayout, ShardWriter


@dataclass(frozen=True)
class StagedFile:
    """A layer of a shard, or its weights, whole and on disk.

    Attributes:
        file: where it is.
        digest: `ShardWriter.digest`, or what `write_weights` returned.
    """

    file: Path
    digest: str


def write_weights(file: Path, weights: LayerWeights) -> str:
    """Write a layer's weights, the gate as float16, whole or not at all.

    Returns:
        XXH3 of the file, 128 bits, hexadecimal.

    Raises:
        OutputError: the system refused.
    """
    return save_tensors(file, {"gate": weights.gate.half(), "down_norms": weights.down_norms})


def stage_weights(directory: Path, layer: int, weights: LayerWeights) -> StagedFile:
    """Write a layer's weights under a name that no other attempt at it has.

    Raises:
        OutputError: the system refused.
    """
    file = directory / f"weights-layer-{layer:02d}-{uuid4().hex}"
    return StagedFile(file, write_weights(file, weights))


@contextmanager
def stage_shard(
    directory: Path, number: int, layers: Iterable[int], layout: ShardLayout
) -> Iterator[tuple[dict[int, ShardWriter], dict[int, StagedFile]]]:
    """Write a shard's files, under names that no other attempt at it has.

    Args:
        directory: on the disk of the store.
        number: of the shard.
        layers: that it is written of.
        layout: its sizes.

    Yields:
        Layer number to writer, and to what there is once the block has ended without an exception;
        else nothing is left.

    Raises:
        OutputError: the system refused.
    """
    attempt = uuid4().hex
    files = {each: directory / f"shard-{number:05d}-layer-{each:02d}-{attempt}" for each in layers}
    made: dict[int, StagedFile] = {}
    try:
        with ExitStack() as stack:
            writers = {
                layer: stack.enter_context(ShardWriter(file, layout))
                for layer, file in files.items()
            }
            yield writers, made
        for layer, file in files.items():
            flush_to_disk(file)
            made[layer] = StagedFile(file, writers[layer].digest)
    except BaseException:
        for file in files.values():
            file.unlink(missing_ok=True)
        raise
