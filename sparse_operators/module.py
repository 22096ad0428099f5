"""A gated ReLU FFN that skips inactive neurons, in the place of transformers' LlamaMLP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparse_operators.checks import check_threshold
from sparse_operators.operators import sparse_down, sparse_up, sparse_up_down
from sparse_operators.reference import computes
from sparse_operators.settings import MAX_TOKENS


class SparseGatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, with the up and down projections of active neurons only.

    Parameters have LlamaMLP's names and shapes, so checkpoints fit both. Only the memory layout of
    `down_proj.weight` differs: neuron by neuron, which is what S3 reads. Longer batches, such as a
    prompt, go the dense way with the same weights.
    """

    def __init__(
        self,
        gate_proj: nn.Linear,
        up_proj: nn.Linear,
        down_proj: nn.Linear,
        *,
        threshold: float = 0.0,
        double_relu: bool = False,
    ) -> None:
        """Take over three projections; `down_proj.weight` is laid out anew in place.

        Args:
            gate_proj: weight (d_ff, d_model).
            up_proj: weight (d_ff, d_model).
            down_proj: weight (d_model, d_ff).
            threshold: 0 for ReLU, T for FATReLU.
            double_relu: `up`, too, passes a ReLU (dReLU, arXiv 2406.05955 §4).

        Raises:
            ValueError: a bias, sizes that do not fit, or a threshold that is no number from 0 on.
        """
        super().__init__()
        d_ff, d_model = gate_proj.weight.shape
        _check("gate_proj", gate_proj, (d_ff, d_model))
        _check("up_proj", up_proj, (d_ff, d_model))
        _check("down_proj", down_proj, (d_model, d_ff))
        check_threshold(threshold, gate_proj.weight.dtype)
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.threshold, self.double_relu = threshold, double_relu
        # Column by column; the values stay.
        down_proj.weight.data = down_proj.weight.data.T.contiguous().T

    @classmethod
    def from_mlp(
        cls, mlp: nn.Module, *, threshold: float = 0.0, double_relu: bool = False
    ) -> SparseGatedMLP:
        """Take over the projections of a LlamaMLP or of a module with the same three.

        Args:
            mlp: has `gate_proj`, `up_proj`, `down_proj` and, unless it computes its activation
                itself, `act_fn`.
            threshold: as above.
            double_relu: as above.

        Raises:
            ValueError: no such projections, or `act_fn` is not the activation named here.
        """
        parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if not all(isinstance(part, nn.Linear) for part in parts):
            raise ValueError(
                f"{type(mlp).__name__} is no gated FFN: expected linear gate_proj, up_proj and "
                "down_proj, as in transformers' LlamaMLP"
            )
        gate, up, down = (part for part in parts if isinstance(part, nn.Linear))
        act_fn = getattr(mlp, "act_fn", None)
        if act_fn is not None and not _is_activation(act_fn, threshold):
            wanted = f"FATReLU from {threshold}" if threshold else "ReLU"
            raise ValueError(
                f"act_fn is {act_fn}: expected {wanted}, because only that makes neurons exactly "
                "zero; pass the model's own threshold, or a ReLU-fied model"
            )
        return cls(gate, up, down, threshold=threshold, double_relu=double_relu)

    def forward(self, x: Tensor) -> Tensor:
        """Return the FFN's output (..., d_model) for `x` (..., d_model)."""
        rows = x.reshape(-1, x.shape[-1])
        scores = self.gate_proj(rows)
        if len(rows) > MAX_TOKENS:
            return self._dense(rows, scores).view(x.shape)
        w1, w2t, threshold = self.up_proj.weight, self.down_proj.weight.T, self.threshold
        if self.double_relu:
            # The gate's half is not negative, so the ReLU on `up` may come after their product.
            x1 = sparse_up(scores, rows, w1, threshold=threshold, check=False).relu()
            return sparse_down(x1, w2t, check=False).view(x.shape)
        y = sparse_up_down(scores, rows, w1, w2t, threshold=threshold, check=False)
        return y.view(x.shape)

    def _dense(self, rows: Tensor, scores: Tensor) -> Tensor:
        up = self.up_proj(rows)
        gated = torch.where(computes(scores, self.threshold), scores, 0)
        y: Tensor = self.down_proj(gated * (up.relu() if self.double_relu else up))
        return y

    def extra_repr(self) -> str:
        """Tell the activation."""
        return f"threshold={self.threshold}, double_relu={self.double_relu}"


def replace_mlps(
    blocks: Iterable[nn.Module],
    *,
    name: str = "mlp",
    threshold: float = 0.0,
    double_relu: bool = False,
) -> list[SparseGatedMLP]:
    """Put a `SparseGatedMLP` in the place of the FFN of every block of a model.

    Args:
        blocks: a Hugging Face model's blocks, such as `model.model.layers`.
        name: what a block calls its FFN.
        threshold: 0 for ReLU, T for FATReLU.
        double_relu: see `SparseGatedMLP`.

    Raises:
        ValueError: an FFN is not such a one.
    """
    made = []
    for block in blocks:
        mlp = block.get_submodule(name)
        sparse = SparseGatedMLP.from_mlp(mlp, threshold=threshold, double_relu=double_relu)
        setattr(block, name, sparse)
        made.append(sparse)
    return made


@contextmanager
def replaced_mlps(
    blocks: Iterable[nn.Module],
    *,
    name: str = "mlp",
    threshold: float = 0.0,
    double_relu: bool = False,
) -> Iterator[None]:
    """Do the same for a while; then the model is what it was, memory layout included."""
    blocks = list(blocks)
    originals = [block.get_submodule(name) for block in blocks]
    try:
        replace_mlps(blocks, name=name, threshold=threshold, double_relu=double_relu)
        yield
    finally:
        for block, original in zip(blocks, originals, strict=True):
            setattr(block, name, original)
            down = original.get_submodule("down_proj")
            assert isinstance(down, nn.Linear)
            down.weight.data = down.weight.data.contiguous()


def _check(name: str, linear: nn.Linear, shape: tuple[int, int]) -> None:
    if tuple(linear.weight.shape) != shape:
        raise ValueError(
            f"{name}.weight has shape {tuple(linear.weight.shape)}: expected {shape}, to fit "
            "gate_proj.weight (d_ff, d_model)"
        )
    if linear.bias is not None:
        raise ValueError(f"{name} has a bias: expected none, as in LLaMA (mlp_bias false)")


def _is_activation(act_fn: nn.Module, threshold: float) -> bool:
    """Whether a module computes ReLU, or FATReLU from `threshold` on; tried on many numbers."""
    at = torch.tensor([threshold])
    below, sizes = torch.nextafter(at, torch.tensor(-1.0)), torch.logspace(-6, 3, 500)
    numbers = torch.cat([-sizes, below, at, sizes])
    expected = torch.where(computes(numbers, threshold), numbers, 0)
    with torch.no_grad():
        return torch.equal(act_fn(numbers), expected)
