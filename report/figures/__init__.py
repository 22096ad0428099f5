"""Every figure, each once: for the page, for reports on predictors and for benchmarks."""
