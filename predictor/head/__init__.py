"""The output head's predictor, for PowerInfer's second engine; see docs/head-predictor.md."""
