"""The head's predictor: the engine's rule, what a row is worth, training, artifact, export."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import ModelMaker, refused
from families import VARIANTS, write
from gguf import GGMLQuantizationType, quants
from safetensors.torch import load_file, save_file

from architectures.checkpoint import Checkpoint
from common.errors import FormatError, PredictorError
from common.head_sizes import misfit
from common.rounding import through_q4_0, to_q4_0, to_q8_0
from common.sealed import SEAL
from gguf_export.plan import PlannedTensor
from gguf_export.pwri.element_types import encode
from gguf_export.pwri.schema import HEAD
from gguf_export.smallthinker.file import expert_sizes
from gguf_export.smallthinker.head_predictor import open_head_predictor, with_head_predictor
from gguf_export.smallthinker.plan import plan_expert
from gguf_export.smallthinker.second_engine import check_profiler
from gguf_export.smallthinker.types import ExpertTypes
from gguf_export.tokens.model_vocabulary import read_vocabulary
from gguf_export.writer import ModelFile
from gguf_files.elements import decode
from gguf_files.names import PROFILER
from gguf_files.reader import GGUFFile
from predictor.head.artifact import HeadArtifact
from predictor.head.inputs import HeadInputs, InputsHeader, read_inputs, record_inputs
from predictor.head.measure import Text, always, fit_level, measure, perplexity
from predictor.head.output_head import exported_head
from predictor.head.price import LinearFit, best_level, levelled, worth
from predictor.head.rule import HeadPredictor, predictor_share
from predictor.head.run import train_head
from predictor.head.search import EPOCHS
from predictor.head.settings import HeadConfig, candidate_ranks
from predictor.head.start import Wanted, moments_of, start_at, wanted_at
from predictor.head.training import HeadTrainer, weights_of
from results.head import HeadPoint

Psp = Callable[..., Result]
ROWS, D_MODEL, VOCABULARY = 600, 64, 320


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def text() -> Text:
    """Inputs that a head of rank 16 tells apart, and followers drawn from what it says."""
    generator = torch.Generator().manual_seed(1)
    basis = draw(16, D_MODEL, seed=2)
    x = draw(ROWS, 16, seed=3) @ basis + 4 * draw(1, D_MODEL, seed=5)
    x = (x / x.square().mean(1, keepdim=True).sqrt()).half()
    head = 0.5 * draw(VOCABULARY, 16, seed=4) @ basis / 4
    following = torch.multinomial((x.float() @ head.T).softmax(1), 1, generator=generator)[:, 0]
    return Text(HeadInputs(x, following, torch.arange(ROWS) // 50), head)


# The rule


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_q4_0_is_the_quantiser_of_the_files(scale: float) -> None:
    x = scale * draw(64, 96)
    x[3], x[5, :32] = 0, 2.5
    stored = quants.quantize(x.numpy(), GGMLQuantizationType.Q4_0)
    assert torch.equal(
        to_q4_0(x), torch.from_numpy(quants.dequantize(stored, GGMLQuantizationType.Q4_0))
    )
    assert torch.equal(to_q4_0(to_q4_0(x)), to_q4_0(x)), (
        "numbers of a file come out of it as they are"
    )


def test_gradients_pass_rounding() -> None:
    x = draw(4, 32).requires_grad_()
    torch.autograd.backward((through_q4_0(x) * torch.arange(32)).sum())
    assert x.grad is not None
    assert torch.equal(x.grad, torch.arange(32.0).expand(4, 32))


def in_whole_numbers(x: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return blocks of 32 in 8 bits and their scales, rounded as the engine's AVX2 code does."""
    blocks = x.reshape(-1, 32).astype(np.float32)
    largest = np.abs(blocks).max(1, keepdims=True)
    steps = np.rint(blocks * (np.float32(127) / largest))
    return steps, (largest / np.float32(127)).astype(np.float16).astype(np.float64)


def dot(weights: np.ndarray[Any, Any], x: np.ndarray[Any, Any]) -> float:
    """Return the product of a row of a Q4_0 file, bytes, with numbers in Q8_0."""
    steps, scales = in_whole_numbers(x)
    blocks = weights.reshape(-1, 18)
    d = blocks[:, :2].copy().view(np.float16).astype(np.float64)
    nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1).astype(np.int64) - 8
    return float(((nibbles * steps).sum(1, keepdims=True) * d * scales).sum())


def test_rows_are_chosen_as_the_engine_chooses_them_from_the_bytes_of_a_file() -> None:
    predictor = HeadPredictor(draw(32, 128, seed=1), draw(96, 32, seed=2))
    packed = torch.cat([predictor.fc1.reshape(-1), predictor.fc2.reshape(-1)])[None].half()
    file = encode(packed.float().numpy(), GGMLQuantizationType.Q4_0).reshape(-1)
    fc1 = file[: 32 * 128 // 32 * 18].reshape(32, -1)
    fc2 = file[32 * 128 // 32 * 18 :].reshape(96, -1)
    for x in draw(5, 128, seed=3):
        units = np.array([dot(row, x.numpy()) for row in fc1], np.float32)
        scores = torch.tensor([dot(row, units) for row in fc2])
        sure = scores.abs() > 1e-4  # the rest is for the order of sums to decide
        assert sure.float().mean() > 0.98
        found = predictor.stored().reads(to_q8_0(x[None]))[0]
        assert torch.equal(found[sure], scores[sure] > 0)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((576, 49152, 32), "d_model 576 is no multiple of 128"),
        ((512, 32001, 32), "the vocabulary 32001 is no multiple of 32"),
        ((512, 32000, 48), "rank 48 is no multiple of 32"),
        ((4096, 152064, 16384), "more than an int counts"),
        ((512, 32000, 64), None),
    ],
)
def test_sizes_that_the_engine_cannot_take_are_named(
    sizes: tuple[int, int, int], said: str | None
) -> None:
    found = misfit(*sizes)
    assert found is None if said is None else said in (found or "")


# What a row is worth


def test_a_row_is_worth_what_leaving_it_out_adds_to_the_divergence() -> None:
    logits = draw(8, 400).double()
    complete = logits.log_softmax(1)
    for row in (0, 7, 123):
        without = logits.clone()
        without[:, row] = 0
        divergence = (complete.exp() * (complete - without.log_softmax(1))).sum(1)
        found = worth(logits)[:, row]
        # Exact to the first order of what the normaliser moves by.
        assert torch.allclose(found, divergence, rtol=0.1, atol=1e-6)
    small = worth(1e-4 * draw(1, 50).double())
    assert small.min() >= 0
    assert small.max() < 1e-7, "a row at 0 loses nothing at 0"


def test_at_the_best_level_left_out_rows_keep_their_probability() -> None:
    logits, left_out = 2 * draw(6, 200), draw(6, 200, seed=1) < 0.8
    level = best_level(logits, left_out)
    moved = torch.where(left_out, 0, logits + level[:, None])
    together = moved.softmax(1).masked_fill(~left_out, 0).sum(1)
    assert torch.allclose(together, logits.softmax(1).masked_fill(~left_out, 0).sum(1), atol=1e-5)


def test_the_most_probable_row_is_always_worth_reading() -> None:
    logits = 4 * draw(20, 200)
    level, least = levelled(logits, price=1e9)
    assert torch.allclose(least, logits.amax(1) + level)
    weights = weights_of(logits, price=1e9)
    assert ((weights > 0).sum(1) == 1).all()
    assert torch.equal(weights.argmax(1), logits.argmax(1))


def test_a_fit_finds_the_vector_that_made_the_numbers() -> None:
    x, vector = draw(500, 16), draw(16, seed=1)
    fit = LinearFit(16, torch.device("cpu"))
    for part in torch.split(x, 100):
        fit.add(part, part @ vector, torch.ones(len(part)))
    assert torch.allclose(fit.solve(1e-6)[0], vector, atol=1e-3)
    assert fit.solve(10.0)[0].norm() < 0.2 * vector.norm()


# Measuring


def test_all_rows_change_nothing_but_rounding(text: Text) -> None:
    everything = always(torch.ones(VOCABULARY, dtype=torch.bool))
    level = fit_level(text, everything)
    found = measure(text, everything, level)
    assert found["changed"] == found["missed"] == 0
    assert found["rows_read"] == 1
    assert found["ppl_predicted"] == pytest.approx(found["ppl_levelled"], rel=1e-6)
    assert found["kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert not level.any()
    assert found["ppl_levelled"] == pytest.approx(perplexity(text), rel=1e-6)


def test_figures_are_those_of_the_rule_written_out(text: Text) -> None:
    chosen = torch.arange(VOCABULARY) % 3 != 0
    level = 0.1 * draw(D_MODEL, seed=9)
    x, following = to_q8_0(text.rows.inputs.float()), text.rows.following
    logits = (x @ exported_head(text.head, level).T).double()
    left = torch.where(chosen, logits, 0)
    complete, sparse = logits.log_softmax(1), left.log_softmax(1)
    alone = logits.masked_fill(~chosen, -math.inf).log_softmax(1)
    own = following[:, None]
    hit = chosen[following]
    found = dict(measure(text, always(chosen), level))
    expected = {
        "rows_read": chosen.double().mean(),
        "ppl_levelled": (-complete.gather(1, own)).mean().exp(),
        "ppl_predicted": (-sparse.gather(1, own)).mean().exp(),
        "kl_divergence": (complete.exp() * (complete - sparse)).sum(1).mean(),
        "ppl_renormalised": (-alone.gather(1, own)[hit]).mean().exp(),
        "missed": (~hit).double().mean(),
        "changed": (logits.argmax(1) != left.argmax(1)).double().mean(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-4), name


def test_a_level_moves_left_out_rows_to_where_they_belong(text: Text) -> None:
    """Without it logits of 0 are far too probable here, or far too improbable."""
    chosen = torch.arange(VOCABULARY) % 2 == 0
    moved = replace(text, head=text.head - 3 * moments_of(text).inverse.T[:, :1].T)
    none = measure(moved, always(chosen), torch.zeros(D_MODEL))
    fitted = measure(moved, always(chosen), fit_level(moved, always(chosen)))
    assert fitted["kl_divergence"] < none["kl_divergence"]
    assert fitted["ppl_predicted"] < none["ppl_predicted"]


# Training


def gained(text: Text, wanted: Wanted, predictor: HeadPredictor) -> float:
    """Return what the decisions of a predictor gain over all rows, in prices."""
    reads, total = predictor.stored().reads, 0.0
    for x, following in text.batches():
        weights = weights_of(x @ (text.head + wanted.level).T, wanted.price, following)
        total += float(torch.where(reads(x), weights, 0).double().sum())
    return total


def test_training_beats_its_start_and_the_start_beats_chance(text: Text) -> None:
    """One training may find nothing better, as rounding to 4 bits has it; none ends worse."""
    moments, wanted = moments_of(text), wanted_at(text, price=1e-4)
    start = start_at(text.head, moments, wanted, 32)
    chance = HeadPredictor(draw(32, D_MODEL), draw(VOCABULARY, 32))
    before = gained(text, wanted, start)
    assert before > gained(text, wanted, chance)
    trained = [HeadTrainer(text, moments, seed).train(start, wanted, EPOCHS) for seed in range(4)]
    after = [gained(text, wanted, predictor) for predictor in trained]
    assert min(after) >= before
    assert max(after) > before


def test_training_that_goes_wrong_returns_its_start(text: Text) -> None:
    moments, wanted = moments_of(text), wanted_at(text, price=1e-4)
    start = start_at(text.head, moments, wanted, 32)
    found = HeadTrainer(text, moments, seed=0).train(start, wanted, EPOCHS, rate=1e3)
    assert torch.equal(found.fc1, start.fc1)
    assert torch.equal(found.fc2, start.fc2)


def test_an_exact_rank_decides_as_the_head_does(text: Text) -> None:
    """The head has rank 16 and the threshold one more: 32 units hold it all, but for rounding."""
    wanted = wanted_at(text, price=1e-4)
    predictor = start_at(text.head, moments_of(text), wanted, 32)
    x = text.rows.inputs.float()
    scores = x @ predictor.fc1.T @ predictor.fc2.T
    exact = x @ (text.head + wanted.level - wanted.least).T
    assert ((scores > 0) == (exact > 0)).float().mean() > 0.999


def test_runs_are_repeatable(text: Text) -> None:
    moments, wanted = moments_of(text), wanted_at(text, price=1e-4)
    start = start_at(text.head, moments, wanted, 32)
    one, two = (HeadTrainer(text, moments, seed=3).train(start, wanted, 2.0) for _ in range(2))
    other = HeadTrainer(text, moments, seed=4).train(start, wanted, 2.0)
    assert torch.equal(one.fc2, two.fc2)
    assert not torch.equal(one.fc2, other.fc2)


def test_ranks_and_shares() -> None:
    assert candidate_ranks(512) == (32, 64, 128, 256)
    assert predictor_share(32, 512, 4096) == pytest.approx(32 * (512 + 4096) / (512 * 4096))


# From text to a file


@pytest.fixture(scope="module")
def model(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("head") / "wide"
    return make_model(path, hidden_size=128, intermediate_size=1024, num_attention_heads=4)


def settings(model: Path, data: Path, out: Path, **changes: Any) -> HeadConfig:
    values: dict[str, Any] = {"max_ppl_gap": 0.05, "max_changed": 0.1, "rank": 32, "holdout": 0.3}
    values |= {"field": "body", "tokens": 3000, "context": 128}
    return HeadConfig(model=str(model), data=(str(data),), out=out, **(values | changes))


@pytest.fixture(scope="module")
def artifact(
    model: Path, long_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> HeadArtifact:
    return train_head(settings(model, long_data, tmp_path_factory.mktemp("artifact") / "head"))


def test_inputs_are_what_the_head_reads(model: Path, long_data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from architectures.model import load_model

    checkpoint = Checkpoint.open(str(model))
    header = InputsHeader(
        model_fingerprint=checkpoint.fingerprint,
        data=str(long_data),
        field="body",
        chat_template="none",
        tokens=200,
        context=64,
    )
    loaded = load_model(checkpoint, dtype=torch.float32, device="cpu", head=False)
    record_inputs(loaded, checkpoint, header, tmp_path)
    rows = read_inputs(tmp_path)
    tokens = json.loads(long_data.read_text().splitlines()[0])["body"]
    ids = [1, *checkpoint.tokenizer().encode(tokens)][:64]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        wanted = reference.model(torch.tensor([ids])).last_hidden_state[0, 1:-1]
    assert torch.equal(rows.following[:62], torch.tensor(ids[2:]))
    assert torch.allclose(rows.inputs[:62].float(), wanted, atol=2e-3, rtol=2e-3)
    assert rows.document[:62].eq(0).all()
    held = rows.held_out(0.3, seed=0)
    assert 0 < held.sum() < len(rows)


def test_what_is_kept_is_what_was_measured(artifact: HeadArtifact) -> None:
    chosen = artifact.chosen
    assert chosen.keeps(artifact.header.max_ppl_gap, artifact.header.max_changed)
    best = min(p.bytes_ratio for p in artifact.points if p.method == "psp" and p.keeps(0.05, 0.1))
    assert chosen.bytes_ratio == best
    rows = read_inputs(artifact.path)
    held = rows.held_out(artifact.header.holdout, artifact.header.seed)
    predictor, level = artifact.read()
    checkpoint = Checkpoint.open(artifact.header.model)
    from predictor.head.output_head import read_head

    measured = measure(
        Text(rows.part(held), read_head(checkpoint)), predictor.stored().reads, level
    )
    for name, value in measured.items():
        assert getattr(chosen, name) == pytest.approx(value, rel=1e-6), name


def test_reopened_it_is_the_same(artifact: HeadArtifact) -> None:
    assert HeadArtifact.open(artifact.path) == artifact


def test_a_damaged_artifact_is_one_line(artifact: HeadArtifact, tmp_path: Path) -> None:
    document = json.loads((artifact.path / "head.json").read_text())
    document.pop(SEAL)
    tensors = load_file(artifact.path / "head.safetensors")

    def written(**changes: Any) -> HeadArtifact:
        (tmp_path / "head.json").write_text(json.dumps(document | changes))
        return HeadArtifact.open(tmp_path)

    with refused(PredictorError, "schema version is 99"):
        written(schema_version=99)
    with refused(PredictorError, "damaged", "points"):
        written(points=[{"method": "psp"}])
    with refused(PredictorError, "one point is chosen"):
        written(points=[])
    save_file(tensors | {"level": tensors["level"][:-1]}, tmp_path / "head.safetensors")
    with refused(PredictorError, "head.safetensors", "its checksum differs"):
        written().read()
    document.pop("tensors")  # of an older psp
    with refused(PredictorError, "level has shape (127,)"):
        written().read()
    save_file(tensors | {"fc1": tensors["fc1"] * math.nan}, tmp_path / "head.safetensors")
    with refused(PredictorError, "fc1 holds NaN"):
        written().read()
    (tmp_path / "head.safetensors").write_bytes(b"none")
    with refused(PredictorError, "head.safetensors", "damaged"):
        written().read()


def planned(artifact: HeadArtifact, checkpoint: Checkpoint) -> dict[str, PlannedTensor]:
    tensors = plan_expert(checkpoint, ExpertTypes(weights="q4_0", pure=True), transposed=True)
    return {each.name: each for each in with_head_predictor(tensors, artifact, checkpoint)}


def test_the_file_holds_both_matrices_and_the_head_with_its_level(
    artifact: HeadArtifact, model: Path
) -> None:
    checkpoint = Checkpoint.open(str(model))
    tensors = planned(open_head_predictor(artifact.path, checkpoint), checkpoint)

    def as_stored(name: str) -> torch.Tensor:
        tensor = tensors[name]
        assert tensor.kind is GGMLQuantizationType.Q4_0
        numbers = tensor.read().half().numpy()  # as `gguf_export.writer` hands them on
        data = encode(numbers, tensor.kind).reshape(-1).view(np.uint8)
        assert len(data) == tensor.size
        return torch.from_numpy(decode(data, tensor.shape, tensor.kind))

    predictor, level = artifact.read()
    numbers = as_stored(PROFILER)
    assert numbers.shape == (1, 32 * (128 + 320))
    assert torch.equal(numbers[0, : 32 * 128].view(32, 128), predictor.stored().fc1)
    assert torch.equal(numbers[0, 32 * 128 :].view(320, 32), predictor.stored().fc2)
    weight = load_file(model / "model.safetensors")["lm_head.weight"]
    assert torch.equal(as_stored(HEAD), exported_head(weight, level))
    assert list(tensors)[-1] == PROFILER


def test_an_exported_file_is_the_engines_and_is_verified(
    artifact: HeadArtifact, model: Path, tmp_path: Path, psp: Psp
) -> None:
    out = tmp_path / "wide.smallthinker.gguf"
    told = ("export-gguf", "--model", model, "--engine", "smallthinker", "--out", out)
    done = psp(*told, "--head-predictor", artifact.path)
    assert done.exit_code == 0, done.output
    tensors = GGUFFile(out).tensors
    assert tensors[PROFILER].kind is tensors[HEAD].kind is GGMLQuantizationType.Q4_0
    checked = psp("verify", out, "--model", model)
    assert checked.exit_code == 0, checked.output
    assert "the head has a predictor" in checked.output
    refusal = psp(
        "export-gguf",
        "--model",
        model,
        "--engine",
        "llama.cpp",
        "--out",
        tmp_path / "a.gguf",
        "--head-predictor",
        artifact.path,
    )
    assert refusal.exit_code == 1
    assert "--head-predictor is for PowerInfer's second engine" in refusal.output
    plain = psp(*told, "--force")
    assert plain.exit_code == 0, plain.output
    assert PROFILER not in GGUFFile(out).tensors


def test_verification_finds_another_head_behind_a_predictor() -> None:
    from powerinfer_bridge.verify.tensors import excess, near

    head, level = draw(64, 128), 0.5 * draw(128, seed=1)
    found = exported_head(head, level)
    assert near(head + excess(head, found) / 64, found)
    other = head.clone()
    other[7, 3] += 2
    assert not near(other + excess(other, found) / 64, found)


@pytest.mark.parametrize(
    ("kind", "shape", "said"),
    [
        (
            "Q8_0",
            (1, 32 * 448),
            "is Q8_0",
        ),
        ("Q4_0", (1, 32 * 448 + 32), "multiple of 448"),
        ("Q4_0", (32, 448), "one row"),
        ("Q4_0", (1, 16 * 448), "rank 16 is no multiple of 32"),
    ],
)
def test_a_file_with_a_predictor_that_cannot_run_is_refused(
    artifact: HeadArtifact,
    model: Path,
    tmp_path: Path,
    kind: str,
    shape: tuple[int, ...],
    said: str,
) -> None:
    checkpoint, path = Checkpoint.open(str(model)), tmp_path / "a.gguf"
    tensors = list(planned(artifact, checkpoint).values())[:-1]
    wrong = GGMLQuantizationType[kind]
    tensors.append(PlannedTensor(PROFILER, shape, wrong, lambda: torch.ones(shape)))
    vocabulary = read_vocabulary(checkpoint.directory, VOCABULARY, checkpoint.config)
    sizes = expert_sizes(checkpoint.shape, checkpoint.shape.d_ff)
    file = ModelFile(checkpoint, vocabulary, "smallthinker", sizes)
    file.write(path, path, {}, tensors)
    with refused(FormatError, said):
        check_profiler(GGUFFile(path), 128, VOCABULARY)


def test_a_predictor_of_another_model_or_head_is_not_exported(
    artifact: HeadArtifact, model: Path, make_model: ModelMaker, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", seed=1, hidden_size=128, num_attention_heads=4)
    with refused(PredictorError, "another model"):
        open_head_predictor(artifact.path, Checkpoint.open(str(other)))
    tensors = load_file(model / "model.safetensors")
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in model.iterdir():
        if file.name != "model.safetensors":
            (changed / file.name).write_bytes(file.read_bytes())
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    with refused(PredictorError, "another output head", "--head"):
        open_head_predictor(artifact.path, Checkpoint.open(str(changed)))


def test_sizes_that_cannot_run_are_noted_at_training_and_refused_at_export(
    make_model: ModelMaker, long_data: Path, tmp_path: Path
) -> None:
    narrow, notes = make_model(tmp_path / "narrow", hidden_size=64), list[str]()
    config = settings(narrow, long_data, tmp_path / "head", recipe="svd", max_ppl_gap=9.0)
    made = train_head(replace(config, max_changed=1.0), notes.append)
    assert any("d_model 64 is no multiple of 128" in line for line in notes)
    with refused(PredictorError, "d_model 64", "--head-predictor"):
        open_head_predictor(made.path, Checkpoint.open(str(narrow)))


def test_bounds_out_of_reach_say_what_came_nearest(
    model: Path, long_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeadPoint, "keeps", lambda *bounds: False)
    with refused(PredictorError, "no predictor keeps", "rank 32", "--max-changed"):
        train_head(settings(model, long_data, tmp_path / "out", recipe="svd"))


def test_a_head_that_the_engine_has_no_graph_for_is_refused(
    tmp_path: Path, long_data: Path, tokenizer_bytes: bytes
) -> None:
    opt = next(variant for variant in VARIANTS if variant.family == "opt")
    written = write(opt, tmp_path / "opt", tokenizer_bytes)
    with refused(PredictorError, "runs no opt model"):
        train_head(settings(written.path, long_data, tmp_path / "out"))


def test_it_goes_on_with_what_was_recorded(
    artifact: HeadArtifact, model: Path, long_data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "head"
    out.mkdir()
    for file in artifact.path.glob("inputs*"):
        (out / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr("predictor.head.run.record_inputs", lambda *each: pytest.fail("again"))
    again = train_head(settings(model, long_data, out, resume=True))
    assert again.points == artifact.points
    assert train_head(settings(model, long_data, out, resume=True)) == again
    with refused(PredictorError, "another max_changed"):
        train_head(settings(model, long_data, out, resume=True, max_changed=0.2))
    with refused(PredictorError, "another tokens", "--force"):
        train_head(settings(model, long_data, out, resume=True, tokens=2500))
    with refused(PredictorError, "another ranks", "--force"):
        train_head(settings(model, long_data, out, resume=True, rank=64))
    with refused(PredictorError, "nothing to train on"):
        HeadConfig(out=out)
    with refused(PredictorError, "rank 33"):
        settings(model, long_data, out, rank=33)


def test_points_tell_bytes_and_gap() -> None:
    point = HeadPoint(
        method="psp",
        rank=32,
        price=1e-6,
        rows_read=0.1,
        predictor_share=0.07,
        ppl_head=10,
        ppl_levelled=10.1,
        ppl_predicted=10.201,
        standard_error=0.001,
        kl_divergence=0.01,
        ppl_renormalised=9,
        missed=0.01,
        changed=0.004,
    )
    assert point.bytes_ratio == pytest.approx(0.17)
    assert point.ppl_gap == pytest.approx(0.01)
    assert point.keeps(0.0101, 0.004)
    assert not point.keeps(0.0099, 0.1)
    assert not point.keeps(1, 0.0039)


def test_the_command(model: Path, long_data: Path, tmp_path: Path, psp: Psp) -> None:
    out = tmp_path / "head"
    said = ("--model", model, "--data", long_data, "--field", "body", "--tokens", 3000)
    bounds = ("--max-ppl-gap", "9", "--max-changed", "1", "--rank", 32, "--recipe", "svd")
    done = psp("train-predictor", "--head", *said, *bounds, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["rank"] == 32
    assert document["chosen"]
    assert document["points"]
    again = psp("train-predictor", "--head", *said, *bounds, "--out", out, "--resume")
    assert again.exit_code == 0, again.output
    table = again.stdout.splitlines()
    assert table[0].split()[:2] == ["method", "hidden"]
    assert any(line.startswith("svd") and line.endswith("written") for line in table)
    assert any(line.startswith("frequency") for line in table)
    shown = psp("inspect", out)
    assert shown.stdout.splitlines()[: len(table) + 2] == [*table, "", "made with"]
    assert json.loads(psp("inspect", out, "--json").stdout)["header"]["rank"] == 32
    assert "--max-changed" in psp("train-predictor", "--head", "--help").stdout
    assert "--max-changed" not in psp("train-predictor", "--help").stdout
