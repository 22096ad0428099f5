"""Which vLLM the plugin was run with, and what it needs of another."""

from __future__ import annotations

import ast
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

TESTED = ("0.32.0",)
"""Versions of vLLM that the plugin was run with, the newest last."""

_LAYERS = "vllm.model_executor.models.llama"
_NEEDED = {
    "LlamaDecoderLayer": ("vllm_config", "prefix", "config", "attn_layer_type"),
    "LlamaForCausalLM": ("vllm_config", "prefix", "layer_type"),
}
"""Classes that `model` builds on, and what their constructors must take."""


class Drift(Exception):
    """vLLM has changed where the plugin takes hold of it."""


def installed() -> tuple[str, str] | None:
    """Return name and version of the distribution that provides vLLM; None without one."""
    names = [name for name in packages_distributions().get("vllm", ()) if name != "psp"]
    return (names[0], version(names[0])) if names else None


def seen(what: str) -> str:
    """Return a line about what was found in this vLLM."""
    found = installed()
    name = "vLLM" if found is None else f"vLLM {found[1]}"
    return f"{name}: {what}; the plugin was run with {', '.join(TESTED)}"


def require_layers() -> None:
    """Look into vLLM's LLaMA for what the model class builds on, without importing it.

    Raises:
        Drift: something is not there.
    """
    found = find_spec(_LAYERS)
    if found is None or found.origin is None:
        raise Drift(seen(f"has no module {_LAYERS}"))
    tree = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for name, needed in _NEEDED.items():
        if name not in classes:
            raise Drift(seen(f"{_LAYERS} has no {name}"))
        if missing := [each for each in needed if each not in _parameters(classes[name])]:
            raise Drift(seen(f"{name} takes no {missing[0]}"))


def _parameters(kind: ast.ClassDef) -> set[str]:
    for node in kind.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            arguments = node.args
            return {each.arg for each in (*arguments.args, *arguments.kwonlyargs)}
    return set()
