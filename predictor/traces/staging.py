"""Files of a store: those that another process writes beside it, for the store to count later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from xxhash import xxh3_128_hexdigest

from common.errors import COLLECT_AGAIN, TraceError
from common.urls import Url
from predictor.tensor_files import tensor_bytes
from predictor.traces.place import Place
from predictor.traces.rows import LayerWeights
from predictor.traces.shard_file import ShardLayout, ShardWriter, read_tensors


@dataclass(frozen=True)
class StagedFile:
    """A layer of a shard, or its weights, whole and where a disk or an object store keeps it.

    Attributes:
        file: where it is.
        digest: `ShardWriter.digest`, or what `write_weights` returned.
    """

    file: Path | Url
    digest: str


def write_weights(place: Place, name: str, weights: LayerWeights) -> str:
    """Write a layer's weights, the gate as float16, whole or not at all.

    Returns:
        XXH3 of the file, 128 bits, hexadecimal.

    Raises:
        OutputError: the system, or the object store, refused.
    """
    data = tensor_bytes({"gate": weights.gate.half(), "down_norms": weights.down_norms})
    with place.writing(name) as [part]:
        part.write_bytes(data)
    return xxh3_128_hexdigest(data)


def read_weights(file: Path, digest: str | None, d_model: int, d_ff: int) -> LayerWeights:
    """Read what `write_weights` wrote.

    Args:
        file: to read.
        digest: what it returned, None where that is not known yet.
        d_model: hidden size.
        d_ff: neurons.

    Raises:
        TraceError: missing, damaged, or of other sizes.
    """
    tensors = read_tensors(file)
    if digest is not None and xxh3_128_hexdigest(file.read_bytes()) != digest:
        raise TraceError(f"{file}: checksum differs from the manifest's", COLLECT_AGAIN)
    for name, shape in (("gate", (d_ff, d_model)), ("down_norms", (d_ff,))):
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise TraceError(
                f"{file}: {name} has shape {found}, the manifest implies {shape}", COLLECT_AGAIN
            )
    return LayerWeights(tensors["gate"].float(), tensors["down_norms"])


def stage_weights(parts: Place, layer: int, weights: LayerWeights) -> StagedFile:
    """Write a layer's weights under a name that no other attempt at it has.

    Raises:
        OutputError: as `write_weights`.
    """
    name = f"weights-layer-{layer:02d}-{uuid4().hex}"
    return StagedFile(parts.at(name), write_weights(parts, name, weights))


@contextmanager
def stage_shard(
    parts: Place, number: int, layers: Iterable[int], layout: ShardLayout
) -> Iterator[tuple[dict[int, ShardWriter], dict[int, StagedFile]]]:
    """Write a shard's files, under names that no other attempt at it has.

    Args:
        parts: where to, of the kind of the store's place.
        number: of the shard.
        layers: that it is written of.
        layout: its sizes.

    Yields:
        Layer number to writer, and to what there is once the block has ended without an exception;
        else nothing is counted.

    Raises:
        OutputError: the system, or the object store, refused.
    """
    attempt = uuid4().hex
    names = {each: f"shard-{number:05d}-layer-{each:02d}-{attempt}" for each in layers}
    made: dict[int, StagedFile] = {}
    with parts.writing(*names.values()) as files, ExitStack() as stack:
        writers = {
            layer: stack.enter_context(ShardWriter(file, layout))
            for layer, file in zip(names, files, strict=True)
        }
        yield writers, made
    made |= {n: StagedFile(parts.at(name), writers[n].digest) for n, name in names.items()}
