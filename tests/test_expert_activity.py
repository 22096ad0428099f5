"""Activity of a mixture's experts against the published formula, and what is printed of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import refused
from families import Written, write
from mixtures import MIXTURES, routed_formula
from torch.nn.functional import cross_entropy

from architectures.tokenizer import load_tokenizer
from common.errors import SparsityError
from prosparse.expert_activity import expert_activity
from prosparse.settings import SparsityConfig

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not move.",
    "In the beginning there was a token, and the token was predicted.",
)


@pytest.fixture(scope="module")
def written(tokenizer_bytes: bytes, tmp_path_factory: pytest.TempPathFactory) -> Written:
    variant = next(v for v in MIXTURES if v.name == "smallthinker-21b").changed(
        torch_dtype="float32"
    )
    return write(variant, tmp_path_factory.mktemp("activity") / "model", tokenizer_bytes)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("held-out") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def by_formula(written: Written) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return tokens and active neurons, (layers, experts), and the perplexity."""
    c, wide = written.variant.config, {n: t.double() for n, t in written.tensors.items()}
    tokenizer = load_tokenizer(written.path, c["vocab_size"], c)
    tokens, active = torch.zeros(2, c["num_hidden_layers"], c["moe_num_primary_experts"])
    losses: list[torch.Tensor] = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer.bos_id(), *tokenizer.encode(text)])
        logits, layers = routed_formula(c, wide, ids)
        losses.append(cross_entropy(logits[:-1], ids[1:], reduction="none"))
        for layer, routed in enumerate(layers):
            for gates in routed.gates:
                for expert, gate in gates.items():
                    tokens[layer, expert] += 1
                    active[layer, expert] += int((gate > 0).sum())
    return tokens, active, math.exp(float(torch.cat(losses).mean()))


def test_activity_is_that_of_the_published_formula(written: Written, data: Path) -> None:
    found = expert_activity(SparsityConfig(model=str(written.path), data=str(data), context=128))
    tokens, active, ppl = by_formula(written)
    assert torch.equal(found.tokens, tokens.double())
    assert torch.equal(found.active, active.double())
    assert found.ppl == pytest.approx(ppl, rel=1e-4)
    share = float((active.sum(1) / (tokens.sum(1) * 32)).mean())
    assert found.mean == pytest.approx(1 - share)
    assert int(found.tokens.sum()) == found.run * 6 * 3


def test_the_command_prints_layers_and_experts(
    written: Written, data: Path, psp: Callable[..., Result]
) -> None:
    arguments = ("sparsity", "--model", written.path, "--data", data, "--context", 128)
    table = psp(*arguments).output
    assert "layer, sparsity % by expert" in table
    assert "experts unused" in table
    document: dict[str, Any] = json.loads(psp(*arguments, "--json").output)
    (setting,) = document["settings"]
    assert [row["layer"] for row in setting["layers"]] == list(range(6))
    experts = setting["layers"][2]["experts"]
    assert [row["expert"] for row in experts] == list(range(6))
    assert sum(row["tokens"] for row in experts) == 3 * document["tokens"]
    assert 0 < setting["activation_sparsity"] < 1


def test_thresholds_are_refused(written: Written, data: Path) -> None:
    config = SparsityConfig(model=str(written.path), data=str(data), thresholds=(0.1,))
    with refused(SparsityError, "mixture of experts", "--thresholds"):
        expert_activity(config)
