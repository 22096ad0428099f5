"""ReLU-family models in vLLM, as a plugin (entry point group `vllm.general_plugins`).

vLLM itself knows no ReLU-gated LLaMA. The plugin gives such configs a model class of their own,
made of vLLM's layers; what vLLM runs by itself it leaves alone. Only `hooks`, `model` and `ffn`
need vLLM.
"""
