"""Directories in the layout of published models, read by psp and by transformers' own loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from families import BY_NAME, random_tensors, write

from architectures.checkpoint import Checkpoint
from architectures.model import load_model

TOKENS = torch.arange(12, 36)[None]


def theirs(path: Path) -> tuple[Any, set[str]]:
    """Return what transformers makes of a directory, and the weights that it had to invent."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    return model.eval(), set(info["missing_keys"])


@torch.inference_mode()
def agree(path: Path) -> Checkpoint:
    """Open a directory and compare its logits with transformers' own."""
    checkpoint = Checkpoint.open(path)
    model, invented = theirs(path)
    assert not invented
    ours = load_model(checkpoint, dtype=torch.float32, device="cpu").logits(TOKENS)
    expected = model(input_ids=TOKENS, use_cache=False).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)
    return checkpoint


def clear(path: Path) -> None:
    """Remove the weights of a directory."""
    for pattern in ("*.safetensors*", "*.bin*"):
        for file in path.glob(pattern):
            file.unlink()


def configure(path: Path, **changes: Any) -> None:
    """Set keys of config.json; None removes one."""
    file = path / "config.json"
    found = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def bare_llama(path: Path) -> Path:
    """Write an untied LLaMA without its weights' file."""
    written = write(BY_NAME["relu-llama"], path, b"").path
    clear(written)
    return written


def tensors_of(path: Path, seed: int) -> dict[str, torch.Tensor]:
    variant = BY_NAME["relu-llama"]
    config = json.loads((path / "config.json").read_text())
    return random_tensors(variant.shapes(config), torch.float32, seed)
