"""The embedded engine: PowerInfer's graphs in torch, an oracle of its results."""
