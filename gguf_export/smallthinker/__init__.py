"""Files of arch `smallthinker`: FFNs as experts with a ReLU gate, for llama.cpp of today.

llama.cpp's arch `llama` computes SiLU whatever a file says. A ReLU-gated LLaMA is, written as one
expert, a model of this arch to the bit; see `gguf_files.names.SMALLTHINKER`.
"""
