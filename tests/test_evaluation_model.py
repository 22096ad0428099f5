"""A checkpoint that answers: as lm-eval's own model does on the same ids, alone or in a batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, ModelMaker, write_predictors
from families import BY_NAME, write
from transformers import AutoModelForCausalLM

from evaluation.arms import Arm, Arms
from evaluation.backends.backend import Decoding, Prompt, Score, Scoring
from evaluation.backends.transformers_model import (
    Placed,
    TransformersBackend,
    TransformersModel,
)
from evaluation.requests import Encoder
from predictor.feedback import by_itself
from predictor.module import Predictor
from predictor.stored import LayerPredictor
from predictor.thresholds.predicted_model import PredictedModel
from prosparse.activation import open_any, shifted

PAIRS = [
    ("The quick brown", " fox jumps"),
    ("The quick brown", " dog"),
    ("def f(x):\n    return", " [y"),
    ("", "import os"),
    (TEXT[:60], " token, and the token"),
]
GREEDY = Decoding(stop=("\n",), max_new_tokens=12)


def model_of(path: Path) -> TransformersModel:
    return TransformersModel(open_any(str(path)), device="cpu", dtype=None)


def scorings(model: TransformersModel) -> list[Scoring]:
    encoder = Encoder(model.tokenizer, model.opened.shape.context_length)
    return [encoder.scoring(*pair) for pair in PAIRS]


def flat(scores: list[list[Score]]) -> list[float]:
    return [each.loglikelihood for row in scores for each in row]


@pytest.fixture(scope="module")
def model(model_dir: Path) -> TransformersModel:
    return model_of(model_dir)


def test_scores_are_those_of_lm_evals_own_model_on_the_same_ids(
    model: TransformersModel, model_dir: Path
) -> None:
    from lm_eval.models.huggingface import HFLM

    theirs_model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer: Any = _tokenizer()
    theirs = HFLM(pretrained=theirs_model, tokenizer=tokenizer, device="cpu", batch_size=4)
    requests = scorings(model)
    split = [
        (
            ("c", str(n)),
            list(each.ids[: len(each.ids) + 1 - len(each.targets[0])]),
            list(each.targets[0]),
        )
        for n, each in enumerate(requests)
    ]
    expected = theirs._loglikelihood_tokens(split, disable_tqdm=True)
    found = TransformersBackend(model).score(requests)
    assert flat(found) == pytest.approx([each[0] for each in expected], abs=1e-4)
    assert [row[0].greedy for row in found] == [each[1] for each in expected]


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<s>": 1, "</s>": 2}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", ["relu-llama", "prosparse", "minicpm", "opt-125m", "falcon-7b"])
def test_a_batch_answers_as_each_request_alone(
    name: str, tokenizer_bytes: bytes, tmp_path: Path
) -> None:
    model = model_of(write(BY_NAME[name], tmp_path / name, tokenizer_bytes).path)
    backend, requests = TransformersBackend(model), scorings(model)
    whole = flat(backend.score(requests))
    alone = [flat(backend.score([each]))[0] for each in requests]
    assert whole == pytest.approx(alone, abs=1e-4)
    logits = model.loaded.logits(torch.tensor([requests[0].ids]))[0].float().log_softmax(-1)
    target = torch.tensor(requests[0].targets[0])
    rows = logits[-len(target) :]
    assert whole[0] == pytest.approx(float(rows.gather(1, target[:, None]).sum()), abs=1e-4)
    prompts = [Prompt(text="", ids=each.ids) for each in requests]
    together = backend.generate(prompts, GREEDY)
    assert together == [backend.generate([each], GREEDY)[0] for each in prompts]


def test_long_windows_go_through_the_head_in_parts(
    model: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = scorings(model)
    backend = TransformersBackend(model)
    whole = backend.score(requests)
    monkeypatch.setattr("evaluation.backends.transformers_model._LOGITS", 320 * 2)
    parts = backend.score(requests)
    assert flat(parts) == pytest.approx(flat(whole), abs=1e-5)
    assert [row[0].greedy for row in parts] == [row[0].greedy for row in whole]


def test_several_targets_of_one_run_and_empty_ones(model: TransformersModel) -> None:
    ids = (1, 300, 301, 302)
    run = Scoring(ids=ids, targets=((301, 302, 5), (301, 302, 6)))
    found = TransformersBackend(model).score([run, Scoring(ids=ids, targets=((),))])
    alone = [
        TransformersBackend(model).score([Scoring(ids=ids, targets=(target,))])[0][0]
        for target in run.targets
    ]
    assert flat(found[:1]) == pytest.approx([each.loglikelihood for each in alone], abs=1e-5)
    assert found[1] == [Score(0.0, True)]


def test_a_target_that_greedy_decoding_writes_is_greedy(model: TransformersModel) -> None:
    ids = torch.tensor([[1, 300, 301]])
    best = int(model.loaded.logits(ids)[0, -1].argmax())
    other = (best + 1) % 320
    run = Scoring(ids=(1, 300, 301), targets=((best,), (other,)))
    assert [each.greedy for each in TransformersBackend(model).score([run])[0]] == [True, False]


def test_predictors_mask_as_they_do_when_thresholds_are_chosen(model_dir: Path) -> None:
    opened = open_any(str(model_dir))
    shape = opened.checkpoint.shape
    generator = torch.Generator().manual_seed(0)
    half = Predictor(
        torch.randn(32, shape.d_model, generator=generator),
        torch.randn(shape.d_ff, 32, generator=generator),
    )
    predictors = dict.fromkeys(range(shape.n_layers), half)
    model = model_of(model_dir)
    window = [1, *model.tokenizer.encode(TEXT)[:40]]
    known = PredictedModel(opened.checkpoint, [window], "cpu").quality(predictors, 0.0)
    run = Scoring(ids=tuple(window[:-1]), targets=(tuple(window[1:]),))
    padding = Scoring(ids=(1,) * 60, targets=((1,),))
    dense, masked = (
        TransformersBackend(model, placed=placed).score([run, padding])[0][0].loglikelihood
        for placed in (None, Placed(predictors, 0.0))
    )
    count = len(window) - 1
    assert torch.tensor(-dense / count).exp() == pytest.approx(known.ppl_dense, rel=1e-3)
    assert torch.tensor(-masked / count).exp() == pytest.approx(known.ppl_sparse, rel=1e-5)
    assert abs(masked - dense) > 1
    again = TransformersBackend(model).score([run, padding])[0][0].loglikelihood
    assert again == dense  # nothing stays masked


def test_exact_predictors_change_nothing(model_dir: Path, exact_dir: Path) -> None:
    arms = Arms(
        [
            Arm(name="dense", kind="dense", model=str(model_dir)),
            Arm(name="p", kind="predictors", model=str(model_dir), predictors=exact_dir),
        ],
        device="cpu",
        dtype="auto",
    )
    found = []
    for arm in arms.arms:
        backend, facts = arms.open(arm)
        model: Any = backend
        found.append(flat(backend.score(scorings(model._model))))
        assert (facts.predictors_hash is None) == (arm.predictors is None)
        assert facts.threshold == (None if arm.predictors is None else 0.0)
    assert found[0] == pytest.approx(found[1], abs=2e-2)


def test_predictors_in_q4_0_are_read_as_numbers(model_dir: Path, tmp_path: Path) -> None:
    """Zeros let every neuron through at threshold 0."""
    made = write_predictors(model_dir, tmp_path / "p")
    made.header = replace(made.header, rank=64, predictor_type="q4_0")
    fc1, fc2 = (by_itself(torch.zeros(rows, 64)) for rows in (64, 1012))
    for layer in range(2):
        made.add(layer, LayerPredictor(fc1, fc2, torch.arange(1012)), {"activation_recall": 1.0})
    arms = [
        Arm(name="dense", kind="dense", model=str(model_dir)),
        Arm(name="p", kind="predictors", model=str(model_dir), predictors=made.path),
    ]
    opened = Arms(arms, device="cpu", dtype="auto")
    found = []
    for arm in arms:
        model: Any = opened.open(arm)[0]
        found.append(flat(model.score(scorings(model._model))))
    assert found[0] == found[1]


def test_fatrelu_takes_the_place_of_the_own_activation_and_goes_again(
    model: TransformersModel,
) -> None:
    requests = scorings(model)
    plain = TransformersBackend(model)
    before = flat(plain.score(requests))
    plain.zeros()
    shift = TransformersBackend(model, shifted((0.5,) * 2))
    shifted_scores = flat(shift.score(requests))
    counted = shift.zeros()
    assert max(abs(a - b) for a, b in zip(before, shifted_scores, strict=True)) > 0.1
    assert flat(plain.score(requests)) == before
    own = plain.zeros()
    assert counted.zero / counted.total > own.zero / own.total > 0.3
    assert own.total == counted.total == sum(len(each.ids) for each in requests) * 1012 * 2


def test_zeros_are_those_of_tokens_and_not_of_padding(model: TransformersModel) -> None:
    backend, requests = TransformersBackend(model), scorings(model)
    backend.zeros()
    backend.score(requests)
    together = backend.zeros()
    for each in requests:
        backend.score([each])
    alone = backend.zeros()
    assert together.total == alone.total
    assert together.zero == pytest.approx(alone.zero, rel=1e-3)
    assert backend.zeros().total == 0


def test_continuations_end_where_they_should(model: TransformersModel) -> None:
    backend = TransformersBackend(model)
    prompt = Prompt(text="", ids=(1, *model.tokenizer.encode("The quick")))
    free = Decoding(stop=(), max_new_tokens=16)
    whole = backend.generate([prompt], free)[0]
    assert whole
    stop = whole[len(whole) // 2]
    early = backend.generate([prompt], Decoding(stop=(stop,), max_new_tokens=16))[0]
    assert stop in early
    assert whole.startswith(early)
    assert len(early) < len(whole)


def test_what_is_drawn_depends_on_the_seed_alone(model: TransformersModel) -> None:
    backend = TransformersBackend(model)
    prompts = [Prompt(text="", ids=(1, *model.tokenizer.encode(text))) for text in ("The", "def f")]
    settings: dict[str, Any] = {"stop": (), "max_new_tokens": 10, "temperature": 1.0}
    drawn = [backend.generate(prompts, Decoding(**settings, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    asked = [prompts[0], replace(prompts[0], seed=7), prompts[1]]
    mixed = backend.generate(asked, Decoding(**settings, seed=1))
    assert [mixed[0], mixed[2]] == drawn[0]
    assert mixed[0] != mixed[1]
    few = Decoding(**settings, seed=1, top_k=1)
    assert (
        backend.generate(asked, few)[0]
        == backend.generate(asked[:1], replace(few, temperature=0))[0]
    )
    state = torch.get_rng_state()
    backend.generate(prompts, Decoding(**settings, seed=5, top_p=0.5, top_k=3))
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_without_relu_answers_with_its_own_activation(
    make_model: ModelMaker, tmp_path: Path
) -> None:
    path = make_model(tmp_path / "silu", hidden_act="silu")
    model = model_of(path)
    requests = scorings(model)
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        logits = expected(torch.tensor([requests[0].ids])).logits[0].log_softmax(-1)
    target = torch.tensor(requests[0].targets[0])
    known = float(logits[-len(target) :].gather(1, target[:, None]).sum())
    assert flat(TransformersBackend(model).score(requests[:1]))[0] == pytest.approx(known, abs=1e-4)
    relu = TransformersBackend(model, shifted((0.0, 0.0))).score(requests[:1])
    assert flat(relu)[0] != pytest.approx(known, abs=1e-2)
