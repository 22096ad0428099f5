"""`psp serve-check`: whether vLLM will run a model directory, said before anything starts.

Nothing here imports vLLM, which need not be installed.
"""
