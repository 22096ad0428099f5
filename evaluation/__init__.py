"""Benchmarks of answers, on lm-eval: what sparsity, predictors and four bits do to them."""
