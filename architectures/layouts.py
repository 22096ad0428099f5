"""How tensors lie in a GGUF file, other than in a checkpoint, and back.

What a family's rules call a transform is done here, in both directions.
"""

from __future__ import annotations

import torch

from architectures.spec import ModelShape, Transform


def to_file(weight: torch.Tensor, transform: Transform, model: ModelShape) -> torch.Tensor:
    """Return a checkpoint's tensor in the file's layout."""
    if transform == "permute_q":
        return permute_rope(weight, model.n_heads)
    if transform == "permute_k":
        return permute_rope(weight, model.n_kv_heads)
    if transform == "group_qkv":
        return group_qkv(weight, model)
    return weight.T if transform == "transpose" else weight


def from_file(weight: torch.Tensor, transform: Transform, model: ModelShape) -> torch.Tensor:
    """Return a file's tensor in the checkpoint's layout."""
    if transform == "permute_q":
        return unpermute_rope(weight, model.n_heads)
    if transform == "permute_k":
        return unpermute_rope(weight, model.n_kv_heads)
    if transform == "group_qkv":
        return ungroup_qkv(weight, model)
    return weight.T if transform == "transpose" else weight


def permute_rope(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows for ggml's RoPE, which rotates neighbouring pairs instead of halves.

    Row `h·D + c·D/2 + i` of Hugging Face's layout becomes row `h·D + 2i + c` (head h, half c, D the
    head size). Source: PowerInfer@d3ebd7c convert.py:permute.

    Args:
        weight: (heads · head size, columns).
        heads: heads in the rows.
    """
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def unpermute_rope(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo `permute_rope`."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def group_qkv(weight: torch.Tensor, model: ModelShape) -> torch.Tensor:
    """Reorder Falcon's fused rows: all queries, then all keys, then all values.

    In Hugging Face's layout every key/value head has its queries, its key and its value together.
    Source: PowerInfer@d3ebd7c convert-hf-to-powerinfer-gguf.py:FalconModel.write_tensors.

    Args:
        weight: ((n_heads + 2 · n_kv_heads) · head size, columns).
        model: gives the numbers of heads.
    """
    groups = weight.reshape(model.n_kv_heads, -1, model.head_dim, weight.shape[1])
    parts = groups[:, :-2], groups[:, -2:-1], groups[:, -1:]
    return torch.cat([part.reshape(-1, weight.shape[1]) for part in parts])


def ungroup_qkv(weight: torch.Tensor, model: ModelShape) -> torch.Tensor:
    """Undo `group_qkv`."""
    kv_rows = model.n_kv_heads * model.head_dim
    parts = torch.split(weight, [len(weight) - 2 * kv_rows, kv_rows, kv_rows])
    size = (model.n_kv_heads, -1, model.head_dim, weight.shape[1])
    return torch.cat([part.reshape(size) for part in parts], dim=1).reshape(weight.shape)
