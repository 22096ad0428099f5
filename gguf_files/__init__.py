"""GGUF and PWRI files as such: header, metadata, tensors; what they mean is said elsewhere."""
