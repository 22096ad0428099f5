"""SmallThinker: what is read of a checkpoint, what is refused, and what the graph computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from families import Variant, Written, save_tensors, write
from mixtures import MIXTURES, SMALL

from architectures.checkpoint import Checkpoint
from architectures.model import block_bytes, load_model
from architectures.registry import with_class
from architectures.spec import Experts, LayerAttention
from common.errors import CheckpointError

TOLERANCE = 5e-5
"""Float32 noise of logits of standard deviation above 0.3."""

BY_NAME = {variant.name: variant for variant in MIXTURES}


@pytest.fixture(scope="module", params=MIXTURES, ids=lambda variant: variant.name)
def written(
    request: pytest.FixtureRequest,
    tokenizer_bytes: bytes,
    tmp_path_factory: pytest.TempPathFactory,
) -> Written:
    variant: Variant = request.param
    return write(variant, tmp_path_factory.mktemp("mixture") / variant.name, tokenizer_bytes)


def some_tokens(length: int = 24) -> torch.Tensor:
    return torch.randint(12, 320, (2, length), generator=torch.Generator().manual_seed(0))


def test_logits_equal_the_published_formula(written: Written) -> None:
    tokens = some_tokens()
    model = load_model(
        Checkpoint.open(written.path, experts=True), dtype=torch.float32, device="cpu"
    )
    expected = torch.stack([written.reference(row.tolist()).logits for row in tokens])
    assert expected.std() > 0.3
    torch.testing.assert_close(model.logits(tokens).double(), expected, atol=TOLERANCE, rtol=0)


def test_what_a_window_and_missing_positions_change_is_seen(
    tmp_path: Path, tokenizer_bytes: bytes
) -> None:
    """The formula would not tell apart what changes nothing."""
    variant, ids = BY_NAME["smallthinker-layouts-apart"], some_tokens()[0].tolist()
    logits = write(variant, tmp_path / "as-it-is", tokenizer_bytes).reference(ids).logits
    changes: dict[str, object] = {
        "sliding_window_size": 24,
        "rope_layout": [1] * 6,
        "sliding_window_layout": [0] * 6,
        "moe_primary_router_apply_softmax": True,
        "moe_num_active_primary_experts": 2,
    }
    for key, value in changes.items():
        other = write(variant.changed(**{key: value}), tmp_path / key, tokenizer_bytes)
        assert (other.reference(ids).logits - logits).abs().max() > 100 * TOLERANCE, key


def test_streamed_blocks_compute_the_same(written: Written) -> None:
    checkpoint, tokens = Checkpoint.open(written.path, experts=True), some_tokens(9)
    found = [
        load_model(checkpoint, dtype=torch.float32, device="cpu", weights=kind).logits(tokens)
        for kind in ("resident", "streamed")
    ]
    assert torch.equal(*found)


def test_experts_stay_in_the_type_that_they_are_stored_in(
    tmp_path: Path, tokenizer_bytes: bytes
) -> None:
    path = write(BY_NAME["smallthinker-4b"], tmp_path / "model", tokenizer_bytes).path
    checkpoint = Checkpoint.open(path, experts=True)
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    kinds = {name: weight.dtype for name, weight in model.blocks[0].named_parameters()}
    assert {kind for name, kind in kinds.items() if ".experts." in name} == {torch.bfloat16}
    assert {kind for name, kind in kinds.items() if ".experts." not in name} == {torch.float32}
    held = sum(weight.nbytes for weight in model.blocks[0].parameters())
    assert block_bytes(checkpoint, torch.float32) == held


def test_the_sizes_of_both_layouts(tmp_path: Path, tokenizer_bytes: bytes) -> None:
    small, large = (
        Checkpoint.open(write(BY_NAME[name], tmp_path / name, tokenizer_bytes).path, experts=True)
        for name in ("smallthinker-4b", "smallthinker-21b")
    )
    assert small.shape.tied_embeddings
    assert not large.shape.tied_embeddings
    assert small.shape.experts == Experts(count=4, chosen=2, gating="sigmoid")
    assert small.shape.attention == LayerAttention(
        rotary=(True,) * 3, windowed=(False,) * 3, window=0
    )
    turns = (False, True, True, True, False, True)
    assert large.shape.attention == LayerAttention(rotary=turns, windowed=turns, window=4096)
    assert large.shape.n_heads * large.shape.head_dim > large.shape.d_model
    assert (small.shape.d_ff, small.shape.activation) == (32, "relu")
    assert small.fingerprint != large.fingerprint


def test_a_directory_without_a_class_is_known_by_its_model_type() -> None:
    config = {key: value for key, value in SMALL.items() if key != "architectures"}
    assert with_class(config)["architectures"] == ["SmallThinkerForCausalLM"]


BAD: tuple[tuple[dict[str, Any], str], ...] = (
    ({"norm_topk_prob": False}, "norm_topk_prob is False"),
    ({"use_qk_norm": True}, "use_qk_norm is True"),
    ({"moe_enable_early_router": False}, "moe_enable_early_router is False"),
    ({"moe_enable_secondary_experts": True}, "moe_enable_secondary_experts is True"),
    ({"moe_shared_primary_experts": 1}, "moe_shared_primary_experts is 1"),
    ({"moe_layer_layout": [1, 0, 1]}, "moe_layer_layout is [1, 0, 1]"),
    ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
    ({"rope_layout": [1, 1]}, "rope_layout is [1, 1], expected a list of 3"),
    ({"sliding_window_layout": [0, 2, 0]}, "expected a list of 3 numbers, each 0 or 1"),
    ({"sliding_window_layout": 1}, "sliding_window_layout is 1"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is 'yarn'"),
    ({"moe_num_active_primary_experts": 5}, "expected at most 4 experts"),
    ({"moe_num_primary_experts": 0}, "moe_num_primary_experts is 0"),
    ({"moe_primary_router_apply_softmax": "yes"}, "moe_primary_router_apply_softmax is 'yes'"),
    ({"head_dim": None}, "head_dim is None"),
    ({"head_dim": 15}, "head_dim is 15, expected an even number"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor of 4"),
)


@pytest.mark.parametrize(("changes", "said"), BAD, ids=lambda value: str(value)[:40])
def test_what_the_published_code_does_not_compute_is_refused_in_a_line(
    tmp_path: Path, tokenizer_bytes: bytes, changes: dict[str, Any], said: str
) -> None:
    written = write(BY_NAME["smallthinker-4b"], tmp_path / "model", tokenizer_bytes)
    config = {k: v for k, v in (dict(SMALL) | changes).items() if v is not None}
    checkpoint = Checkpoint.open(written.path, experts=True)
    with refused(CheckpointError, "config.json", said):
        Checkpoint.of(checkpoint.origin, config, experts=True)


def test_an_expert_that_is_missing_is_named(tmp_path: Path, tokenizer_bytes: bytes) -> None:
    written = write(BY_NAME["smallthinker-4b"], tmp_path / "model", tokenizer_bytes)
    gone = "model.layers.1.block_sparse_moe.experts.3.up.weight"
    tensors = {name: tensor for name, tensor in written.tensors.items() if name != gone}
    save_tensors(tensors, written.path, "safetensors")
    with refused(CheckpointError, gone):
        Checkpoint.open(written.path, experts=True)


def test_who_asks_for_no_experts_is_told_what_to_use(
    tmp_path: Path, tokenizer_bytes: bytes
) -> None:
    path = write(BY_NAME["smallthinker-21b"], tmp_path / "model", tokenizer_bytes).path
    with refused(CheckpointError, "mixture of experts", "--engine smallthinker"):
        Checkpoint.open(path)
