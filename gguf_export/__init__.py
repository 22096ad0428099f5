"""Files that PowerInfer runs: writing them and reading them back."""
