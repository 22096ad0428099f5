"""PowerInfer's file contract as constants: marks, sizes, keys, and the names of tensors.

Source: PowerInfer@d3ebd7c llama.cpp:LLM_TENSOR_NAMES, LLM_KV_NAMES, llm_load_hparams and
ggml.c:gguf_init_from_file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from gguf_files.names import DOWN
from gguf_files.names import EMBEDDING as EMBEDDING
from gguf_files.names import HEAD as HEAD
from gguf_files.names import POSITIONS as POSITIONS

BLOCK = 32
"""Row sizes (d_model and rank) must be multiples of this."""

SMALLEST_D_FF = 1001
"""Up to 1000 neurons PowerInfer takes a kernel made for attention heads, which leaves out blocks of
128 neurons by another rule (ggml.c:ggml_compute_forward_mul_mat_sparse_head): wrong text."""

THRESHOLD_KEY = "powerinfer.sparse_threshold"
DENSE_THRESHOLD = -1e30
"""A threshold that computes every neuron: the dense ReLU model in the sparse engine."""

FC1 = "blk.{layer}.fc1.weight"
FC2 = "blk.{layer}.fc2.weight"

Role = Literal["embedding", "attention", "norm", "predictor", "ffn", "output"]


@dataclass(frozen=True)
class Stem:
    """What is true of all tensors of one stem, such as `attn_q` in `blk.3.attn_q.weight`.

    Attributes:
        role: what they are for.
        level: PowerInfer puts tensors into VRAM whole by rising level, within one by layer, and
            within that in the order of `STEMS` (llama.cpp:get_offloading_level). None for those
            that it does not: embeddings stay in main memory, an FFN goes neuron by neuron.
        per_layer: whether every layer has one, else there is one for all.
    """

    role: Role
    level: int | None
    per_layer: bool = True


STEMS = {
    "token_embd": Stem("embedding", None, per_layer=False),
    "position_embd": Stem("embedding", None, per_layer=False),
    "attn_norm": Stem("norm", 0),
    "attn_norm_2": Stem("norm", 0),
    "attn_q": Stem("attention", 0),
    "attn_k": Stem("attention", 0),
    "attn_v": Stem("attention", 0),
    "attn_qkv": Stem("attention", 0),
    "attn_output": Stem("attention", 0),
    "fc1": Stem("predictor", 1),
    "fc2": Stem("predictor", 1),
    "ffn_norm": Stem("norm", 2),
    "ffn_gate": Stem("ffn", None),
    "ffn_up": Stem("ffn", None),
    DOWN: Stem("ffn", None),
    "output_norm": Stem("norm", 3, per_layer=False),
    "output": Stem("output", 3, per_layer=False),
}
"""Every tensor that a sparse file may hold."""

_NAME = re.compile(r"(?:blk\.([0-9]{1,9})\.)?(.+?)(?:\.(weight|bias))?", re.DOTALL)
_NORM = re.compile(r"[a-z_]+_norm(_[0-9]+)?")


@dataclass(frozen=True)
class TensorName:
    """A tensor's name, taken apart.

    Attributes:
        layer: number of its layer; None for a tensor of no layer.
        stem: what lies between, such as `attn_q`.
        part: `weight` or `bias`; empty if the name ends otherwise.
    """

    layer: int | None
    stem: str
    part: str

    @property
    def known(self) -> Stem | None:
        """What is true of it; None if PowerInfer's sparse loader knows no such tensor."""
        stem = STEMS.get(self.stem)
        if stem is None or not self.part or stem.per_layer != (self.layer is not None):
            return None
        return stem

    @property
    def role(self) -> Role | None:
        """What it is for, told of others' tensors by llama.cpp's way of naming; None if unknown."""
        if self.known is not None:
            return self.known.role
        if self.part and _NORM.fullmatch(self.stem):
            return "norm"
        if self.layer is not None and self.stem.startswith("attn_"):
            return "attention"
        return "ffn" if self.layer is not None and self.stem.startswith("ffn_") else None

    @property
    def neurons(self) -> bool:
        """Whether it is a matrix of a sparse FFN, whose rows are neurons."""
        return self.part == "weight" and self.known is not None and self.known.role == "ffn"


def parse_name(name: str) -> TensorName:
    """Take a tensor's name apart, any text."""
    match = _NAME.fullmatch(name)
    if match is None:  # an empty name
        return TensorName(None, name, "")
    layer, stem, part = match.groups()
    return TensorName(None if layer is None else int(layer), stem, part or "")
