"""What shard files state of themselves where they begin, without a look at their rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from predictor.traces.objects import Objects
from predictor.traces.place import Directory, Place
from predictor.traces.shard_file import (
    ShardLayout,
    head_bytes,
    read_head,
    shard_counts,
    stated_digest,
)


def stated_digests(place: Place, shards: Mapping[str, ShardLayout]) -> Iterator[str]:
    """Yield the checksums that shard files state.

    Args:
        place: where they are.
        shards: names to sizes.

    Raises:
        TraceError: one is missing or damaged.
    """
    if isinstance(place, Directory):
        return (stated_digest(place.at(name)) for name in shards)
    return (digest for digest, _ in _heads(place, shards))


def stated_counts(place: Place, shards: Mapping[str, ShardLayout]) -> Iterator[torch.Tensor]:
    """Yield the (d_ff,) int64 counts of shard files, the only part that is read.

    Args:
        place: where they are.
        shards: names to sizes.

    Raises:
        TraceError: one is missing or damaged.
    """
    if isinstance(place, Directory):
        return (shard_counts(place.at(name)) for name in shards)
    return (counts for _, counts in _heads(place, shards))


def _heads(place: Place, shards: Mapping[str, ShardLayout]) -> Iterator[tuple[str, torch.Tensor]]:
    assert isinstance(place, Objects)
    heads = place.heads(list(shards), max(map(head_bytes, shards.values())))
    for (name, layout), head in zip(shards.items(), heads, strict=True):
        yield read_head(place.at(name), head, layout)
