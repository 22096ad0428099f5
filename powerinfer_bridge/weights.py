"""The weights of an exported file as torch tensors, and what each must look like."""

from __future__ import annotations

import os

import numpy as np
import torch
from gguf import GGMLQuantizationType

from gguf_export.reader import GGUFFile
from powerinfer_bridge.hyperparameters import Hyperparameters

_RESIDENT_SHARE = 0.5


def expected_shapes(hyper: Hyperparameters, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the numpy shape of every model tensor; `-1` stands for a predictor's rank.

    Source: PowerInfer@d3ebd7c llama.cpp:llm_load_sparse_model_tensors.
    """
    d_model, d_ff = hyper.d_model, hyper.d_ff
    kv = hyper.n_kv_heads * hyper.head_dim
    block = {
        "attn_norm": (d_model,),
        "attn_q": (d_model, d_model),
        "attn_k": (kv, d_model),
        "attn_v": (kv, d_model),
        "attn_output": (d_model, d_model),
        "ffn_norm": (d_model,),
        "ffn_gate": (d_ff, d_model),
        "ffn_up": (d_ff, d_model),
        "ffn_down_t": (d_ff, d_model),
        "fc1": (-1, d_model),
        "fc2": (d_ff, -1),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab_size, d_model),
        "output_norm.weight": (d_model,),
        "output.weight": (vocab_size, d_model),
    }
    for layer in range(hyper.n_layers):
        shapes |= {f"blk.{layer}.{part}.weight": shape for part, shape in block.items()}
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
        kind = GGMLQuantizationType.F32 if len(shape) == 1 else GGMLQuantizationType.F16
        if info.kind is not kind:
            found = f"type {info.kind.name}, expected {kind.name}"
            raise self._file.error(f"tensor {name} has {found}")

    def _check_rank(self, layer: int) -> None:
        ranks = [
            self._file.tensors[f"blk.{layer}.fc1.weight"].shape[0],
            self._file.tensors[f"blk.{layer}.fc2.weight"].shape[1],
        ]
        if ranks[0] != ranks[1]:
            raise self._file.error(f"layer {layer}: fc1 and fc2 ranks are {ranks}")

    def __call__(self, name: str) -> torch.Tensor:
        """Return tensor `name` (without `.weight`) as float32."""
        kept = self._kept.get(name)
        if kept is None:
            kept = torch.from_numpy(self._file.tensor(f"{name}.weight").astype(np.float32))
            if self.resident:
                self._kept[name] = kept
        return kept

    def rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """Return the chosen rows of a matrix as float32."""
        if self.resident:
            return self(name)[index]
        return torch.from_numpy(
            self._file.tensor(f"{name}.weight")[index.numpy()].astype(np.float32)
        )
