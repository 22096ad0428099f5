"""The L1 term against the formula written out, and its gradients through checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from architectures.gated import FATReLU
from prosparse.activation import set_activation
from prosparse.regulariser import L1Regulariser, Watch, active_share, l1_term

TOKENS = torch.arange(24).reshape(2, 12) % 40
HALVES = (TOKENS[:1], TOKENS[1:])


def tiny(activation: str = "relu") -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        hidden_act="silu",
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    set_activation(model, activation)
    return model


def regulariser(model: Any, norm: str = "mean") -> L1Regulariser:
    return L1Regulariser(list(model.model.layers), "mlp.down_proj", norm)


def watched(model: Any, norm: str = "mean") -> Watch:
    with regulariser(model, norm).watching() as watch:
        model(input_ids=TOKENS)
    return watch


def intermediates(model: Any) -> list[torch.Tensor]:
    """relu(gate(x)) * up(x) of every layer, from the FFN's input and weights alone."""
    inputs: list[torch.Tensor] = []
    handles = [
        block.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        for block in model.model.layers
    ]
    model(input_ids=TOKENS)
    for handle in handles:
        handle.remove()
    return [
        torch.relu(x @ block.mlp.gate_proj.weight.T) * (x @ block.mlp.up_proj.weight.T)
        for x, block in zip(inputs, model.model.layers, strict=True)
    ]


@pytest.mark.parametrize("norm", ["mean", "sum"])
def test_the_term_is_equation_2(norm: str) -> None:
    model = tiny()
    expected = torch.tensor(0.0)
    for x1 in intermediates(model):
        norms = torch.stack([token.abs().sum() for token in x1.flatten(0, 1)])
        expected = expected + norms.mean() / (48 if norm == "mean" else 1)
    assert watched(model, norm).term().item() == pytest.approx(expected.item(), rel=1e-5)


def test_shares_are_counted_a_layer() -> None:
    model = tiny()
    expected = [(x1 != 0).float().mean().item() for x1 in intermediates(model)]
    shares = watched(model).shares().tolist()
    assert shares == pytest.approx(expected)
    assert len(set(shares)) == 3
    assert all(0.3 < share < 0.7 for share in shares)


def test_half_precision_is_summed_in_float32() -> None:
    many = torch.full((4096, 1024), 0.001, dtype=torch.bfloat16)
    exact = float(many[0, 0])
    assert l1_term(many).item() == pytest.approx(exact, rel=1e-5)
    assert l1_term(many, "sum").item() == pytest.approx(1024 * exact, rel=1e-5)


def test_a_share_has_no_gradient() -> None:
    x = torch.tensor([[0.0, -1.0, 2.0, 0.0]], requires_grad=True)
    assert active_share(x).item() == 0.5
    assert not active_share(x).requires_grad
    (gradient,) = torch.autograd.grad(l1_term(x), x)
    assert gradient.tolist() == [[0.0, -0.25, 0.25, 0.0]]


def gradients(model: Any, *, checkpointing: bool) -> dict[str, torch.Tensor]:
    model.train()
    if checkpointing:
        # Its older name is that of transformers before 5.24.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(model, name) for name in names if hasattr(model, name))
        enable({"use_reentrant": False})
    regularise = regulariser(model)
    total = torch.tensor(0.0)
    for half in HALVES:  # as under accumulation: one backward pass after the other
        with regularise.watching() as watch:
            loss = model(input_ids=half, labels=half, use_cache=False).loss
        part = (loss + 3 * watch.term()) / 2
        part.backward()
        total = total + part.detach()
    return {name: weight.grad for name, weight in model.named_parameters()} | {"total": total}


def test_checkpointing_changes_neither_the_term_nor_its_gradients() -> None:
    plain = gradients(tiny(), checkpointing=False)
    recomputed = gradients(tiny(), checkpointing=True)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)
    # And the term has gradients of its own: without it they are others.
    model = tiny()
    for half in HALVES:
        (model(input_ids=half, labels=half).loss / 2).backward()
    gate = model.model.layers[0].mlp.gate_proj.weight
    assert not torch.allclose(plain["model.layers.0.mlp.gate_proj.weight"], gate.grad, rtol=0.1)


def test_nothing_is_kept_while_nobody_watches() -> None:
    model = tiny()
    regularise = regulariser(model)
    with regularise.watching() as watch:
        model(input_ids=TOKENS)
    before = watch.term()
    model(input_ids=TOKENS[:, :3])
    assert watch.term() == before
    with regularise.watching() as watch:
        pass
    assert watch.terms == [None, None, None]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("relu", [0.0, 0.0, 0.05, 0.5, 2.0]),
        ("fatrelu", [0.0, 0.0, 0.0, 0.5, 2.0]),
        ("silu", [-1 / (1 + torch.e), 0.0, 0.0256249, 0.3112296, 1.7615942]),
    ],
)
def test_the_activation_is_replaced_in_model_and_config(name: str, values: list[float]) -> None:
    model = tiny()
    set_activation(model, name, 0.5)
    assert model.config.hidden_act == name
    if name == "fatrelu":
        assert model.config.hidden_act_param == 0.5
    for block in model.model.layers:
        activation = block.mlp.act_fn
        assert isinstance(activation, nn.Module)
        assert isinstance(activation, FATReLU) == (name == "fatrelu")
        found = activation(torch.tensor([-1.0, 0.0, 0.05, 0.5, 2.0]))
        assert found.tolist() == pytest.approx(values, abs=1e-6)
