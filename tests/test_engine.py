"""The embedded engine against transformers on the same checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, ModelMaker, write_predictors
from exact_sums import ExactSums

from architectures.tokenizer import load_tokenizer
from common.errors import EngineError
from gguf_export.bundle import Bundle, export
from gguf_export.pwri.schema import DENSE_THRESHOLD
from gguf_export.settings import ExportConfig
from powerinfer_bridge.engine.attention import KVCache
from powerinfer_bridge.engine.engine import Engine, generate
from powerinfer_bridge.engine.perplexity import engine_perplexity, perplexity, perplexity_windows

# Two float16 roundings of relative size 2^-11 a matrix product, a few dozen products deep.
LOGIT_TOLERANCE = 2e-2


def reference_logits(model: Path, tokens: list[int]) -> torch.Tensor:
    from transformers import LlamaForCausalLM

    module = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        logits: torch.Tensor = module(input_ids=torch.tensor([tokens])).logits[0]
    return logits


def tokens_of(model: Path, count: int) -> list[int]:
    return [1, *load_tokenizer(model, 10**6).encode(TEXT * 8)][:count]


@pytest.mark.parametrize("threshold", [DENSE_THRESHOLD, None], ids=["dense", "exact predictor"])
def test_logits_equal_transformers(
    model_dir: Path, exact_bundle: Bundle, threshold: float | None
) -> None:
    tokens = tokens_of(model_dir, 100)
    engine = Engine(exact_bundle.model_file, threshold=threshold)
    ours = engine.forward(tokens, KVCache(engine.hyper.n_layers))
    theirs = reference_logits(model_dir, tokens)
    assert float(theirs.std()) > 0.5
    torch.testing.assert_close(ours, theirs, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("threshold", [DENSE_THRESHOLD, None], ids=["dense", "exact predictor"])
def test_perplexity_equals_transformers(
    model_dir: Path, exact_bundle: Bundle, threshold: float | None
) -> None:
    from transformers import LlamaForCausalLM

    engine = Engine(exact_bundle.model_file, threshold=threshold)
    ours = engine_perplexity(engine, TEXT * 8, 64, None, "ours")
    tokens = tokens_of(model_dir, 10**6)
    assert tokens == [1, *engine.vocabulary.encode(TEXT * 8)]
    module = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)

    @torch.inference_mode()
    def evaluate(ids: list[int]) -> torch.Tensor:
        logits: torch.Tensor = module(input_ids=torch.tensor([ids])).logits[0]
        return logits

    engine_tokens = [1, *engine.vocabulary.encode((TEXT * 8).removesuffix("\n"))]
    theirs = perplexity(evaluate, perplexity_windows(engine_tokens, 1, 64), "theirs")
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"rope_theta": 500000.0},
        {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1},
        {"vocab_size": 333},
    ],
    ids=["tied", "no GQA", "rope base", "3 heads", "padded vocabulary"],
)
def test_variants_equal_transformers(
    make_model: ModelMaker, tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = make_model(tmp_path / "model", seed=3, **changes)
    write_predictors(model, tmp_path / "predictors")
    out = tmp_path / "v.powerinfer.gguf"
    export(ExportConfig(model=str(model), predictors=tmp_path / "predictors", out=out))
    engine = Engine(out)
    tokens = tokens_of(model, 90)
    ours = engine.forward(tokens, KVCache(engine.hyper.n_layers))
    torch.testing.assert_close(ours, reference_logits(model, tokens), atol=LOGIT_TOLERANCE, rtol=0)


def test_within_exact_sums_a_product_has_no_order() -> None:
    """Of 512 float32 numbers it has."""
    left, right = torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(0))
    orders = [torch.randperm(512, generator=torch.Generator().manual_seed(n)) for n in range(20)]
    plain = [left @ right.T] + [left[:, order] @ right[:, order].T for order in orders]
    with ExactSums():
        exact = [left @ right.T] + [left[:, order] @ right[:, order].T for order in orders]
    assert not all(torch.equal(plain[0], product) for product in plain)
    assert all(torch.equal(exact[0], product) for product in exact)
    assert exact[0].dtype == torch.float32


def test_cache_gives_the_same_logits_as_one_pass(model_dir: Path, exact_bundle: Bundle) -> None:
    tokens = tokens_of(model_dir, 30)
    engine = Engine(exact_bundle.model_file)
    cache = KVCache(engine.hyper.n_layers)
    with ExactSums():
        whole = engine.forward(tokens, KVCache(engine.hyper.n_layers))
        parts = [engine.forward(tokens[:17], cache)]
        # One token at a time takes the path that gathers predicted neurons only.
        parts += [engine.forward([token], cache) for token in tokens[17:]]
    assert torch.equal(torch.cat(parts), whole)
    assert cache.length == 30


def test_counts_of_an_exact_predictor(exact_bundle: Bundle, model_dir: Path) -> None:
    engine = Engine(exact_bundle.model_file)
    counts = engine.count()
    engine.forward(tokens_of(model_dir, 100), KVCache(engine.hyper.n_layers))
    for layer in counts:
        metrics = layer.metrics(rank=128, d_model=64, d_ff=1012)
        assert layer.decisions == 100 * 1012
        assert 0.2 < metrics["activation_sparsity"] < 0.8
        # Float16 rounding of gate times norm may flip neurons whose gate is almost zero.
        assert metrics["activation_recall"] > 0.995
        assert metrics["precision"] > 0.995


def test_skip_rule_is_below_not_at_the_threshold(make_model: ModelMaker, tmp_path: Path) -> None:
    """A logit equal to the threshold is computed: zeros at threshold 0 skip nothing."""
    model = make_model(tmp_path / "model")
    write_predictors(
        model, tmp_path / "zeros", lambda gate: (torch.zeros(32, 64), torch.zeros(1012, 32))
    )
    out = tmp_path / "zeros.powerinfer.gguf"
    export(ExportConfig(model=str(model), predictors=tmp_path / "zeros", out=out))
    for threshold, share in ((0.0, 1), (1e-6, 0)):
        engine = Engine(out, threshold=threshold)
        counts = engine.count()
        engine.forward(tokens_of(model, 20), KVCache(2))
        assert counts[0].predicted == share * counts[0].decisions


def test_generation_is_greedy_and_counted(exact_bundle: Bundle) -> None:
    engine = Engine(exact_bundle.model_file)
    made = generate(engine, "def f(", 5)
    ids = [1, *engine.vocabulary.encode("def f(", space_prefix=False)]
    for token in made.tokens:
        assert int(engine.forward(ids, KVCache(2), last=1).argmax()) == token
        ids.append(token)
    assert len(made.tokens) == 5
    assert made.tokens_per_second > 0


def test_tokens_outside_the_vocabulary_are_refused(exact_bundle: Bundle) -> None:
    engine = Engine(exact_bundle.model_file)
    for tokens in ([], [320], [-1]):
        with pytest.raises(EngineError, match="vocabulary"):
            engine.forward(tokens, KVCache(2))
