"""Makes a model sparse: ReLU substitution, progressive L1, threshold shift (ProSparse)."""
