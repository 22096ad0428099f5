"""Starts with a unit for the constant, in whitened coordinates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from planted import (
    D_FF,
    D_MODEL,
    HOLDOUT,
    TRAIN,
    importance_loss,
    normal,
    pairs,
    planted_layer,
    seeded,
    starting_at,
)
from torch.nn.functional import binary_cross_entropy_with_logits

from predictor.module import Predictor, decide
from predictor.traces.rows import LabelledRows, normalise_rms
from predictor.training.coordinates import Coordinates, Whitening, whitening_of
from predictor.training.layer import train_layer
from predictor.training.loss import Batch, loss_of, set_gradients
from predictor.training.settings import PSP
from predictor.training.start import (
    constant_start,
    leading,
    matching_biases,
    moments_of,
    scaled_gate,
)


def stream(rows: int = 4000, constant: float = 8.0) -> torch.Tensor:
    """Return normalised inputs, some directions far larger than others, around a constant."""
    mixing = normal(D_MODEL, D_MODEL, seed=1) * torch.logspace(0, -1, D_MODEL) / 8
    mean = normal(D_MODEL, seed=2)
    return normalise_rms(normal(rows, D_MODEL, seed=3) @ mixing.T + constant * mean / mean.norm())


def whitening(x: torch.Tensor) -> Whitening:
    found = whitening_of(moments_of([x[:1000], x[1000:]]))
    assert found is not None
    return found


def unreduced(x: torch.Tensor) -> torch.Tensor:
    """Return the basis of all directions."""
    return whitening(x).basis(torch.eye(D_MODEL))


def start_of(
    gate: torch.Tensor, white: Whitening, rank: int, x: torch.Tensor
) -> tuple[Predictor, Coordinates]:
    directions = leading(scaled_gate(gate, white.factor), D_MODEL)
    return constant_start(directions, white, rank, x)


def test_whitened_inputs_have_unit_covariance_beside_a_constant() -> None:
    x = stream()
    inputs = x @ unreduced(x)
    y, s = inputs[:, :-1], inputs[:, -1]
    assert float(s.mean()) == pytest.approx(1, abs=1e-3)
    assert float(s.std()) < 0.1
    # A direction is lost to the constant, those of little variance are damped.
    spectrum = torch.linalg.eigvalsh(y.T @ y / len(y))
    assert float(spectrum.max()) < 1.01
    assert float(spectrum[8:].min()) > 0.4
    raw = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0)) / len(x))
    assert float(raw[-1] / raw[8]) > 30


def test_inputs_around_nothing_have_no_constant() -> None:
    assert whitening_of(moments_of([stream(constant=0)])) is None


def biased(
    start: Predictor, coordinates: Coordinates, x: torch.Tensor, active: torch.Tensor
) -> None:
    """Let neurons be predicted as often as they are active."""
    inputs = coordinates.inputs(x)
    with torch.no_grad():
        hidden = coordinates.hidden((inputs @ start.fc1.T).relu(), inputs)
        start.fc2[:, -1] = matching_biases(hidden, start.fc2, active, [1])[0]


def test_a_full_start_has_the_sign_of_every_gate() -> None:
    x, gate = stream(), normal(D_FF, D_MODEL)
    exact = x.double() @ gate.double().T
    start, coordinates = start_of(gate, whitening(x), D_MODEL + 1, x)
    biased(start, coordinates, x, exact > 0)
    predictor = coordinates.plain(start)
    assert predictor.fc1.shape == (D_MODEL + 1, D_MODEL)
    assert predictor.fc2.shape == (D_FF, D_MODEL + 1)
    # Damping and units that close on outliers leave some near the threshold.
    clear = exact.abs() > 0.05 * exact.std(0)
    right = decide(predictor, x, 0.0) == (exact > 0)
    assert right[clear].float().mean() > 0.999
    # Lengths do not matter but for rounding.
    same = decide(predictor, 37 * x, 0.0) == decide(predictor, x, 0.0)
    assert same[clear].float().mean() > 0.9999


def test_a_truncated_start_is_the_best_map_of_its_rank() -> None:
    """Its logits differ from the gates by no more than the singular values that are left out."""
    x, gate, rank = stream(), normal(D_FF, D_MODEL), 32
    white = whitening(x)
    scaled = gate.double() @ white.factor
    scaled = scaled / scaled.norm(dim=1, keepdim=True)
    start, coordinates = start_of(gate, white, rank, x)
    logits = logits_in(start, coordinates, x).detach().double()
    exact = (x @ unreduced(x))[:, :-1].double() @ scaled.T
    least = float(torch.linalg.svdvals(scaled)[rank - 1 :].square().sum())
    error = float((logits - exact).square().sum(1).mean())
    assert error <= 1.02 * least
    biased(start, coordinates, x, x @ gate.T > 0)
    better = [
        float((decide(p, x, 0.0) == (x @ gate.T > 0)).float().mean())
        for p in (pairs(gate, moments_of([x]), rank), coordinates.plain(start))
    ]
    assert 1 - better[1] < 0.5 * (1 - better[0])


def test_units_are_open_on_all_rows_and_signed_for_the_smaller_offset() -> None:
    x, gate = stream(), normal(D_FF, D_MODEL)
    start, coordinates = start_of(gate, whitening(x), 32, x)
    inputs = coordinates.inputs(x)
    relative = inputs[:, :-1] @ start.fc1.detach()[:, :-1].T / inputs[:, -1:]
    offsets = start.fc1.detach()[:, -1]
    assert torch.equal(offsets, coordinates.centres)
    assert float((relative + offsets).min()) > -1e-4
    torch.testing.assert_close(-relative.amin(0), offsets)
    assert (relative.amax(0) >= offsets - 1e-4).all()


def test_biases_predict_every_neuron_as_often_as_it_is_active() -> None:
    hidden = torch.cat([normal(500, 8), 1 + torch.rand(500, 1, generator=seeded(9))], dim=1)
    fc2 = normal(2000, 9, seed=1)
    shares = torch.linspace(0, 1, 2000)
    active = torch.rand(500, 2000, generator=seeded(2)) < shares
    active[:, 0], active[:, -1] = False, True
    for factor, bias in zip((1, 2), matching_biases(hidden, fc2, active, (1, 2)), strict=True):
        fc2[:, -1] = bias
        predicted = (hidden @ fc2.T >= 0).sum(0)
        # Rounding decides of a row that sits on the edge.
        off = (predicted - (factor * active.sum(0)).clamp_max(500)).abs()
        assert off.max() <= 1
        assert off.float().mean() < 0.05


def random_predictor(units: int = 32) -> tuple[Predictor, Coordinates]:
    """Return one in coordinates of `stream`'s inputs."""
    offsets = 2 + torch.rand(units, generator=seeded(6))
    fc1 = torch.cat([normal(units, D_MODEL, seed=4), offsets[:, None]], dim=1)
    centres = torch.full((units,), 2.5)
    fc2 = normal(D_FF, units + 1, seed=5)
    return Predictor(fc1, fc2), Coordinates(unreduced(stream()), centres)


def logits_in(predictor: Predictor, coordinates: Coordinates, x: torch.Tensor) -> torch.Tensor:
    inputs = coordinates.inputs(x)
    return coordinates.hidden((inputs @ predictor.fc1.T).relu(), inputs) @ predictor.fc2.T


def test_the_plain_predictor_does_the_same() -> None:
    predictor, coordinates = random_predictor()
    x, plain = stream(), coordinates.plain(predictor)
    with torch.no_grad():
        expected = logits_in(predictor, coordinates, x)
        torch.testing.assert_close(plain(x), expected, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(plain(5 * x), 5 * expected, rtol=1e-3, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_coordinates_are_those_of_the_loss(dtype: torch.dtype) -> None:
    predictor, coordinates = random_predictor()
    x = stream(200)
    active = torch.rand(200, D_FF, generator=seeded(7)) < 0.1
    places = active.flatten().nonzero()[:, 0]
    positive = torch.rand(len(places), generator=seeded(8)) + 0.5
    told = int((places < 16 * D_FF).sum())
    batch = Batch(inputs=x, places=places, positive=positive, negative=0.2, told=told)
    weight = torch.full((200 * D_FF,), 0.2)
    weight[places] = positive
    logits = logits_in(predictor, coordinates, x)
    loss = binary_cross_entropy_with_logits(logits, active.float(), weight=weight.view_as(active))
    assert loss_of(logits.detach(), batch) == pytest.approx(float(loss.detach()), rel=1e-5)
    expected = torch.autograd.grad(loss, [predictor.fc1, predictor.fc2])
    set_gradients(predictor, batch, dtype, coordinates)
    for matrix, gradient in zip(predictor.parameters(), expected, strict=True):
        assert matrix.grad is not None
        assert matrix.grad.dtype == torch.float32
        if dtype == torch.float32:
            torch.testing.assert_close(matrix.grad, gradient, rtol=1e-3, atol=1e-7)
        cosine = torch.cosine_similarity(matrix.grad.flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.99


def test_very_negative_logits_leave_no_subnormal_numbers() -> None:
    """A processor multiplies them many times slower."""
    predictor = Predictor(torch.ones(32, D_MODEL), -torch.ones(D_FF, 32))
    place = torch.zeros(1, dtype=torch.int64)
    for scale in (1.0, 0.06, 0.04):  # logits around -2000, -120 and -80
        x = torch.full((10, D_MODEL), scale)
        batch = Batch(inputs=x, places=place, positive=torch.ones(1), negative=0.01, told=1)
        set_gradients(predictor, batch, torch.float32)
        assert predictor.fc2.grad is not None
        assert float(predictor.fc2.grad[1:].min()) > 1e-25


@pytest.fixture(scope="module")
def rows() -> LabelledRows:
    return LabelledRows(*planted_layer(mean=8), normalise=True)


def test_training_falls_back_to_pairs_with_more_epochs() -> None:
    """Where inputs are constant in no direction."""
    rows = LabelledRows(*planted_layer(mean=0.1), normalise=True)
    train = torch.arange(2000)
    start = starting_at(PSP, rows, train, seeded(0))
    assert start.coordinates is None
    assert start.recipe == PSP.with_pairs()
    assert start.recipe.start == "pairs"
    assert start.recipe.epochs == 8 * PSP.epochs
    steps: list[int] = []
    train_layer(
        starting_at(replace(PSP, batch=500), rows, train, seeded(0)),
        rows,
        train=train,
        holdout=train[:0],
        generator=seeded(0),
        on_step=steps.append,
    )
    assert steps == [8 * PSP.epochs * 4] * (8 * PSP.epochs * 4)


def test_training_around_a_constant_beats_its_start_which_beats_pairs(rows: LabelledRows) -> None:
    def loss(epochs: int, kind: str) -> float:
        recipe = replace(PSP, epochs=epochs, start=kind, batch=128)
        generator = seeded()
        start = starting_at(recipe, rows, TRAIN, generator)
        predictor = train_layer(start, rows, train=TRAIN, holdout=HOLDOUT, generator=generator)
        return importance_loss(predictor, rows)

    untrained = loss(0, "constant")
    assert untrained < 0.8 * loss(0, "pairs")
    assert loss(8, "constant") < 0.95 * untrained
