"""The two sparse FFN operators of a gated ReLU FFN, exact and without a predictor: S2 and S3.

Given the gate's scores, `sparse_up` and `sparse_down` read only the weights of active neurons
(ProSparse, arXiv 2402.13516, "efficient GPU operators"). Names load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparse_operators.module import SparseGatedMLP
    from sparse_operators.operators import sparse_down, sparse_up, sparse_up_down

__all__ = ["SparseGatedMLP", "sparse_down", "sparse_up", "sparse_up_down"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    home = "module" if name == "SparseGatedMLP" else "operators"
    return getattr(importlib.import_module(f"sparse_operators.{home}"), name)
