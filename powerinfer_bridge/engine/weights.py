"""The weights of an exported file as torch tensors, and what each must look like."""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from gguf import GGMLQuantizationType

from gguf_export.pwri.element_types import runnable
from gguf_export.pwri.graph import POSITION_ROWS
from gguf_export.pwri.hyperparameters import Hyperparameters
from gguf_export.pwri.reader import GGUFFile
from gguf_export.pwri.schema import DOWN

_RESIDENT_SHARE = 0.5


def expected_shapes(hyper: Hyperparameters, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the numpy shape of every model tensor; `-1` stands for a predictor's rank.

    Source: PowerInfer@d3ebd7c llama.cpp:llm_load_sparse_model_tensors.
    """
    d_model = hyper.d_model
    norms = ["attn_norm", *(["attn_norm_2"] if hyper.two_norms else [])]
    norms += [] if hyper.graph.parallel else ["ffn_norm"]
    matrices = _block_matrices(hyper)
    block: dict[str, tuple[int, ...]] = {f"{norm}.weight": (d_model,) for norm in norms}
    block |= {f"{name}.weight": shape for name, shape in matrices.items()}
    block |= {"fc1.weight": (-1, d_model), "fc2.weight": (hyper.d_ff, -1)}
    if hyper.graph.centred:
        block |= {f"{norm}.bias": (d_model,) for norm in norms}
    if hyper.graph.biases:
        block |= {f"{name}.bias": _outputs(name, shape) for name, shape in matrices.items()}
    shapes = _outer_shapes(hyper, vocab_size)
    for layer in range(hyper.n_layers):
        shapes |= {f"blk.{layer}.{part}": shape for part, shape in block.items()}
    return shapes


def _block_matrices(hyper: Hyperparameters) -> dict[str, tuple[int, int]]:
    d_model, kv = hyper.d_model, hyper.n_kv_heads * hyper.head_dim
    rows = {"attn_q": d_model, "attn_k": kv, "attn_v": kv}
    if hyper.graph.fused_qkv:
        rows = {"attn_qkv": d_model + 2 * kv}
    rows["attn_output"] = d_model
    ffn = ("ffn_gate", "ffn_up", "ffn_down_t") if hyper.graph.gated else ("ffn_up", "ffn_down_t")
    rows |= dict.fromkeys(ffn, hyper.d_ff)
    return {name: (count, d_model) for name, count in rows.items()}


def _outputs(name: str, shape: tuple[int, int]) -> tuple[int]:
    """Return the shape of a matrix's bias; the down matrix is stored transposed."""
    return (shape[1] if name == DOWN else shape[0],)


def _outer_shapes(hyper: Hyperparameters, vocab_size: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab_size, hyper.d_model),
        "output_norm.weight": (hyper.d_model,),
    }
    if hyper.graph.own_head:
        shapes["output.weight"] = (vocab_size, hyper.d_model)
    if hyper.graph.centred:
        shapes["output_norm.bias"] = (hyper.d_model,)
    if not hyper.graph.rotary:
        shapes["position_embd.weight"] = (POSITION_ROWS, hyper.d_model)
    return shapes


class Weights:
    """Gives out tensors as float32: kept in memory if they fit, else converted at every use."""

    def __init__(self, file: GGUFFile, hyper: Hyperparameters, vocab_size: int) -> None:
        """Check that the file holds exactly the tensors that PowerInfer expects.

        Raises:
            FormatError: a tensor too many, too few, of a wrong shape or type.
        """
        self._file = file
        if hyper.n_layers > len(file.tensors):
            raise file.error(f"block_count is {hyper.n_layers}, more than there are tensors")
        shapes = expected_shapes(hyper, vocab_size)
        for name in sorted(shapes.keys() ^ file.tensors.keys()):
            problem = "is missing" if name in shapes else "is not PowerInfer's"
            raise file.error(f"tensor {name} {problem}")
        for name, shape in shapes.items():
            self._check(name, shape)
        for layer in range(hyper.n_layers):
            self._check_rank(layer)
        elements = sum(int(np.prod(info.shape)) for info in file.tensors.values())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.resident = 4 * elements <= _RESIDENT_SHARE * memory
        self._kept: dict[str, torch.Tensor] = {}

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        info = self._file.tensors[name]
        fits = len(info.shape) == len(shape) and all(
            want in (-1, found) for want, found in zip(shape, info.shape, strict=True)
        )
        if not fits:
            raise self._file.error(f"tensor {name} has shape {info.shape}, expected {shape}")
        kinds = runnable(name, shape)
        if info.kind not in kinds:
            expected = " or ".join(kind.name for kind in kinds)
            raise self._file.error(f"tensor {name} has type {info.kind.name}, expected {expected}")

    def _check_rank(self, layer: int) -> None:
        ranks = [
            self._file.tensors[f"blk.{layer}.fc1.weight"].shape[0],
            self._file.tensors[f"blk.{layer}.fc2.weight"].shape[1],
        ]
        if ranks[0] != ranks[1]:
            raise self._file.error(f"layer {layer}: fc1 and fc2 ranks are {ranks}")

    def __call__(self, name: str) -> torch.Tensor:
        """Return tensor `name` (without `.weight`) as float32."""
        return self._whole(f"{name}.weight")

    def bias(self, name: str) -> torch.Tensor | None:
        """Return the bias that goes with `name`, if there is one."""
        return self._whole(f"{name}.bias") if f"{name}.bias" in self._file.tensors else None

    def _whole(self, name: str) -> torch.Tensor:
        kept = self._kept.get(name)
        if kept is None:
            kept = torch.from_numpy(self._file.tensor(name).astype(np.float32))
            if self.resident:
                self._kept[name] = kept
        return kept

    def kind(self, name: str) -> GGMLQuantizationType:
        """Return the type in which tensor `name` (without `.weight`) is stored."""
        return self._file.tensors[f"{name}.weight"].kind

    def width(self, name: str) -> float:
        """Return the bytes that a number of tensor `name` (without `.weight`) takes."""
        info = self._file.tensors[f"{name}.weight"]
        return info.size / math.prod(info.shape)

    def rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """Return the chosen rows of a matrix as float32."""
        if self.resident:
            return self(name)[index]
        chosen = self._file.tensor(f"{name}.weight", index.numpy())
        return torch.from_numpy(chosen.astype(np.float32))
