"""Sizes and constants of an exported file, read as PowerInfer reads them (llm_load_hparams)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gguf import GGUFValueType

from common.errors import FormatError
from gguf_export.reader import GGUFFile
from gguf_export.schema import ACTIVATION_THRESHOLD_KEY, BLOCK, SMALLEST_D_FF, THRESHOLD_KEY

_UP_ACTIVATED = {"llama": False, "bamboo": True}
"""Architectures that the engine runs, and whether ReLU is applied to both halves of the FFN."""


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What the graph needs; names as in `architectures.spec.ModelShape`.

    `threshold` is the file's `powerinfer.sparse_threshold`; `up_activated` says that ReLU is
    applied to both halves of the FFN (dReLU); `activation_threshold` is FATReLU's, which tells
    active neurons but changes nothing that is computed.
    """

    name: str
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    context_length: int
    norm_eps: float
    rope_theta: float
    threshold: float
    up_activated: bool
    activation_threshold: float

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.d_model // self.n_heads


def read_hyperparameters(file: GGUFFile) -> Hyperparameters:
    """Read and check the keys of a sparse file of a LLaMA-like model.

    Raises:
        FormatError: a dense file, another architecture, a missing key or impossible sizes.
    """
    if not file.sparse:
        raise FormatError(
            f"{file.path}: magic is GGUF, a dense file; pass a *.powerinfer.gguf (magic PWRI)"
        )
    kind = file.value("general.architecture", GGUFValueType.STRING)
    if kind not in _UP_ACTIVATED:
        expected = " or ".join(map(repr, _UP_ACTIVATED))
        raise file.error(f"architecture {kind!r} is not supported, expected {expected}")

    def size(key: str) -> int:
        value: int = file.value(f"{kind}.{key}", GGUFValueType.UINT32)
        return value

    def real(key: str) -> float:
        value: float = file.value(key, GGUFValueType.FLOAT32)
        return value

    found = Hyperparameters(
        name=file.value("general.name", GGUFValueType.STRING),
        d_model=size("embedding_length"),
        d_ff=size("feed_forward_length"),
        n_layers=size("block_count"),
        n_heads=size("attention.head_count"),
        n_kv_heads=size("attention.head_count_kv"),
        context_length=size("context_length"),
        norm_eps=real(f"{kind}.attention.layer_norm_rms_epsilon"),
        rope_theta=real(f"{kind}.rope.freq_base"),
        threshold=real(THRESHOLD_KEY),
        up_activated=_UP_ACTIVATED[kind],
        # Files of other makers do not have it.
        activation_threshold=(
            real(ACTIVATION_THRESHOLD_KEY) if ACTIVATION_THRESHOLD_KEY in file.values else 0.0
        ),
    )
    _check(file, found)
    return found


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
    constants_fit = (
        0 <= found.norm_eps < 1
        and 0 < found.rope_theta < math.inf
        and not math.isnan(found.threshold)
        and 0 <= found.activation_threshold < math.inf
    )
    if not constants_fit:
        raise file.error(f"constants are impossible ({found})")
