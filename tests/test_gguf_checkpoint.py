"""Files as checkpoints, against the published formulas and the checkpoints they were made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TEXT
from families import BY_NAME, VARIANTS, Written, write

from architectures.checkpoint import Checkpoint
from architectures.model import load_model
from architectures.spec import TensorRule
from gguf_export.pwri.element_types import FileTypes
from gguf_export.tokens.model_vocabulary import read_vocabulary
from gguf_export.writer import ModelWriter

NAMES = [variant.name for variant in VARIANTS]
F16 = FileTypes(weights="f16", predictors="f16")
# One rounding of the weights to float16, 2^-12 relative, through a few dozen products.
LOGIT_TOLERANCE = 2e-3
# FATReLU jumps at its threshold: rounding folded weights turns a neuron on or off here and there.
JUMP_TOLERANCE = 5e-2


def write_file(checkpoint: Checkpoint, path: Path, *, sparse: bool = True) -> Path:
    """Write a model's file without predictors."""
    rows, config = checkpoint.shape.vocab_size, checkpoint.config
    vocabulary = read_vocabulary(checkpoint.directory, rows, config)
    ModelWriter(checkpoint, vocabulary, F16).write(path, path, {}, sparse=sparse)
    return path


@pytest.fixture(scope="module")
def models(tokenizer_bytes: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    path = tmp_path_factory.mktemp("models")
    return {name: write(BY_NAME[name], path / name, tokenizer_bytes) for name in NAMES}


@pytest.mark.parametrize("sparse", [True, False], ids=["PWRI", "GGUF"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_gives_the_model_that_it_was_made_of(
    models: dict[str, Written], tmp_path: Path, name: str, sparse: bool
) -> None:
    original = Checkpoint.open(models[name].path)
    file = write_file(original, tmp_path / "model.gguf", sparse=sparse)
    made = Checkpoint.open(file)
    for fact in ("activation", "activation_threshold", "norm_eps", "rope_theta", "rope_scaling"):
        assert getattr(made.shape, fact) == getattr(original.shape, fact), fact
    for rule in original.architecture.tensors:
        for layer in range(original.shape.n_layers if rule.per_layer else 1):
            wanted, found = original.read(rule, layer), made.read(made_rule(made, rule), layer)
            exact = wanted.half() if wanted.ndim > 1 else wanted
            assert torch.equal(found.float(), exact.float()), rule.source
    tokens = [original.tokenizer().bos_id(), *original.tokenizer().encode(TEXT)][:30]
    logits = load_model(made, dtype=torch.float32, device="cpu").logits(torch.tensor([tokens]))[0]
    theirs = rounded(models[name]).reference(tokens).logits.float()
    share = JUMP_TOLERANCE if made.shape.activation == "fatrelu" else LOGIT_TOLERANCE
    torch.testing.assert_close(logits, theirs, atol=share * float(theirs.std()), rtol=0)
    assert made.tokenizer().encode(TEXT) == original.tokenizer().encode(TEXT)
    assert made.tokenizer().bos_id() == original.tokenizer().bos_id()
    assert made.fingerprint == original.fingerprint


def rounded(written: Written) -> Written:
    """Round matrices as a file does, but where constants are folded into them first."""
    if written.variant.family == "minicpm":
        return written
    return replace(
        written,
        tensors={n: t.half() if t.ndim > 1 else t for n, t in written.tensors.items()},
    )


def made_rule(made: Checkpoint, rule: TensorRule) -> TensorRule:
    """Return the rule of the same tensor: MiniCPM becomes LLaMA."""
    return next(other for other in made.architecture.tensors if other.source == rule.source)
