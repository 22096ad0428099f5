"""PowerInfer's file contract as constants.

Source: PowerInfer@d3ebd7c llama.cpp:LLM_TENSOR_NAMES, LLM_KV_NAMES, llm_load_hparams and
ggml.c:gguf_init_from_file.
"""

from __future__ import annotations

DENSE_MAGIC = b"GGUF"
SPARSE_MAGIC = b"PWRI"
"""A file that starts with these bytes is run sparsely; otherwise the layout is GGUF version 3."""

VERSION = 3
ALIGNMENT = 32
BLOCK = 32
"""Row sizes (d_model and rank) must be multiples of this."""

THRESHOLD_KEY = "powerinfer.sparse_threshold"
DENSE_THRESHOLD = -1e30
"""A threshold that computes every neuron: the dense ReLU model in the sparse engine."""

FC1 = "blk.{layer}.fc1.weight"
FC2 = "blk.{layer}.fc2.weight"
