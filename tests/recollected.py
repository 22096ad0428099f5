"""Trace stores changed as if they had been collected so: every checksum fits what is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from xxhash import xxh3_128_hexdigest

from predictor.traces.names import shard_name
from predictor.traces.shard_file import _prefix
from predictor.traces.store import TraceStore, _joined


def recommit(path: Path, change: Callable[[Path, dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a store's shards."""
    store = TraceStore.open(path)
    shards = []
    for number, shard in enumerate(store.progress.shards):
        layout, digests = store._layout(shard.rows), []
        for layer in store.header.layers:
            file = path / shard_name(layer, number)
            tensors = load_file(file)
            change(file, tensors)
            parts = layout.parts(len(tensors["importance"]))
            data = b"".join(tensors[name].view(torch.uint8).numpy().tobytes() for name in parts)
            digests.append(xxh3_128_hexdigest(data))
            file.write_bytes(_prefix(layout, len(tensors["importance"]), digests[-1]) + data)
        shards.append(replace(shard, sha256=_joined(digests)))
    store._commit(shards=tuple(shards))
