"""Exported files of every family, against the published formulas in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, make_export, write_predictors
from covering import write_covering
from families import BY_NAME, VARIANTS, Variant, Written, write

from architectures.registry import ARCHITECTURES
from architectures.tokenizer import load_tokenizer
from evaluation.backends.backend import Scoring
from evaluation.backends.embedded import EmbeddedBackend
from evaluation.backends.powerinfer import PowerInferBackend
from gguf_export.pwri.schema import DENSE_THRESHOLD
from gguf_files.names import ACTIVATION_THRESHOLD_KEY
from gguf_files.reader import GGUFFile
from powerinfer_bridge.engine.attention import KVCache
from powerinfer_bridge.engine.engine import Engine
from powerinfer_bridge.engine.perplexity import engine_perplexity, perplexity, perplexity_windows
from powerinfer_bridge.programs.powerinfer import PowerInfer
from powerinfer_bridge.verify.verification import verify

NAMES = [variant.name for variant in VARIANTS]
# PowerInfer runs no smaller FFN, see gguf_export.pwri.schema.SMALLEST_D_FF.
D_FF = 1012
# Two float16 roundings of relative size 2^-11 a matrix product, a few dozen products deep.
LOGIT_TOLERANCE = 1.5e-2
LOSSY = 1.0


@dataclass(frozen=True)
class Exported:
    """A checkpoint and the file made of it, with predictors that know every gate."""

    written: Written
    file: Path


Exports = Callable[[str], Exported]


def runnable(name: str) -> Variant:
    """Return a variant in sizes that PowerInfer runs, with the tests' SentencePiece tokenizer."""
    variant = BY_NAME[name]
    sizes: dict[str, Any] = {
        "opt": {"ffn_dim": D_FF, "max_position_embeddings": 2048},
        "falcon": {"ffn_hidden_size": D_FF},
    }.get(variant.family, {"intermediate_size": D_FF})
    return replace(variant.changed(**sizes), tokenizer="tokenizer.model")


def write_model(name: str, path: Path, tokenizer_bytes: bytes) -> tuple[Written, Path]:
    """Write a variant and predictors that miss no active neuron; return it and their place."""
    written = write(runnable(name), path, tokenizer_bytes)
    predictors = path.with_name("predictors")
    if gated(name):
        write_predictors(path, predictors)
    else:
        write_covering(written, predictors, tokens_of(written, 120))
    return written, predictors


@pytest.fixture(scope="module")
def exported(tokenizer_bytes: bytes, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    made: dict[str, Exported] = {}

    def make(name: str) -> Exported:
        if name not in made:
            path = tmp_path_factory.mktemp("families") / name
            written, predictors = write_model(name, path, tokenizer_bytes)
            file = path.parent / "out" / f"{name}.powerinfer.gguf"
            made[name] = Exported(written, make_export(path, predictors, file).model_file)
        return made[name]

    return make


def gated(name: str) -> bool:
    return BY_NAME[name].family not in ("opt", "falcon")


def tokens_of(written: Written, count: int = 30) -> list[int]:
    tokenizer = load_tokenizer(written.path, 320, written.variant.config)
    return [1, *tokenizer.encode(TEXT * 2)][:count]


def without_threshold(written: Written) -> Written:
    """PowerInfer computes ReLU where the model has FATReLU; so does the unshifted model."""
    if written.variant.activation[0] != "fatrelu":
        return written
    relu = written.variant.changed(hidden_act="relu", hidden_act_param=None)
    return replace(written, variant=relu)


def test_every_family_is_exported() -> None:
    assert {variant.family for variant in VARIANTS} == {family.name for family in ARCHITECTURES}


@pytest.mark.parametrize("name", NAMES)
def test_exported_again_a_file_is_the_same_to_the_byte(
    exported: Exports, tmp_path: Path, name: str
) -> None:
    file = exported(name).file
    again = make_export(file, file, tmp_path / file.name)
    assert again.model_file.read_bytes() == file.read_bytes()
    assert not again.warnings


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
    if not gated(name):
        assert 1.05 * counts[0].active < counts[0].predicted < 0.9 * counts[0].decisions
        return
    gates = int((layer.gate > 0).sum())
    assert counts[0].predicted == pytest.approx(gates, rel=2e-3)
    assert (gates > 1.05 * counts[0].active) == (made.written.variant.activation[0] != "relu")


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("prosparse", b"llama"),
        ("minicpm-s", b"llama"),
        ("bamboo", b"bamboo"),
        ("minicpm", b"llama"),
        ("opt-6.7b", b"opt"),
        ("falcon-7b", b"falcon"),
        ("falcon-40b", b"falcon"),
    ],
)
def test_the_file_names_what_powerinfer_computes_and_what_the_model_does(
    exported: Exports, name: str, architecture: bytes
) -> None:
    made = exported(name)
    file = GGUFFile(made.file)
    kind, threshold = made.written.variant.activation
    assert file.values["general.architecture"].data == architecture
    assert file.values["psp.activation"].data == kind.encode()
    assert file.values[ACTIVATION_THRESHOLD_KEY].data == pytest.approx(threshold)


@pytest.mark.parametrize("name", NAMES)
def test_verify_finds_the_model_in_its_file(exported: Exports, name: str) -> None:
    made = exported(name)
    document = verify(made.file, str(made.written.path)).document()
    failed = [check for check in document["checks"] if not check["ok"]]
    assert not failed
    assert document["logit_difference_dense"] < LOGIT_TOLERANCE * document["logit_spread"]


@pytest.mark.powerinfer
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threshold", [None, DENSE_THRESHOLD], ids=["predicted", "dense"])
def test_the_real_perplexity_is_the_engine_s_and_the_formula_s(
    powerinfer_bin: Path, exported: Exports, name: str, threshold: float | None
) -> None:
    made, text, context = exported(name), TEXT * 6, 32
    real = PowerInfer(powerinfer_bin).perplexity(
        made.file, text, context, None, threads=1, threshold=threshold
    )
    engine = Engine(made.file, threshold=threshold)
    ours = engine_perplexity(engine, text, context, None, "engine")
    assert ours == pytest.approx(real, rel=0.005)
    tokens = [1, *engine.vocabulary.encode(text.removesuffix("\n"))]
    written = without_threshold(made.written)
    theirs = perplexity(
        lambda ids: written.reference(ids).logits.float(),
        perplexity_windows(tokens, 1, context),
        "formula",
    )
    assert theirs == pytest.approx(real, rel=0.005)


@pytest.mark.powerinfer
@pytest.mark.parametrize("name", [name for name in NAMES if not gated(name)])
def test_the_real_powerinfer_skips_the_same_neurons(
    powerinfer_bin: Path, exported: Exports, name: str
) -> None:
    """At a threshold that leaves out active neurons, so that which ones they are shows."""
    file, text, context = exported(name).file, TEXT * 6, 32
    real = [
        PowerInfer(powerinfer_bin).perplexity(
            file, text, context, None, threads=1, threshold=threshold
        )
        for threshold in (LOSSY, DENSE_THRESHOLD)
    ]
    ours = engine_perplexity(Engine(file, threshold=LOSSY), text, context, None, "engine")
    assert ours == pytest.approx(real[0], rel=2e-3)
    assert abs(real[0] / real[1] - 1) > 4e-3


@pytest.mark.powerinfer
@pytest.mark.parametrize("name", NAMES)
def test_the_real_server_s_probabilities_are_the_engine_s(
    powerinfer_bin: Path, exported: Exports, name: str
) -> None:
    """Also where the context is full."""
    made = exported(name)
    real = PowerInferBackend(made.file, powerinfer_bin, timeout=300)
    try:
        if "loglikelihood" not in real.kinds:
            pytest.skip("this build of PowerInfer has no server")
        ids = tokens_of(made.written)
        full = (ids * real.max_length)[: real.max_length]
        requests = [Scoring(ids=tuple(ids[:-1]), targets=(tuple(ids[-9:]),))]
        requests += [Scoring(ids=tuple(full), targets=((5, 9), (5, 300)))]
        embedded = EmbeddedBackend(made.file).score(requests)
        for ours, theirs in zip(embedded, real.score(requests), strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert other.loglikelihood == pytest.approx(one.loglikelihood, abs=0.02)
    finally:
        real.close()
