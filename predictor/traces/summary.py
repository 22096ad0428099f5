"""A trace store as it is shown."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from common.provenance import PROVENANCE
from predictor.traces.store import TraceStore


def trace_summary(store: TraceStore) -> dict[str, Any]:
    """Return what a store was made from, how far it is and every recorded layer's sparsity.

    Raises:
        TraceError: a shard is missing or damaged.
    """
    header = asdict(store.header)
    sparsity = store.activation_sparsity() if store.rows else {}
    size = sum(size for name, size in store.place.sizes().items() if name != PROVENANCE)
    return {
        "traces": str(store),
        "complete": store.progress.complete,
        "tokens": store.rows,
        "tokens_asked": header.pop("tokens"),
        "documents": store.documents,
        "skipped_rows": store.progress.skipped_rows,
        "shards": len(store.progress.shards),
        "bytes": size,
        **{name: value for name, value in header.items() if name != "layers"},
        "activation_sparsity": sum(sparsity.values()) / len(sparsity) if sparsity else None,
        "layers": [
            {"layer": layer, "activation_sparsity": value} for layer, value in sparsity.items()
        ],
    }


def check_traces(store: TraceStore) -> dict[str, Any]:
    """Verify every committed file of a store.

    Raises:
        TraceError: naming the first file that is wrong.
    """
    store.check()
    return {
        "traces": str(store),
        "complete": store.progress.complete,
        "tokens": store.rows,
        "files": len(store.header.layers) * (1 + len(store.progress.shards)),
    }
