"""The `psp` command line: every command of `commands/`, under one name."""

from __future__ import annotations

import click

from commands.group import Group

MENU = {
    "quickstart": "Run the whole pipeline on a small model.",
    "run": "Take a model through the whole pipeline.",
    "sparsify": "Make a gated model sparse (ProSparse).",
    "sparsity": "Measure sparsity, and search FATReLU's threshold.",
    "collect": "Record activation traces of a model.",
    "traces": "Look into collected traces.",
    "train-predictor": "Train a predictor for every layer.",
    "export-gguf": "Write files that PowerInfer runs.",
    "gpu-split": "Choose which neurons live in VRAM.",
    "verify": "Check that PowerInfer will run a file correctly.",
    "inspect": "Show an artifact and what it was made with; compare two.",
    "bench-powerinfer": "Measure an exported file.",
    "evaluate": "Ask a model and what is made of it the same questions.",
    "report": "Make one HTML page of results.",
    "estimate": "Estimate speed on hardware from bytes and bandwidths.",
    "doctor": "Check machine, programs and a file; say what to mend.",
    "serve-check": "Check whether vLLM will serve a model directory.",
    "generate": "Run a model with the sparse FFN operators.",
    "bench-operators": "Measure the sparse FFN operators.",
}
"""Each command by its name, `-` for `_`, and what it does."""


@click.group(cls=Group, menu=MENU, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="psp")
def main() -> None:
    """Activation predictors for PowerInfer, from checkpoint to benchmark."""
