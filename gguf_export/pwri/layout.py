"""The tensors that a sparse file must have, and their shapes.

Source: PowerInfer@d3ebd7c llama.cpp:llm_load_sparse_model_tensors.
"""

from __future__ import annotations

from gguf_export.pwri.graph import POSITION_ROWS
from gguf_export.pwri.hyperparameters import Hyperparameters
from gguf_export.pwri.schema import DOWN, EMBEDDING, HEAD, POSITIONS


def expected_shapes(hyper: Hyperparameters, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the numpy shape of every tensor; `-1` stands for a predictor's rank."""
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
    ffn = (*(["ffn_gate"] if hyper.graph.gated else []), "ffn_up", DOWN)
    rows |= dict.fromkeys(ffn, hyper.d_ff)
    return {name: (count, d_model) for name, count in rows.items()}


def _outputs(name: str, shape: tuple[int, int]) -> tuple[int]:
    """Return the shape of a matrix's bias; the down matrix is stored transposed."""
    return (shape[1] if name == DOWN else shape[0],)


def _outer_shapes(hyper: Hyperparameters, vocab_size: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (vocab_size, hyper.d_model),
        "output_norm.weight": (hyper.d_model,),
    }
    if hyper.graph.own_head:
        shapes[HEAD] = (vocab_size, hyper.d_model)
    if hyper.graph.centred:
        shapes["output_norm.bias"] = (hyper.d_model,)
    if not hyper.graph.rotary:
        shapes[POSITIONS] = (POSITION_ROWS, hyper.d_model)
    return shapes
