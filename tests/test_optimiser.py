"""AdamW without torch's classes: their bytes, and nothing of the compiler imported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from readied import Readied

from predictor.optimiser import AdamW, cosine

STEPS, RATES = 12, (3e-3, 2e-2)
SHAPES = ((32, 64), (101, 32))


@pytest.mark.parametrize(
    ("reference", "options"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.01, "fused": True}),
        (torch.optim.AdamW, {"weight_decay": 0.0, "fused": True}),
        (torch.optim.Adam, {"betas": (0.9, 0.99)}),
    ],
)
def test_bytes_are_those_of_torchs_classes(
    reference: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]
    ours = [tensor.detach().clone().requires_grad_() for tensor in theirs]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(theirs, RATES, strict=True)]
    their, our = reference(groups, **options), AdamW([*zip(ours, RATES, strict=True)], **options)
    for step in range(STEPS):
        for group, rate in zip(their.param_groups, RATES, strict=True):
            group["lr"] = rate * cosine(step, STEPS)
        for one, two in zip(theirs, ours, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            two.grad = one.grad.clone()
        their.step()
        our.step(cosine(step, STEPS))
        assert all(map(torch.equal, theirs, ours))


def test_rates_fall_from_the_peak() -> None:
    shares = [cosine(step, STEPS) for step in range(STEPS)]
    assert shares[0] == 1
    assert shares[STEPS // 2] == pytest.approx(0.5)
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < 0.02


def test_training_imports_no_compiler(new_python: Readied) -> None:
    code = (
        "import sys, torch; from predictor.optimiser import AdamW;"
        "import predictor.training.run, predictor.head.run;"
        "p = torch.zeros(2, 3, requires_grad=True); p.grad = torch.ones(2, 3);"
        "[AdamW([(p, 1e-3)], fused=fused).step() for fused in (True, False)];"
        "print(sorted({'torch._dynamo', 'sympy'} & sys.modules.keys()))"
    )
    done = new_python(code)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
