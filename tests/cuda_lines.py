"""Lines that builds with CUDA print, composed from format strings; no such build was run.

Sources: PowerInfer@d3ebd7c ggml-cuda.cu:ggml_init_cublas, CUDA_CHECK; llama.cpp:
llm_load_sparse_model_tensors, llm_load_gpu_split_with_budget, llm_load_gpu_split,
llama_gpu_split_loader, llama_kv_cache_init, llm_load_tensors; powerinfer-py/powerinfer/__main__.py,
export_split.py, solver.py. llama.cpp@0c1e570 ggml/src/ggml-cuda/ggml-cuda.cu, common/arg.cpp.
"""

from __future__ import annotations

GPU = "NVIDIA GeForce RTX 4090"
DEVICES = f"""ggml_init_cublas: GGML_CUDA_FORCE_MMQ:   no
ggml_init_cublas: CUDA_USE_TENSOR_CORES: yes
ggml_init_cublas: found 1 CUDA devices:
  Device 0: {GPU}, compute capability 8.9
"""
SPARSE = """llm_load_sparse_model_tensors: using CUDA for GPU acceleration
llm_load_sparse_model_tensors: offloaded layers from VRAM budget(8589934592 bytes): 33/32
llm_load_sparse_model_tensors: mem required  = 8000.00 MB
llm_load_sparse_model_tensors: VRAM used: 5120.50 MB
"""
APPLIED = (
    "load_gpu_idx_for_model: applying gpu_idx adapter from '/m.gguf.generated.gpuidx' - please "
    "wait ...\n.... done (1.50 ms)\n"
)
KV_CACHE = """llama_kv_cache_init: offloading v cache to GPU
llama_kv_cache_init: offloading k cache to GPU
llama_kv_cache_init: VRAM kv self = 256.00 MB
"""
OFFLOADED = "llm_load_gpu_split: offloaded 2048.25 MiB of FFN weights to GPU\n"
REFUSED = (
    "llm_load_gpu_split_with_budget: error: failed to apply previously generated gpu split from "
    "'/m.gguf.generated.gpuidx'\n"
)
NO_STATISTICS = (
    "llm_load_gpu_split_with_budget: error: activation files under '/activation' not found\n"
)
INVOKING = "invoking powerinfer Python module to generate gpu split for 2048.00 MiB of VRAM\n"
EMPTY = "llm_load_gpu_split: error: failed to generate gpu split, an empty one will be used\n"
DENSE = """llm_load_tensors: using CUDA for GPU acceleration
llm_load_tensors: offloaded 33/35 layers to GPU
llm_load_tensors: VRAM used: 12000.00 MB
"""
OUT_OF_MEMORY = "\nCUDA error 2 at /src/ggml-cuda.cu:8974: out of memory\ncurrent device: 0\n"

INDEX_LOADED = "loaded gpu_idx, vram_required: 2147483648\n"
SOLVER = """solver args: Namespace(activation='/activation', neuron=11008)
ILP Status: optimal
Total Activation Units: 12345
solved: [32, 64], total neurons: 96
blk.0.gpu_idx => blk.0.gpu_idx (11008,) int32 0.0419921875 MiB
blk.0.gpu_bucket => blk.0.gpu_bucket (32,) int32 0.0001220703125 MiB
exported GPU index to /m.gguf.generated.gpuidx
Exported to /m.gguf.generated.gpuidx
"""

LLAMA_CPP_DEVICES = f"""Available devices:
  CUDA0: {GPU} (24080 MiB, 23600 MiB free)
"""
LLAMA_CPP_OUT_OF_MEMORY = (
    "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 12853.02 MiB on device 0: "
    "cudaMalloc failed: out of memory\nllama_model_load: error loading model: "
    "unable to allocate CUDA0 buffer\n"
)
