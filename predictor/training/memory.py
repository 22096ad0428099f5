"""What training a layer takes of a machine's memory."""

from __future__ import annotations

from predictor.traces.manifest import TraceHeader

_PROCESS = 512 << 20
"""Bytes of a process that has imported what training needs."""

_MATRICES = 32
"""Bytes for each entry of a gate matrix: itself as it is read and as it is computed with, scaled,
and what its decomposition holds."""

_ROWS, _LOGITS = 2048, 40
"""Rows that are computed together, and bytes for each of their logits."""

_STEPS, _TABLES = 64, 64
"""Thresholds of a neuron's curves, and bytes for each."""

_SAMPLE, _INPUTS = 32768, 16
"""Rows that starts are made of, and bytes for each entry of their inputs."""

_INDICES = 64
"""Bytes for each row of the traces: its places in orders, samples and parts."""


def layer_memory(header: TraceHeader, rows: int) -> int:
    """Return bytes that training a layer takes at most; shards themselves are mapped.

    Args:
        header: of the traces.
        rows: of the traces.
    """
    d_ff, d_model = header.d_ff, header.d_model
    neurons = d_ff * (_ROWS * _LOGITS + _STEPS * _TABLES)
    inputs = min(rows, _SAMPLE) * d_model * _INPUTS
    return _PROCESS + d_ff * d_model * _MATRICES + neurons + inputs + rows * _INDICES
