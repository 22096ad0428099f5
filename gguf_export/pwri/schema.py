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

SMALLEST_D_FF = 1001
"""Up to 1000 neurons PowerInfer takes a kernel made for attention heads, which leaves out blocks of
128 neurons by another rule (ggml.c:ggml_compute_forward_mul_mat_sparse_head): wrong text."""

THRESHOLD_KEY = "powerinfer.sparse_threshold"
DENSE_THRESHOLD = -1e30
"""A threshold that computes every neuron: the dense ReLU model in the sparse engine."""

ACTIVATION_THRESHOLD_KEY = "psp.activation_threshold"
"""Our own key, float32: FATReLU's threshold. PowerInfer computes ReLU whatever it says; who
measures predictors needs to know which neurons they were meant to find."""

DOWN, DENSE_DOWN = "ffn_down_t", "ffn_down"
"""The down matrix in a sparse file, transposed, and in a dense one."""

FC1 = "blk.{layer}.fc1.weight"
FC2 = "blk.{layer}.fc2.weight"
