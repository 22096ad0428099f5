"""Sizes and constants of an exported file, read as PowerInfer reads them (llm_load_hparams)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gguf import GGUFValueType

from architectures.rope import RopeScaling
from common.errors import FormatError
from gguf_export.pwri.graph import GRAPHS, Graph
from gguf_export.pwri.reader import GGUFFile
from gguf_export.pwri.schema import ACTIVATION_THRESHOLD_KEY, BLOCK, SMALLEST_D_FF, THRESHOLD_KEY


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What the engine needs; names as in `architectures.spec.ModelShape`.

    `graph` is the architecture's; `two_norms` says that attention has a norm beside the FFN's
    (Falcon-40B); `norm_eps` is 0 and `rope_theta` is 0 where the graph has none; `threshold` is the
    file's `powerinfer.sparse_threshold`; `activation_threshold` is FATReLU's, which tells active
    neurons but changes nothing that is computed.
    """

    name: str
    graph: Graph
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    two_norms: bool
    context_length: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    threshold: float
    activation_threshold: float

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.d_model // self.n_heads


def read_hyperparameters(file: GGUFFile) -> Hyperparameters:
    """Read and check the keys of a sparse file.

    Raises:
        FormatError: a dense file, another architecture, a missing key or impossible sizes.
    """
    if not file.sparse:
        raise FormatError(
            f"{file.path}: magic is GGUF, a dense file", "pass a *.powerinfer.gguf (magic PWRI)"
        )
    kind = file.value("general.architecture", GGUFValueType.STRING)
    if kind not in GRAPHS:
        expected = " or ".join(map(repr, GRAPHS))
        raise file.error(f"architecture {kind!r} is not supported, expected {expected}")
    graph = GRAPHS[kind]

    def size(key: str) -> int:
        value: int = file.value(f"{kind}.{key}", GGUFValueType.UINT32)
        return value

    def real(key: str) -> float:
        value: float = file.value(key, GGUFValueType.FLOAT32)
        return value

    found = Hyperparameters(
        name=file.value("general.name", GGUFValueType.STRING),
        graph=graph,
        d_model=size("embedding_length"),
        d_ff=size("feed_forward_length"),
        n_layers=size("block_count"),
        n_heads=size("attention.head_count"),
        n_kv_heads=size("attention.head_count_kv"),
        two_norms=graph.parallel and "blk.0.attn_norm_2.weight" in file.tensors,
        context_length=size("context_length"),
        norm_eps=real(f"{kind}.{graph.norm_key}") if graph.norm_key else 0.0,
        rope_theta=real(f"{kind}.rope.freq_base") if graph.rotary else 0.0,
        rope_scaling=_scaling(file, kind, graph) if graph.rotary else None,
        threshold=real(THRESHOLD_KEY),
        # Files of other makers do not have it.
        activation_threshold=_optional(file, ACTIVATION_THRESHOLD_KEY, GGUFValueType.FLOAT32, 0.0),
    )
    _check(file, found)
    return found


def _optional(file: GGUFFile, key: str, kind: GGUFValueType, default: Any) -> Any:
    return file.value(key, kind) if key in file.values else default


def _scaling(file: GGUFFile, kind: str, graph: Graph) -> RopeScaling | None:
    """Read what scales rotary positions, with PowerInfer's defaults."""
    prefix = f"{kind}.rope.scaling"
    name = _optional(file, f"{prefix}.type", GGUFValueType.STRING, "linear")
    if name not in ("none", "linear", "yarn"):
        raise file.error(f"{prefix}.type is {name!r}, expected 'none', 'linear' or 'yarn'")
    factor = _optional(file, f"{prefix}.factor", GGUFValueType.FLOAT32, 1.0)
    if not 0 < factor < math.inf:
        raise file.error(f"{prefix}.factor is {factor:g}, expected a number above 0")
    if factor == 1 or name == "none":
        return None
    if not graph.scalable:
        raise file.error(f"{prefix}.factor is {factor:g}; PowerInfer scales {kind} twice")
    if name == "linear":
        return RopeScaling(kind="linear", factor=factor)
    trained: int = file.value(f"{kind}.context_length", GGUFValueType.UINT32)
    key = f"{prefix}.original_context_length"
    context = _optional(file, key, GGUFValueType.UINT32, trained) or trained
    if not context:
        raise file.error(f"{key} is 0")
    return RopeScaling(kind="yarn", factor=factor, original_context=context)


def _check(file: GGUFFile, found: Hyperparameters) -> None:
    heads_fit = (
        found.n_heads > 0
        and found.n_kv_heads > 0
        and found.d_model % (2 * found.n_heads) == 0
        and found.n_heads % found.n_kv_heads == 0
    )
    sizes_fit = found.d_model and found.n_layers and found.context_length
    if not (heads_fit and sizes_fit) or found.d_model % BLOCK or found.d_ff < SMALLEST_D_FF:
        raise file.error(f"sizes do not fit together ({found})")
    if found.n_layers > len(file.tensors):
        raise file.error(f"block_count is {found.n_layers}, more than there are tensors")
    constants_fit = (
        0 <= found.norm_eps < 1
        and (0 < found.rope_theta < math.inf or not found.graph.rotary)
        and (found.rope_scaling is None or found.rope_theta > 1)
        and not math.isnan(found.threshold)
        and 0 <= found.activation_threshold < math.inf
    )
    if not constants_fit:
        raise file.error(f"constants are impossible ({found})")
