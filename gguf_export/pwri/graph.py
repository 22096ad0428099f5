"""PowerInfer's compute graphs, one description for each architecture that it runs sparsely.

Source: PowerInfer@d3ebd7c llama.cpp:build_llama_variants, build_opt, build_falcon, llm_load_hparams
and llm_load_sparse_model_tensors. The engine follows these descriptions and knows no names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

POSITION_ROWS = 2050
"""Rows of a table of learned positions, whatever a file says (llm_load_hparams, OPT)."""

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

    @property
    def rotary(self) -> bool:
        """Whether positions are angles."""
        return self.positions != "learned"

    @property
    def scalable(self) -> bool:
        """Whether angles may be scaled.

        ggml's kernel for halves scales them twice and takes every pair for the first of YaRN's
        (ggml.c:ggml_compute_forward_rope_f32).
        """
        return self.positions == "pairs"


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
    ),
}
