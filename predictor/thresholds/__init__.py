"""Thresholds and what they cost: bytes against perplexity."""
