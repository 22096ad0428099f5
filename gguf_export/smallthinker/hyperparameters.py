"""What model a file of arch `smallthinker` with one expert holds, and the tensors that follow."""

from __future__ import annotations

from dataclasses import replace

from gguf import GGUFValueType

from architectures.gguf_model.one_expert import check_one_expert_keys
from common.errors import FormatError
from gguf_export.pwri.hyperparameters import Graph, Hyperparameters, check_sizes, read_sizes
from gguf_export.pwri.schema import EMBEDDING, HEAD
from gguf_export.tokens.vocabulary import LLAMA_CPP, SECOND_ENGINE
from gguf_files.names import ROUTER, SMALLTHINKER
from gguf_files.reader import GGUFFile

GRAPH = Graph(
    norm_key="attention.layer_norm_rms_epsilon",
    centred=False,
    positions="halves",
    gated=True,
    up_activated=False,
)
"""Of llama.cpp@0c1e570 src/models/smallthinker.cpp, without a sliding window; its rotary kernel is
llama.cpp's of today, which scales halves as it scales pairs."""


def is_expert_file(file: GGUFFile) -> bool:
    """Whether a file is of arch `smallthinker`."""
    if file.sparse:
        return False
    return bool(file.optional("general.architecture", GGUFValueType.STRING, "") == SMALLTHINKER)


def is_mixture_file(file: GGUFFile) -> bool:
    """Whether a file is of arch `smallthinker` and has several experts."""
    key = f"{SMALLTHINKER}.expert_count"
    return is_expert_file(file) and file.optional(key, GGUFValueType.UINT32, 1) > 1


def read_expert_hyperparameters(file: GGUFFile) -> Hyperparameters:
    """Read and check the keys of a file of one expert.

    Raises:
        FormatError: see `check_one_expert_keys`; a missing key or impossible sizes.
    """
    check_one_expert_keys(file)
    found = _with_heads(file, read_sizes(file, SMALLTHINKER, GRAPH))
    key = f"{SMALLTHINKER}.expert_feed_forward_length"
    if (d_ff := file.value(key, GGUFValueType.UINT32)) != found.d_ff:
        raise FormatError(f"{file.path}: {key} is {d_ff}, feed_forward_length is {found.d_ff}")
    check_sizes(file, found, rows=1)
    return found


def _with_heads(file: GGUFFile, found: Hyperparameters) -> Hyperparameters:
    """Return sizes with that of a head, which keys may name.

    Raises:
        FormatError: heads of values have another size, at which llama.cpp stops.
    """
    prefix = f"{SMALLTHINKER}.attention"
    found = replace(
        found, key_length=file.optional(f"{prefix}.key_length", GGUFValueType.UINT32, 0)
    )
    if found.n_heads:
        key, size = f"{prefix}.value_length", found.d_model // found.n_heads
        size = file.optional(key, GGUFValueType.UINT32, size)
        if size != found.head_dim:
            raise file.error(f"{key} is {size}, the head size is {found.head_dim}")
    return found


def expert_shapes(
    hyper: Hyperparameters, vocab_size: int, *, transposed: bool
) -> dict[str, tuple[int, ...]]:
    """Return the numpy shape of every tensor; -1 is any size.

    Args:
        hyper: sizes.
        vocab_size: rows of the embedding.
        transposed: whether the down matrix is stored so, see `plan.plan_expert`.
    """
    d_model, d_ff, head = hyper.d_model, hyper.d_ff, hyper.head_dim
    rows, kv = hyper.n_heads * head, hyper.n_kv_heads * head
    block: dict[str, tuple[int, ...]] = {
        "attn_norm": (d_model,),
        "attn_q": (rows, d_model),
        "attn_k": (kv, d_model),
        "attn_v": (kv, d_model),
        "attn_output": (d_model, rows),
        "ffn_norm": (d_model,),
        ROUTER: (1, d_model),
        "ffn_gate_exps": (1, d_ff, d_model),
        "ffn_up_exps": (1, d_ff, d_model),
        "ffn_down_exps": (1, d_ff, d_model) if transposed else (1, d_model, d_ff),
    }
    shapes = {EMBEDDING: (vocab_size, d_model), "output_norm.weight": (d_model,)}
    shapes[HEAD] = (vocab_size, d_model)
    for layer in range(hyper.n_layers):
        shapes |= {f"blk.{layer}.{stem}.weight": shape for stem, shape in block.items()}
    return shapes


def is_transposed(file: GGUFFile) -> bool:
    """Whether the down matrices are stored as PowerInfer's second engine needs them.

    A square FFN does not tell, and counts as llama.cpp's.
    """
    up, down = (file.tensors.get(f"blk.0.ffn_{part}_exps.weight") for part in ("up", "down"))
    if up is None or down is None or len(up.shape) < 2:
        return False
    return up.shape == down.shape and up.shape[-1] != up.shape[-2]


def engine_of(file: GGUFFile) -> str:
    """Return which engine a file is for."""
    return SECOND_ENGINE if is_transposed(file) else LLAMA_CPP
