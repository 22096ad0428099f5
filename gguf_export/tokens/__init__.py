"""Vocabularies and PowerInfer's tokenizers, from a checkpoint and from a file."""
