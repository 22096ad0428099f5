"""A GGUF file seen as a Hugging Face directory: config, tensors by name, tokenizer files."""
