"""What model a file holds: its graph, sizes and constants, and the tensors that follow from them.

Source: PowerInfer@d3ebd7c llama.cpp:build_llama_variants, build_opt, build_falcon, llm_load_hparams
and llm_load_sparse_model_tensors. The engine follows these descriptions and knows no names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from gguf import GGUFValueType

from architectures.rope import RopeScaling
from common.errors import FormatError
from gguf_export.pwri.schema import (
    BLOCK,
    DENSE_THRESHOLD,
    EMBEDDING,
    HEAD,
    POSITIONS,
    SMALLEST_D_FF,
    THRESHOLD_KEY,
)
from gguf_files.names import ACTIVATION_THRESHOLD_KEY, DOWN, SMALLTHINKER
from gguf_files.reader import GGUFFile

POSITION_ROWS = 2050
"""Rows of a table of learned positions, whatever a file says (llm_load_hparams, OPT)."""

ROPE_THETA = 10000.0
"""Base of rotary positions where a file names none."""

POSITION_OFFSET = 2
"""Rows of it before that of the first token (llama_build_graph)."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """What distinguishes one architecture's graph.

    Attributes:
        norm_key: key of the norms' epsilon, after the architecture's name; None where PowerInfer
            reads none and computes with 0.
        centred: norms are LayerNorms with a bias, else RMSNorms.
        positions: `pairs` turns neighbours of queries and keys, `halves` the two halves of a head,
            `learned` adds a row of a table to the embedding.
        fused_qkv: queries, keys and values come from one matrix.
        biases: matrices of attention and FFN have biases.
        gated: the FFN has a gate, which ReLU is applied to.
        up_activated: ReLU is applied to what `ffn_up` gives.
        parallel: attention and FFN both read the block's input, and so does the predictor; else FFN
            and predictor read the residual after attention.
        own_head: the output head is a tensor of its own, else the embedding.
        scalable: angles may be scaled. PowerInfer's kernel for halves scales them twice and takes
            every pair for the first of YaRN's (ggml.c:ggml_compute_forward_rope_f32).
    """

    norm_key: str | None
    centred: bool
    positions: Literal["pairs", "halves", "learned"]
    fused_qkv: bool = False
    biases: bool = False
    gated: bool
    up_activated: bool
    parallel: bool = False
    own_head: bool = True
    scalable: bool = True

    @property
    def rotary(self) -> bool:
        """Whether positions are angles."""
        return self.positions != "learned"


GRAPHS = {
    "llama": Graph(
        norm_key="attention.layer_norm_rms_epsilon",
        centred=False,
        positions="pairs",
        gated=True,
        up_activated=False,
    ),
    "bamboo": Graph(
        norm_key="attention.layer_norm_rms_epsilon",
        centred=False,
        positions="pairs",
        gated=True,
        up_activated=True,
    ),
    "opt": Graph(
        norm_key=None,
        centred=True,
        positions="learned",
        biases=True,
        gated=False,
        up_activated=True,
        own_head=False,
    ),
    "falcon": Graph(
        norm_key="attention.layer_norm_epsilon",
        centred=True,
        positions="halves",
        fused_qkv=True,
        gated=False,
        up_activated=True,
        parallel=True,
        scalable=False,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What the engine needs; names as in `architectures.spec.ModelShape`.

    `graph` is the architecture's; `two_norms` says that attention has a norm beside the FFN's
    (Falcon-40B); `norm_eps` is 0 and `rope_theta` is 0 where the graph has none; `threshold` is the
    file's `powerinfer.sparse_threshold`; `activation_threshold` is FATReLU's, which tells active
    neurons but changes nothing that is computed; `key_length` is the size of one head where a file
    names it, which PowerInfer's do not, else 0.
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
    key_length: int = 0

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.key_length or self.d_model // self.n_heads

    @property
    def skips_neurons(self) -> bool:
        """Whether its predictors do anything; a file made without has zeros in their place."""
        return self.threshold > DENSE_THRESHOLD


def read_hyperparameters(file: GGUFFile) -> Hyperparameters:
    """Read and check the keys of a sparse file; those that it may leave out have defaults.

    Raises:
        FormatError: a dense file, another architecture, a missing key or impossible sizes.
    """
    if not file.sparse:
        name = file.values.get("general.architecture")
        other = name is not None and name.data == SMALLTHINKER.encode()
        kind = f"a file of arch {SMALLTHINKER}, for other engines" if other else "a dense file"
        raise FormatError(
            f"{file.path}: magic is GGUF, {kind}", "pass a *.powerinfer.gguf (magic PWRI)"
        )
    kind = file.value("general.architecture", GGUFValueType.STRING)
    if kind not in GRAPHS:
        expected = " or ".join(map(repr, GRAPHS))
        raise file.error(f"architecture {kind!r} is not supported, expected {expected}")
    found = read_sizes(file, kind, GRAPHS[kind])
    check_sizes(file, found, least_d_ff=SMALLEST_D_FF)
    return found


def read_sizes(file: GGUFFile, kind: str, graph: Graph) -> Hyperparameters:
    """Read the keys of an architecture whose graph is known; what they say is not checked.

    Raises:
        FormatError: a missing key, or one of another type.
    """

    def size(key: str, default: int | None = None) -> int:
        read = file.value if default is None else partial(file.optional, default=default)
        value: int = read(f"{kind}.{key}", GGUFValueType.UINT32)
        return value

    def real(key: str, default: float | None = None) -> float:
        read = file.value if default is None else partial(file.optional, default=default)
        value: float = read(key, GGUFValueType.FLOAT32)
        return value

    n_heads = size("attention.head_count")
    return Hyperparameters(
        name=file.optional("general.name", GGUFValueType.STRING, ""),
        graph=graph,
        d_model=size("embedding_length"),
        d_ff=size("feed_forward_length"),
        n_layers=size("block_count"),
        n_heads=n_heads,
        n_kv_heads=size("attention.head_count_kv", n_heads),
        two_norms=graph.parallel and "blk.0.attn_norm_2.weight" in file.tensors,
        context_length=size("context_length"),
        norm_eps=real(f"{kind}.{graph.norm_key}") if graph.norm_key else 0.0,
        rope_theta=real(f"{kind}.rope.freq_base", ROPE_THETA) if graph.rotary else 0.0,
        rope_scaling=_scaling(file, kind, graph) if graph.rotary else None,
        threshold=real(THRESHOLD_KEY, 0.0),
        activation_threshold=real(ACTIVATION_THRESHOLD_KEY, 0.0),
    )


def _scaling(file: GGUFFile, kind: str, graph: Graph) -> RopeScaling | None:
    """Read what scales rotary positions, with PowerInfer's defaults."""
    prefix = f"{kind}.rope.scaling"
    name = file.optional(f"{prefix}.type", GGUFValueType.STRING, "linear")
    if name not in ("none", "linear", "yarn"):
        raise file.error(f"{prefix}.type is {name!r}, expected 'none', 'linear' or 'yarn'")
    old = file.optional(f"{kind}.rope.scale_linear", GGUFValueType.FLOAT32, 1.0)
    factor = file.optional(f"{prefix}.factor", GGUFValueType.FLOAT32, old)
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
    context = file.optional(key, GGUFValueType.UINT32, trained) or trained
    if not context:
        raise file.error(f"{key} is 0")
    return RopeScaling(kind="yarn", factor=factor, original_context=context)


def check_sizes(
    file: GGUFFile, found: Hyperparameters, *, least_d_ff: int = 1, rows: int = BLOCK
) -> None:
    """Do nothing if sizes and constants can be those of a model.

    Args:
        file: whose they are.
        found: the sizes and constants.
        least_d_ff: the smallest FFN.
        rows: what d_model must be a multiple of.

    Raises:
        FormatError: they cannot; it names the first that does not fit, and what to.
    """
    problems = (*_size_problems(found, least_d_ff, rows), *_constant_problems(found))
    if problems:
        raise file.error(problems[0])
    if found.n_layers > len(file.tensors):
        raise file.error(f"block_count is {found.n_layers}, more than there are tensors")


def _size_problems(found: Hyperparameters, least_d_ff: int, rows: int) -> Iterator[str]:
    """Yield which sizes, as keys name them, are none or do not fit together."""
    d_model, heads, kv_heads = found.d_model, found.n_heads, found.n_kv_heads
    sizes = {
        "embedding_length": d_model,
        "block_count": found.n_layers,
        "context_length": found.context_length,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
    }
    yield from (f"{key} is 0" for key, size in sizes.items() if not size)
    if d_model % rows:
        yield f"embedding_length is {d_model}, expected a multiple of {rows}"
    if not found.key_length and heads and d_model % (2 * heads):
        yield (
            f"embedding_length is {d_model}, expected a multiple of twice the attention.head_count "
            f"{heads}"
        )
    if found.key_length % 2:
        yield f"attention.key_length is {found.key_length}, expected an even number"
    if heads and kv_heads and heads % kv_heads:
        yield f"attention.head_count is {heads}, no multiple of attention.head_count_kv {kv_heads}"
    if found.d_ff < least_d_ff:
        yield f"feed_forward_length is {found.d_ff}, expected at least {least_d_ff}"


def _constant_problems(found: Hyperparameters) -> Iterator[str]:
    """Yield which constants, as keys name them, are impossible."""
    theta, scaled = found.rope_theta, found.rope_scaling is not None
    if not 0 <= found.norm_eps < 1:
        yield f"{found.graph.norm_key} is {found.norm_eps:g}, expected 0 to 1"
    if found.graph.rotary and not 0 < theta < math.inf:
        yield f"rope.freq_base is {theta:g}, expected a number above 0"
    if scaled and not theta > 1:
        yield f"rope.freq_base is {theta:g}, expected a number above 1 where positions are scaled"
    if math.isnan(found.threshold):
        yield f"{THRESHOLD_KEY} is nan"
    if not 0 <= found.activation_threshold < math.inf:
        yield f"{ACTIVATION_THRESHOLD_KEY} is {found.activation_threshold:g}, expected at least 0"


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
