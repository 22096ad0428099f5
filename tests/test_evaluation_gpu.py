"""Answers on a real GPU: the CPU's, with predictors in place and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TEXT

from evaluation.arms import Arm, Arms
from evaluation.backends.backend import Decoding, Prompt
from evaluation.requests import Encoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("predictors", [False, True])
def test_a_card_answers_as_the_cpu(predictors: bool, model_dir: Path, exact_dir: Path) -> None:
    arm = Arm(
        name="arm",
        kind="predictors" if predictors else "dense",
        model=str(model_dir),
        predictors=exact_dir if predictors else None,
    )
    likely, texts, zeros = [], [], []
    for device in ("cpu", "cuda"):
        arms = Arms([arm], device=device, dtype="float32")
        backend, facts = arms.open(arm)
        assert facts.device == device
        encoder = Encoder(arms.first.tokenizer, backend.max_length)
        batch = [encoder.scoring(TEXT[:n], " token and") for n in (10, 40, 90)]
        scores = backend.score(batch)
        likely.append([each.loglikelihood for row in scores for each in row])
        counted = backend.zeros()
        assert counted is not None
        zeros.append(counted)
        prompts = [Prompt(text="", ids=each.ids) for each in batch]
        texts.append(backend.generate(prompts, Decoding(stop=("\n",), max_new_tokens=8)))
    assert likely[1] == pytest.approx(likely[0], abs=1e-2)
    assert texts[1] == texts[0]
    assert zeros[1].total == zeros[0].total
    assert zeros[1].zero == pytest.approx(zeros[0].zero, rel=1e-3)
