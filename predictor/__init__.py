"""Activation traces, the predictors trained on them, and how good these are."""
