"""What differs from the model that a file was made from is told, and by the right check."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import ModelMaker, exact, make_export, refused, write_predictors
from families import BY_NAME, write
from test_verification import SCORES, STRUCTURE, TOKENS, changed, each, failures, fill
from test_weights import Change, Content, put, value

from common.errors import CheckpointError
from gguf_export.bundle import Bundle
from gguf_export.contract import Report
from powerinfer_bridge.verify import tokens
from powerinfer_bridge.verify.verification import verify

MODEL = [
    "model fingerprint",
    "model sizes",
    "model tensors",
    "model tokenizer",
    "dense logits",
    "sparse logits",
    "perplexity gap",
]


def test_a_good_file_passes_every_check_against_its_model(
    exact_bundle: Bundle, model_dir: Path
) -> None:
    document = verify(exact_bundle.model_file, str(model_dir), max_ppl_gap=0.001).document()
    assert document["ok"], failures(document)
    assert [check["name"] for check in document["checks"]] == ["checksum", *STRUCTURE, *MODEL]
    assert 0 < document["logit_difference_dense"] < 0.05 * document["logit_spread"]
    assert document["logit_spread"] > 0.5
    assert abs(document["ppl_gap"]) < 1e-3
    assert document["ppl_gap"] == document["ppl_sparse"] / document["ppl_dense"] - 1


@pytest.mark.parametrize("name", ["minicpm-s", "minicpm", "prosparse", "bamboo", "llama-tied"])
def test_files_of_every_family_pass(name: str, tokenizer_bytes: bytes, tmp_path: Path) -> None:
    """Folded constants, FATReLU, dReLU and tied embeddings."""
    model = write(BY_NAME[name].changed(intermediate_size=1012), tmp_path / "m", tokenizer_bytes)
    write_predictors(model.path, tmp_path / "predictors")
    bundle = make_export(model.path, tmp_path / "predictors", tmp_path / "m.powerinfer.gguf")
    document = verify(bundle.model_file, str(model.path), context=32, chunks=1).document()
    assert document["ok"], failures(document)


def tokenizer_line(report: Report) -> str:
    return report.checks["model tokenizer"].line


def test_ids_are_compared_with_those_of_transformers_loader(
    exact_bundle: Bundle, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a bare tokenizer.model transformers 5.23 makes one without a space in front, 5.24 not."""

    def line() -> str:
        return tokenizer_line(verify(exact_bundle.model_file, str(model_dir), run=False))

    assert "ids equal those of tokenizer.model, by sentencepiece" in line()
    assert re.search(
        r"; transformers' \w+ gives (other ids for \d+\.\d\d%|the same ids), (no )?BOS first$",
        line(),
    )

    def loader(vocab: dict[str, int] | None) -> Any:
        if vocab is None:
            raise ValueError("no such class\nat all")
        return SimpleNamespace(get_vocab=lambda: vocab, encode=lambda text, **_: [])

    monkeypatch.setattr(tokens, "load_with_transformers", lambda checkpoint: loader({}))
    assert re.search(r" gives other ids for \d+\.\d\d%, no BOS first$", line())
    monkeypatch.setattr(tokens, "load_with_transformers", lambda checkpoint: loader(None))
    assert line().endswith("; transformers does not load this tokenizer (no such class)")
    monkeypatch.setattr(tokens, "load_with_transformers", lambda checkpoint: loader({"<s>": 2}))
    assert "token 2 is '</s>', for transformers '<s>'; keep the model's own" in line()


def swap(one: str, other: str) -> Change:
    def change(content: Content) -> None:
        tensors = content.tensors
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return change


def straight(weight: Any) -> Any:
    """Undo the reordering of query rows for ggml's RoPE (4 heads of 16)."""
    return weight.reshape(4, 8, 2, 64).swapaxes(1, 2).reshape(64, 64)


def rename(content: Content) -> None:
    """Give a frequent piece another text: the space and `t`."""
    tokens = content.keys[TOKENS][0]
    tokens[tokens.index("\u2581t".encode())] = b"qqqqq"


WRONG: dict[str, tuple[Change, set[str]]] = {
    "layers swapped": (
        swap("blk.0.ffn_gate.weight", "blk.1.ffn_gate.weight"),
        {"model tensors", "dense logits"},
    ),
    "gate and up swapped": (
        swap("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"),
        {"model tensors", "dense logits"},
    ),
    "query rows not permuted": (
        put("blk.0.attn_q.weight", straight),
        {"model tensors", "dense logits"},
    ),
    "one weight": (fill("blk.1.ffn_down_t.weight", 1e-4), {"model tensors"}),
    "huge head": (
        put("output.weight", lambda x: np.clip(x.astype(np.float32) * 1e5, -6e4, 6e4).astype("e")),
        {"model tensors", "dense logits", "perplexity gap"},
    ),
    "RoPE base": (value("llama.rope.freq_base", 10001.0), {"model sizes"}),
    "epsilon": (value("llama.attention.layer_norm_rms_epsilon", 1e-6), {"model sizes"}),
    "FATReLU": (value("psp.activation_threshold", 0.1), {"model sizes"}),
    "context": (value("llama.context_length", 256), {"model sizes"}),
    "token": (rename, {"model tokenizer"}),
    "scores": (
        each(SCORES, lambda scores: scores.__setitem__(slice(259, 290), scores[289:258:-1])),
        {"model tokenizer"},
    ),
    "BOS": (
        lambda content: content.set("tokenizer.ggml.bos_token_id", 2),
        {"model tokenizer"},
    ),
    "fingerprint": (value("psp.model_fingerprint", b"0" * 64), {"model fingerprint"}),
    "predictor NaN": (fill("blk.0.fc1.weight", math.nan), {"predictors finite"}),
    "weight NaN": (
        put("blk.0.attn_v.weight", lambda x: x * np.float16("nan")),
        {"weights finite", "model tensors", "dense logits", "sparse logits", "perplexity gap"},
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_differs_from_the_model_is_caught(
    exact_bundle: Bundle, model_dir: Path, tmp_path: Path, name: str
) -> None:
    change, checks = WRONG[name]
    path = changed(exact_bundle, tmp_path, change)
    assert failures(verify(path, str(model_dir), context=64, chunks=1).document()).keys() == checks


def test_another_model_of_the_same_sizes_is_told(
    exact_bundle: Bundle, make_model: ModelMaker, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", seed=5)
    found = failures(verify(exact_bundle.model_file, str(other), context=64, chunks=1).document())
    assert found.keys() == {"model fingerprint", "model tensors", "dense logits"}


def test_a_model_of_other_sizes_is_told(
    exact_bundle: Bundle, make_model: ModelMaker, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", num_hidden_layers=3, vocab_size=352)
    found = failures(verify(exact_bundle.model_file, str(other), context=64, chunks=1).document())
    assert found.keys() == {"model fingerprint", "model sizes", "model tensors"}
    assert "vocabulary is 320, the model has 352" in found["model sizes"]


def test_a_model_that_cannot_be_used_is_an_error(exact_bundle: Bundle, tmp_path: Path) -> None:
    with refused(CheckpointError, "no such directory"):
        verify(exact_bundle.model_file, str(tmp_path / "none"))


@pytest.fixture(scope="module")
def poor_bundle(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An export whose predictors choose the inactive half of the neurons."""
    path = tmp_path_factory.mktemp("poor")
    write_predictors(model_dir, path / "predictors", lambda gate: exact(-gate))
    return make_export(model_dir, path / "predictors", path / "poor.powerinfer.gguf")


def test_poor_predictors_are_told_and_judged_by_the_bound(
    poor_bundle: Bundle, model_dir: Path
) -> None:
    document = verify(poor_bundle.model_file, str(model_dir), context=64, chunks=2).document()
    assert document["ok"]
    assert document["logit_difference_sparse"] > 20 * document["logit_difference_dense"]
    gap = document["ppl_gap"]
    assert abs(gap) > 1e-3
    for bound, fails in ((gap + 1e-6, set()), (gap - 1e-6, {"perplexity gap"})):
        judged = verify(
            poor_bundle.model_file, str(model_dir), max_ppl_gap=bound, context=64, chunks=2
        ).document()
        assert failures(judged).keys() == fails


def test_windows_of_a_few_tokens_are_refused(exact_bundle: Bundle, model_dir: Path) -> None:
    found = failures(verify(exact_bundle.model_file, str(model_dir), context=4).document())
    assert found.keys() == {"dense logits", "sparse logits", "perplexity gap"}
