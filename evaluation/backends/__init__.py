"""What answers requests: transformers, the embedded engine, PowerInfer's own programs."""
