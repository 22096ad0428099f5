"""Exported files of every LLaMA-like family, against the published formulas in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import TEXT, make_export, refused, write_predictors
from families import BY_NAME, VARIANTS, Written, write

from architectures.registry import ARCHITECTURES
from architectures.tokenizer import load_tokenizer
from common.errors import ExportError
from gguf_export.reader import GGUFFile
from gguf_export.schema import ACTIVATION_THRESHOLD_KEY, DENSE_THRESHOLD
from powerinfer_bridge.engine import Engine, KVCache
from powerinfer_bridge.perplexity import engine_perplexity
from powerinfer_bridge.powerinfer import PowerInfer

EXPORTED = {family.name for family in ARCHITECTURES if family.gguf_name}
NAMES = [variant.name for variant in VARIANTS if variant.family in EXPORTED]
# PowerInfer runs no smaller FFN, see gguf_export.schema.SMALLEST_D_FF.
D_FF = 1012
# Two float16 roundings of relative size 2^-11 a matrix product, a few dozen products deep.
LOGIT_TOLERANCE = 1.5e-2


@dataclass(frozen=True)
class Exported:
    """A checkpoint and the file made of it, with predictors that know every gate."""

    written: Written
    file: Path


Exports = Callable[[str], Exported]


@pytest.fixture(scope="module")
def exported(tokenizer_bytes: bytes, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    made: dict[str, Exported] = {}

    def make(name: str) -> Exported:
        if name not in made:
            path = tmp_path_factory.mktemp("families") / name
            variant = BY_NAME[name].changed(intermediate_size=D_FF)
            written = write(variant, path, tokenizer_bytes)
            predictors = path.with_name("predictors")
            write_predictors(path, predictors)
            file = path.parent / "out" / f"{name}.powerinfer.gguf"
            made[name] = Exported(written, make_export(path, predictors, file).model_file)
        return made[name]

    return make


def tokens_of(written: Written, count: int = 30) -> list[int]:
    return [1, *load_tokenizer(written.path, 320).encode(TEXT)][:count]


def without_threshold(written: Written) -> Written:
    """PowerInfer computes ReLU where the model has FATReLU; so does the unshifted model."""
    if written.variant.activation[0] != "fatrelu":
        return written
    relu = written.variant.changed(hidden_act="relu", hidden_act_param=None)
    return replace(written, variant=relu)


def test_every_llama_like_family_is_exported() -> None:
    assert {"llama", "prosparse", "minicpm", "bamboo"} == EXPORTED
    assert len(NAMES) >= 10


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threshold", [None, DENSE_THRESHOLD], ids=["predicted", "dense"])
def test_logits_equal_the_published_formula(
    exported: Exports, name: str, threshold: float | None
) -> None:
    """The folded constants and the activation survive; float16 is all that is lost."""
    made = exported(name)
    tokens = tokens_of(made.written)
    engine = Engine(made.file, threshold=threshold)
    ours = engine.forward(tokens, KVCache(engine.hyper.n_layers))
    # One token at a time takes the path that gathers predicted neurons only.
    cache = KVCache(engine.hyper.n_layers)
    apart = torch.cat([engine.forward([token], cache) for token in tokens])
    theirs = without_threshold(made.written).reference(tokens).logits.float()
    allowed = LOGIT_TOLERANCE * float(theirs.std())
    torch.testing.assert_close(ours, theirs, atol=allowed, rtol=0)
    torch.testing.assert_close(apart, theirs, atol=allowed, rtol=0)
    if made.written.variant.activation[0] == "fatrelu":
        shifted = made.written.reference(tokens).logits.float()
        assert float((shifted - theirs).abs().max()) > 5 * allowed


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_counts_what_the_model_itself_activates(exported: Exports, name: str) -> None:
    """At layer 0, where FATReLU and ReLU still see the same input."""
    made = exported(name)
    tokens = tokens_of(made.written)
    engine = Engine(made.file)
    counts = engine.count()
    engine.forward(tokens, KVCache(engine.hyper.n_layers))
    layer = made.written.reference(tokens).layers[0]
    assert counts[0].active == pytest.approx(int(layer.active.sum()), rel=2e-3)
    assert counts[0].hits > 0.999 * counts[0].active
    gates = int((layer.gate > 0).sum())
    assert counts[0].predicted == pytest.approx(gates, rel=2e-3)
    assert (gates > 1.05 * counts[0].active) == (made.written.variant.activation[0] != "relu")


@pytest.mark.parametrize("name", ["prosparse", "minicpm-s", "bamboo", "minicpm"])
def test_the_file_names_what_powerinfer_computes_and_what_the_model_does(
    exported: Exports, name: str
) -> None:
    made = exported(name)
    file = GGUFFile(made.file)
    kind, threshold = made.written.variant.activation
    expected = b"bamboo" if kind == "drelu" else b"llama"
    assert file.values["general.architecture"].data == expected
    assert file.values["psp.activation"].data == kind.encode()
    assert file.values[ACTIVATION_THRESHOLD_KEY].data == pytest.approx(threshold)


@pytest.mark.parametrize("name", ["opt-125m", "falcon-7b"])
def test_a_family_without_export_is_refused_with_those_that_have_one(
    tokenizer_bytes: bytes, exact_dir: Path, tmp_path: Path, name: str
) -> None:
    model = write(BY_NAME[name], tmp_path / name, tokenizer_bytes).path
    family = BY_NAME[name].family
    with refused(ExportError, str(model), f"family {family}", "cannot be exported yet", "bamboo"):
        make_export(model, exact_dir, tmp_path / "m.powerinfer.gguf")


@pytest.mark.powerinfer
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threshold", [None, DENSE_THRESHOLD], ids=["predicted", "dense"])
def test_the_real_perplexity_is_the_embedded_engine_s(
    powerinfer_bin: Path, exported: Exports, name: str, threshold: float | None
) -> None:
    file, text, context = exported(name).file, TEXT * 6, 32
    real = PowerInfer(powerinfer_bin).perplexity(
        file, text, context, None, threads=1, threshold=threshold
    )
    engine = Engine(file, threshold=threshold)
    ours = engine_perplexity(engine, text, context, None, "engine")
    assert ours == pytest.approx(real, rel=0.005)
