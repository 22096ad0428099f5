"""Names of a store's files within its place."""

from __future__ import annotations

from pathlib import PurePosixPath

WEIGHTS = "weights.safetensors"


def layer_name(layer: int, name: str) -> str:
    """Return the name of a layer's file; of "" what the names of all of its files begin with."""
    return f"layer-{layer:02d}/{name}"


def shard_name(layer: int, number: int) -> str:
    """Return the name of the file of a layer's rows of a shard."""
    return layer_name(layer, f"shard-{number:05d}.safetensors")


def is_of_a_shard(name: str) -> bool:
    """Whether a file is a shard's, or one that was not finished."""
    file = PurePosixPath(name)
    return file.match("shard-*.safetensors") or file.match(".*.safetensors.part")
