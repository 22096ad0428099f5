"""Tasks of lm-eval: opened before any model, with what may go wrong told in one line."""
