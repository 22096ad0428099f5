"""`psp generate`: the same text with the operators, and what it tells of both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import Result
from families import BY_NAME, write
from torch import nn

from architectures.checkpoint import Checkpoint
from architectures.model import load_model
from architectures.tokenizer import load_tokenizer
from sparse_operators.generation import Switch, common_length, continue_greedily, decode_by_turns
from sparse_operators.module import SparseGatedMLP

Psp = Callable[..., Result]
RUN = ("--prompt", "The quick", "-n", 12, "--repeats", 1, "--threads", 1)


def test_the_text_is_the_models_own_with_and_without_operators(psp: Psp, model_dir: Path) -> None:
    result = psp("generate", "--model", model_dir, *RUN, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    expected = greedy_without_cache(model_dir, "The quick", 12)
    assert document["dense"]["tokens"] == document["operators"]["tokens"] == expected
    assert document["same_tokens"] == 12
    tokenizer = load_tokenizer(model_dir, 320)
    assert document["operators"]["text"] == tokenizer.decode(expected)
    assert document["speedup"] == pytest.approx(
        document["operators"]["tokens_per_second"] / document["dense"]["tokens_per_second"]
    )
    assert document["prompt_tokens"] == len(tokenizer.encode("The quick")) + 1


def greedy_without_cache(model: Path, prompt: str, count: int) -> list[int]:
    checkpoint = Checkpoint.open(model)
    loaded = load_model(checkpoint, dtype=torch.float32, device="cpu")
    tokenizer = load_tokenizer(model, checkpoint.shape.vocab_size)
    ids = [tokenizer.bos_id(), *tokenizer.encode(prompt)]
    start = len(ids)
    while len(ids) < start + count:
        ids.append(int(loaded.logits(torch.tensor([ids]))[0, -1].argmax()))
    return ids[start:]


@pytest.mark.parametrize("name", ["prosparse", "minicpm-s", "turbosparse", "relu-mistral"])
def test_every_gated_family_runs_with_its_own_activation(
    psp: Psp, tmp_path: Path, tokenizer_bytes: bytes, name: str
) -> None:
    written = write(BY_NAME[name], tmp_path / name, tokenizer_bytes)
    options = ("--dtype", "float32", "--json")
    result = psp("generate", "--model", written.path, *RUN, *options)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["dense"]["tokens"] == document["operators"]["tokens"]


def test_the_report_is_text_speeds_and_whether_texts_agree(psp: Psp, model_dir: Path) -> None:
    result = psp("generate", "--model", model_dir, *RUN)
    assert result.exit_code == 0, result.output
    last = result.stdout.strip().splitlines()[-1]
    for part in ("with operators: ", " tokens/s, dense: ", "speedup ", "greedy text identical"):
        assert part in last


def test_the_dense_model_alone(psp: Psp, model_dir: Path) -> None:
    result = psp("generate", "--model", model_dir, *RUN, "--no-operators", "--json")
    document = json.loads(result.stdout)
    assert len(document["dense"]["tokens"]) == 12
    assert "operators" not in document
    assert "speedup" not in document
    report = psp("generate", "--model", model_dir, *RUN, "--no-operators").stdout
    assert report.strip().splitlines()[-1].startswith("dense: ")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_types(psp: Psp, model_dir: Path, dtype: str) -> None:
    result = psp("generate", "--model", model_dir, *RUN, "--dtype", dtype, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["dtype"] == dtype
    assert document["same_tokens"] >= 1


class CountingModel(nn.Module):
    """Continues n by n + 1, or by n + 2 while its FFN is sparse; cached as before 5.24."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.lengths, self.caches = 1, list[int](), list[int | None]()

    def forward(self, input_ids: torch.Tensor, use_cache: bool, past_key_values: Any = None) -> Any:
        assert use_cache
        self.lengths.append(input_ids.shape[1])
        self.caches.append(past_key_values)
        logits = nn.functional.one_hot((input_ids + self.step) % 100, 100).float()
        return SimpleNamespace(logits=logits, past_key_values=(past_key_values or 0) + 1)


class NewerModel(CountingModel):
    """Names its cache as transformers does from 5.24 on."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool, cache: Any = None) -> Any:
        output = super().forward(input_ids, use_cache, cache)
        return SimpleNamespace(logits=output.logits, cache=output.past_key_values)


@pytest.mark.parametrize("kind", [CountingModel, NewerModel])
def test_decoding_feeds_one_token_at_a_time(kind: type[CountingModel]) -> None:
    model = kind()
    made = continue_greedily(model, torch.tensor([[7, 8, 9]]), 4)
    assert made.tokens == [10, 11, 12, 13]
    assert model.lengths == [3, 1, 1, 1]
    assert model.caches == [None, 1, 2, 3]
    assert made.tokens_per_second == pytest.approx(3 / made.seconds)


def test_dense_and_sparse_take_turns_and_the_first_is_not_counted() -> None:
    model, order = CountingModel(), list[str]()

    @contextmanager
    def sparse() -> Iterator[None]:
        model.step = 2
        order.append("sparse")
        yield
        model.step = 1
        order.append("dense")

    kinds: dict[str, Switch] = {"dense": nullcontext, "operators": sparse}
    made = decode_by_turns(model, torch.tensor([[1]]), 3, kinds=kinds, repeats=2)
    assert order == ["sparse", "dense"] * 3
    assert made["dense"].tokens == [2, 3, 4]
    assert made["operators"].tokens == [3, 5, 7]
    assert [len(decoding.samples) for decoding in made.values()] == [2, 2]


def test_continuations_part_where_they_first_differ() -> None:
    assert common_length([1, 2, 3], [1, 2, 3]) == 3
    assert common_length([1, 2, 3], [1, 9, 3]) == 1
    assert common_length([1, 2], [1, 2, 3]) == 2
    assert common_length([2, 3, 4], [3, 5, 7]) == 0


def test_a_difference_is_reported(psp: Psp, model_dir: Path, monkeypatch: Any) -> None:
    exact = SparseGatedMLP.forward
    monkeypatch.setattr(SparseGatedMLP, "forward", lambda self, x: -3 * exact(self, x))
    result = psp("generate", "--model", model_dir, *RUN)
    assert "greedy text differs after " in result.stdout.splitlines()[-1]


def test_bad_input_is_one_line(
    psp: Psp, tmp_path: Path, tokenizer_bytes: bytes, model_dir: Path
) -> None:
    opt = write(BY_NAME["opt-125m"], tmp_path / "opt", tokenizer_bytes).path
    cases = [
        (("--model", tmp_path / "none"), 1, "no such directory"),
        (("--model", opt), 1, "opt has no gated FFN"),
        (("--model", model_dir, "--device", "cuda:9"), 1, "check --device"),
        (("--model", model_dir, "-n", 1), 2, "-n"),
        (("--model", model_dir, "-n", 500), 2, "exceed the model's context of 128"),
    ]
    for arguments, code, part in cases:
        result = psp("generate", *arguments)
        assert result.exit_code == code, result.output
        assert part in result.stderr.strip().splitlines()[-1]


def test_a_model_without_relu_is_refused(psp: Psp, model_dir: Path, tmp_path: Path) -> None:
    silu = tmp_path / "silu"
    silu.mkdir()
    for file in model_dir.iterdir():
        (silu / file.name).symlink_to(file)
    config = json.loads((silu / "config.json").read_text()) | {"hidden_act": "silu"}
    (silu / "config.json").unlink()
    (silu / "config.json").write_text(json.dumps(config))
    result = psp("generate", "--model", silu)
    assert result.exit_code == 1
    assert "hidden_act" in result.stderr
    assert "ReLU-fication" in result.stderr
