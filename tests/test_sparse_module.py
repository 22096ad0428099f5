"""SparseGatedMLP in the place of transformers' LlamaMLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from architectures.gated import DoubleReLU, FATReLU
from sparse_operators import SparseGatedMLP
from sparse_operators.module import replace_mlps, replaced_mlps

D_MODEL, D_FF, THRESHOLD = 48, 130, 0.4
SIZES: dict[str, Any] = {
    "hidden_size": D_MODEL,
    "intermediate_size": D_FF,
    "num_attention_heads": 4,
}


def relu_mlp(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    mlp: nn.Module = LlamaMLP(LlamaConfig(**(SIZES | {"hidden_act": "relu"} | changes)))
    return mlp.requires_grad_(False)


def fatrelu_mlp() -> nn.Module:
    mlp = relu_mlp()
    mlp.act_fn = FATReLU(THRESHOLD)
    return mlp


KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "relu": (relu_mlp, {}),
    "fatrelu": (fatrelu_mlp, {"threshold": THRESHOLD}),
    "drelu": (lambda: DoubleReLU(relu_mlp()), {"double_relu": True}),
}


def inputs(*shape: int) -> Tensor:
    return 3 * torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (2, 3), (1, 9), (3, 7), (4,)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_dense_module_does(kind: str, shape: tuple[int, ...]) -> None:
    make, options = KINDS[kind]
    x = inputs(*shape)
    dense = make()(x)
    sparse = SparseGatedMLP.from_mlp(make(), **options)(x)
    assert dense.abs().max() > 0.05
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_keep_their_precision_and_the_layout(dtype: torch.dtype) -> None:
    x = inputs(1, 2).to(dtype)
    dense = relu_mlp().to(dtype)(x)
    sparse = SparseGatedMLP.from_mlp(relu_mlp()).to(dtype)(x)
    assert sparse.dtype == dtype
    error = (sparse.double() - dense.double()).norm() / dense.double().norm()
    assert error <= (2e-3 if dtype == torch.float16 else 2e-2)


def test_one_token_reads_active_neurons_only() -> None:
    x = inputs(1, 1)
    mlp = relu_mlp()
    expected = mlp(x)
    inactive = mlp.get_submodule("gate_proj")(x)[0, 0] <= 0
    assert 0.2 < inactive.float().mean() < 0.8
    sparse = SparseGatedMLP.from_mlp(mlp)
    sparse.up_proj.weight[inactive] = torch.nan
    sparse.down_proj.weight[:, inactive] = torch.nan
    torch.testing.assert_close(sparse(x), expected, rtol=1e-5, atol=1e-6)


def test_parameters_are_llamas_and_there_is_one_copy_of_each() -> None:
    mlp = relu_mlp()
    expected = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    sparse = SparseGatedMLP.from_mlp(mlp)
    state = sparse.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor)
    assert sum(tensor.untyped_storage().nbytes() for tensor in state.values()) == 3 * 4 * (
        D_MODEL * D_FF
    )
    assert sparse.down_proj.weight.T.is_contiguous()


def test_a_checkpoint_of_the_dense_module_loads() -> None:
    sparse = SparseGatedMLP.from_mlp(relu_mlp())
    torch.manual_seed(5)
    other: nn.Module = LlamaMLP(LlamaConfig(**SIZES, hidden_act="relu"))
    sparse.load_state_dict(other.state_dict())
    x = inputs(1, 1)
    torch.testing.assert_close(sparse(x), other(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 12])
def test_it_compiles_in_one_graph(tokens: int) -> None:
    sparse = SparseGatedMLP.from_mlp(relu_mlp())
    x = inputs(1, tokens)
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), sparse(x))


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(2)
    sizes = {"num_hidden_layers": 2, "vocab_size": 60}
    config = LlamaConfig(**SIZES, **sizes, hidden_act="relu", initializer_range=0.2)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def test_a_whole_model_runs_with_it_and_is_itself_again_afterwards() -> None:
    model = tiny_model()
    blocks, tokens = model.model.layers, torch.tensor([[3, 1, 4, 1, 5]])
    originals = [block.mlp for block in blocks]
    dense = model(tokens).logits
    with replaced_mlps(blocks):
        assert all(isinstance(block.mlp, SparseGatedMLP) for block in blocks)
        torch.testing.assert_close(model(tokens).logits, dense, rtol=1e-4, atol=1e-5)
    assert [block.mlp for block in blocks] == originals
    assert all(block.mlp.down_proj.weight.is_contiguous() for block in blocks)
    assert torch.equal(model(tokens).logits, dense)


def test_replacing_for_good_tells_the_new_modules() -> None:
    model = tiny_model()
    made = replace_mlps(model.model.layers)
    assert made == [block.mlp for block in model.model.layers]


def test_a_model_is_restored_when_a_later_block_cannot_be_replaced() -> None:
    model = tiny_model()
    blocks = model.model.layers
    blocks[1].mlp.act_fn = nn.SiLU()
    with pytest.raises(ValueError, match="act_fn is SiLU"), replaced_mlps(blocks):
        pass
    assert [type(block.mlp) for block in blocks] == [LlamaMLP, LlamaMLP]
    assert all(block.mlp.down_proj.weight.is_contiguous() for block in blocks)


@pytest.mark.parametrize(
    ("mlp", "options", "parts"),
    [
        (lambda: relu_mlp(hidden_act="silu"), {}, "act_fn is SiLU.*expected ReLU"),
        (relu_mlp, {"threshold": 0.1}, "expected FATReLU from 0.1"),
        (fatrelu_mlp, {}, "expected ReLU"),
        (fatrelu_mlp, {"threshold": 0.41}, "expected FATReLU from 0.41"),
        (relu_mlp, {"threshold": -1.0}, "threshold is -1.0"),
        (lambda: relu_mlp(mlp_bias=True), {}, "gate_proj has a bias: expected none"),
        (lambda: nn.Linear(3, 3), {}, "Linear is no gated FFN"),
    ],
)
def test_what_it_cannot_stand_for_is_refused(
    mlp: Callable[[], nn.Module], options: dict[str, Any], parts: str
) -> None:
    with pytest.raises(ValueError, match=parts):
        SparseGatedMLP.from_mlp(mlp(), **options)


def test_projections_must_fit_each_other() -> None:
    gate, up, down = (nn.Linear(*sizes, bias=False) for sizes in ((4, 6), (4, 7), (6, 4)))
    with pytest.raises(ValueError, match=r"up_proj.weight has shape \(7, 4\): expected \(6, 4\)"):
        SparseGatedMLP(gate, up, down)
