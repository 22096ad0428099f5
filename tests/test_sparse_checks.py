"""Bad input of the operators: one line that names the tensor, the expectation and the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_operators import sparse_down, sparse_up, sparse_up_down

D_MODEL, D_FF = 8, 12


def good(tokens: int = 2) -> dict[str, Tensor]:
    """Return arguments in a type for which nothing is compiled."""
    shapes = {
        "scores": (tokens, D_FF),
        "x": (tokens, D_MODEL),
        "w1": (D_FF, D_MODEL),
        "w2t": (D_FF, D_MODEL),
        "x1": (tokens, D_FF),
    }
    return {name: torch.ones(shape, dtype=torch.float16) for name, shape in shapes.items()}


ARGUMENTS: dict[Callable[..., Tensor], tuple[str, ...]] = {
    sparse_up: ("scores", "x", "w1"),
    sparse_down: ("x1", "w2t"),
    sparse_up_down: ("scores", "x", "w1", "w2t"),
}


def call(operator: Callable[..., Tensor], parts: dict[str, Tensor], **options: object) -> Tensor:
    return operator(*(parts[name] for name in ARGUMENTS[operator]), **options)


def refused(operator: Callable[..., Tensor], parts: dict[str, Tensor], **options: object) -> str:
    with pytest.raises(ValueError, match=r"expected|choose") as caught:
        call(operator, parts, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


CASES = [(operator, name) for operator, names in ARGUMENTS.items() for name in names]
IDS = [f"{operator.__name__}-{name}" for operator, name in CASES]


@pytest.mark.parametrize("operator", ARGUMENTS, ids=lambda operator: operator.__name__)
@pytest.mark.parametrize("tokens", [1, 8])
def test_good_input_is_accepted(operator: Callable[..., Tensor], tokens: int) -> None:
    assert call(operator, good(tokens)).shape[0] == tokens


@pytest.mark.parametrize(("operator", "name"), CASES, ids=IDS)
def test_a_tensor_of_another_type(operator: Callable[..., Tensor], name: str) -> None:
    parts = good()
    parts[name] = parts[name].float()
    message = refused(operator, parts)
    assert f"{name} is torch.float32" in message
    assert "torch.float16" in message
    assert "expected one type" in message


@pytest.mark.parametrize("operator", ARGUMENTS, ids=lambda operator: operator.__name__)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bool])
def test_types_that_no_kernel_takes(operator: Callable[..., Tensor], dtype: torch.dtype) -> None:
    parts = {name: part.to(dtype) for name, part in good().items()}
    assert "float16, bfloat16 or float32" in refused(operator, parts)


CHANGES = [
    (operator, name, change)
    for operator, name in CASES
    for change in ("row", "column", "vector")
    # Where another number of tokens or of columns is just another call.
    if (operator, name, change) not in [(sparse_down, "x1", "row"), (sparse_down, "w2t", "column")]
]


@pytest.mark.parametrize(("operator", "name", "change"), CHANGES)
def test_a_wrong_shape(operator: Callable[..., Tensor], name: str, change: str) -> None:
    parts = good()
    rows, columns = parts[name].shape
    wrong = {"row": (rows + 1, columns), "column": (rows, columns + 1), "vector": (columns,)}
    parts[name] = torch.ones(wrong[change], dtype=torch.float16)
    assert "shape" in refused(operator, parts)


@pytest.mark.parametrize(("operator", "name"), [c for c in CASES if c[1] in ("w1", "w2t")])
def test_a_weight_that_is_not_contiguous(operator: Callable[..., Tensor], name: str) -> None:
    parts = good()
    parts[name] = parts[name].T.contiguous().T
    message = refused(operator, parts)
    assert message.startswith(f"{name} is not contiguous")
    assert ".contiguous()" in message


@pytest.mark.parametrize(("operator", "name"), [c for c in CASES if c[1] in ("scores", "x", "x1")])
def test_rows_that_are_not_contiguous_are_taken(operator: Callable[..., Tensor], name: str) -> None:
    parts = good()
    expected = call(operator, parts)
    parts[name] = parts[name].T.contiguous().T
    assert torch.equal(call(operator, parts), expected)


@pytest.mark.parametrize(("operator", "name"), CASES, ids=IDS)
def test_another_device(operator: Callable[..., Tensor], name: str) -> None:
    # The dispatcher itself picks the fake kernel for meta tensors, where the same checks stand.
    parts = good()
    parts[name] = parts[name].to("meta")
    assert "device" in refused(operator, parts, check=False)


@pytest.mark.parametrize("operator", ARGUMENTS, ids=lambda operator: operator.__name__)
@pytest.mark.parametrize("tokens", [0, 9])
def test_too_few_and_too_many_tokens(operator: Callable[..., Tensor], tokens: int) -> None:
    assert f"has {tokens} tokens: expected 1 to 8" in refused(operator, good(tokens))


@pytest.mark.parametrize(("operator", "name"), [c for c in CASES if c[1] in ("w1", "w2t")])
def test_an_empty_weight(operator: Callable[..., Tensor], name: str) -> None:
    parts = good()
    parts[name] = torch.ones(0, D_MODEL, dtype=torch.float16)
    assert refused(operator, parts).startswith(f"{name} has shape (0, 8)")


@pytest.mark.parametrize(("operator", "name"), [c for c in CASES if c[1] in ("scores", "x1")])
def test_nan(operator: Callable[..., Tensor], name: str) -> None:
    parts = good()
    parts[name][1, 3] = math.nan
    assert refused(operator, parts).startswith(f"{name} holds 1 NaN among 24 values")
    call(operator, parts, check=False)


@pytest.mark.parametrize("operator", [sparse_up, sparse_up_down])
@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf, -math.inf])
def test_thresholds_that_mean_nothing(operator: Callable[..., Tensor], threshold: float) -> None:
    assert f"threshold is {threshold}" in refused(operator, good(), threshold=threshold)


def test_a_threshold_beyond_the_type() -> None:
    assert "too large for torch.float16" in refused(sparse_up, good(), threshold=1e6)
