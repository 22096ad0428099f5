"""The speed fixture: an exact share of neurons predicted, and a model that predictions leave be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import TEXT, refused

from benchmarks import speed_fixture
from benchmarks.exact_density import FixtureShape, predictor, roles
from benchmarks.speed_fixture import FixtureConfig, make_and_check, make_fixture
from common.decisions import DecisionCounts
from common.errors import CheckpointError, EngineError, ExportError, OutputError
from gguf_export.bundle import Bundle
from gguf_export.pwri.schema import DENSE_THRESHOLD
from powerinfer_bridge.engine.attention import KVCache
from powerinfer_bridge.engine.engine import Engine, generate
from powerinfer_bridge.engine.perplexity import engine_perplexity

DENSITIES = {0.05: 51, 0.5: 512, 0.75: 768, 1.0: 1024}
"""Of 1024 neurons; 0.05 is none of their shares."""

TINY: dict[str, Any] = {"d_model": 64, "d_ff": 1024, "n_heads": 4, "n_layers": 2, "rank": 32}
TINY_OPTIONS = ["--d-model", 64, "--d-ff", 1024, "--heads", 4, "--layers", 2, "--rank", 32]
LONG_TEXT = TEXT * 4


@dataclass
class Masks(DecisionCounts):
    """Keeps the decisions themselves."""

    kept: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def add(self, active: torch.Tensor, predicted: torch.Tensor) -> None:
        self.kept.append((active, predicted))


@dataclass(frozen=True)
class Made:
    """A tiny fixture and its model."""

    shape: FixtureShape
    bundle: Bundle
    model: Path

    def masks(self, tokens: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return each layer's active and predicted neurons, (tokens, d_ff) bool."""
        engine, kept = Engine(self.bundle.model_file), [Masks() for _ in range(2)]
        engine.counts = list(kept)
        engine.forward(tokens, KVCache(2))
        return [masks.kept[0] for masks in kept]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_bytes: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tokenizer_bytes)
    return path


@pytest.fixture(scope="module")
def make(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Made]:
    """Make each density once."""
    known: dict[float, Made] = {}

    def made(density: float) -> Made:
        if density not in known:
            shape = FixtureShape(density=density, **TINY)
            out = tmp_path_factory.mktemp("fixture")
            config = FixtureConfig(
                shape=shape, tokenizer=tokenizer, out=out, dense=True, keep_model=True
            )
            known[density] = Made(shape, make_fixture(config), out / config.name)
        return known[density]

    return made


def run(*options: object) -> Result:
    return CliRunner().invoke(speed_fixture.main, [str(option) for option in options])


@pytest.mark.parametrize("density", DENSITIES)
def test_every_token_predicts_the_same_number_in_every_layer(
    make: Callable[[float], Made], density: float
) -> None:
    made = make(density)
    tokens = list(range(320))
    first, second = made.masks(tokens), made.masks(tokens[::-1])
    for (_, one), (_, other) in zip(first, second, strict=True):
        assert torch.equal(one, other.flip(0))  # the token alone decides, not what came before
    for _, predicted in (*first, *second):
        assert predicted.shape == (320, 1024)
        assert predicted.sum(1).tolist() == [DENSITIES[density]] * 320
    assert made.shape.exact_density == DENSITIES[density] / 1024


@pytest.mark.parametrize("density", DENSITIES)
def test_who_is_predicted_varies_with_the_token_and_is_spread_over_the_layer(
    make: Callable[[float], Made], density: float
) -> None:
    made = make(density)
    for layer, (_, predicted) in enumerate(made.masks(list(range(320)))):
        share, role = predicted.double().mean(0), roles(made.shape, layer)
        paired = torch.cat([role.positive, role.negative])
        assert bool((share[role.always] == 1).all())
        assert bool((share[role.never] == 0).all())
        assert bool(((share[paired] > 0.3) & (share[paired] < 0.7)).all())
        assert bool((share[role.positive] + share[role.negative] == 1).all())
        assert len(paired) + len(role.always) + len(role.never) == 1024
        if density == 0.05:  # not in one stretch: every quarter has some
            assert len(set((paired // 256).tolist())) == 4
    if density < 1:
        layers = made.masks([5, 6, 7])
        assert not torch.equal(layers[0][1], layers[1][1])
        assert len({tuple(row.tolist()) for row in layers[0][1]}) == 3


@pytest.mark.parametrize("density", DENSITIES)
def test_predictions_are_exact(make: Callable[[float], Made], density: float) -> None:
    for active, predicted in make(density).masks(list(range(320))):
        assert not bool((active & ~predicted).any())
        if density <= 0.5:
            assert torch.equal(active, predicted)
        else:
            assert 0.45 < float(active.double().mean()) < 0.55


@pytest.mark.parametrize("density", DENSITIES)
def test_all_neurons_give_the_same_model(make: Callable[[float], Made], density: float) -> None:
    engine = Engine(make(density).bundle.model_file)
    dense, empty = engine.with_threshold(DENSE_THRESHOLD), engine.with_threshold(1e30)
    predicted, everything, nothing = (
        engine_perplexity(each, LONG_TEXT, 64, 4, "") for each in (engine, dense, empty)
    )
    assert math.isfinite(predicted)
    assert everything == pytest.approx(predicted, rel=1e-6)
    assert abs(nothing / predicted - 1) > 1e-2  # or the FFN would not show at all
    done = generate(engine, "The ", 60)
    assert done.tokens == generate(dense, "The ", 60).tokens
    assert len(set(done.tokens)) == 60  # text that dwells on few tokens would fit a cache


@pytest.mark.parametrize("density", [0.05, 0.75])
def test_the_file_is_the_model(
    make: Callable[[float], Made], psp: Callable[..., Result], density: float
) -> None:
    made = make(density)
    result = psp("verify", made.bundle.model_file, "--model", made.model)
    assert result.exit_code == 0, result.output
    assert made.bundle.dense_file.read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("predictor_type", ["f16", "q4_0"])
def test_blocks_of_four_bits_decide_the_same(
    tokenizer: Path, tmp_path: Path, predictor_type: str
) -> None:
    shape = FixtureShape(density=0.1, **TINY | {"rank": 64})
    config = FixtureConfig(
        shape=shape,
        tokenizer=tokenizer,
        out=tmp_path / "q",
        outtype="q4_0",
        predictor_type=predictor_type,
    )
    made = make_and_check(config)
    assert made["predicted_neurons"] == 102
    for active, predicted in Made(shape, config.bundle, tmp_path).masks(list(range(320))):
        assert torch.equal(active, predicted)


def test_the_seed_decides(tokenizer: Path, tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        shape = FixtureShape(density=0.2, seed=seed, **TINY)
        config = FixtureConfig(shape=shape, tokenizer=tokenizer, out=tmp_path / name)
        files.append(make_fixture(config).model_file.read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"density": 0.0}, "density 0 "),
        ({"density": -0.1}, "density -0.1 "),
        ({"density": 1.01}, "density 1.01 "),
        ({"density": math.nan}, "density nan "),
        ({"density": 0.0004}, "0.00049, 1]"),
        ({"rank": 33}, "rank 33 is no multiple of 32"),
        ({"rank": 0}, "rank 0 "),
        ({"rank": 96}, "at most d_model"),
        ({"d_model": 60}, "d_model 60 "),
        ({"n_heads": 3}, "3 heads"),
        ({"n_heads": 64}, "heads of an even size"),
        ({"n_layers": 0}, "layers 0 "),
        ({"d_ff": 1000}, "d_ff 1000 is below 1001"),
    ],
)
def test_shapes_that_cannot_be_made_are_refused(changes: dict[str, Any], part: str) -> None:
    with refused(ExportError, part, "choose"):
        FixtureShape(**({"density": 0.1} | TINY | changes))


@pytest.mark.parametrize(
    ("density", "d_ff", "predicted"),
    [(0.05, 1024, 51), (0.1, 11008, 1101), (0.0005, 1024, 1), (0.4995, 1001, 500), (1, 1001, 1001)],
)
def test_densities_are_whole_neurons(density: float, d_ff: int, predicted: int) -> None:
    shape = FixtureShape(**(TINY | {"density": density, "d_ff": d_ff}))
    assert shape.predicted == predicted == shape.pairs + shape.always
    assert shape.exact_density == predicted / d_ff
    role = roles(shape, 0)
    assert sorted(torch.cat([role.positive, role.negative, role.always, role.never]).tolist()) == [
        *range(d_ff)
    ]


def test_the_command_says_what_it_made(tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    options = ["--density", 0.05, "--tokenizer", tokenizer, "--dense", *TINY_OPTIONS]
    result = run("--out", out, *options)
    assert result.exit_code == 0, result.output
    assert "51 of 1024 neurons are predicted: a density of 0.0498047\n" in result.stderr
    (line,) = result.stdout.splitlines()
    document = json.loads(line)
    files = [Path(document[key]) for key in ("model_file", "dense_file")]
    assert document["bytes"] == {file.name: file.stat().st_size for file in files}
    assert document["density"] == 51 / 1024
    assert document["predicted_neurons"] == 51
    assert document["shape"] == {"density": 0.05, "seed": 0, **TINY}
    assert document["seconds"] > 0
    assert document["peak_rss_bytes"] > 10_000_000
    assert not any(path.name.startswith(".") for path in out.iterdir())
    assert not (out / "density-0.05").exists()
    again = run("--out", out, *options)
    assert again.exit_code == 1
    assert "density-0.05.powerinfer.gguf exists" in again.stderr


def test_what_is_in_the_way_stays_as_it_is(tokenizer: Path, tmp_path: Path) -> None:
    kept = tmp_path / "density-0.5"
    kept.mkdir()
    (kept / "mine").write_text("x")
    shape = FixtureShape(density=0.5, **TINY)
    with refused(OutputError, str(kept)):
        make_fixture(FixtureConfig(shape=shape, tokenizer=tokenizer, out=tmp_path))
    assert [path.name for path in tmp_path.rglob("*")] == ["density-0.5", "mine"]


def test_no_tokenizer_leaves_nothing(tmp_path: Path) -> None:
    tokenizer, shape = tmp_path / "tokenizer.model", FixtureShape(density=0.5, **TINY)
    tokenizer.write_bytes(b"no model")
    with refused(CheckpointError, str(tokenizer), "tokenizer.model"):
        make_fixture(FixtureConfig(shape=shape, tokenizer=tokenizer, out=tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def test_a_density_that_is_missed_is_an_error(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_more(shape: FixtureShape, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        fc1, fc2 = predictor(shape, layer)
        fc2[roles(shape, layer).never[:layer]] = 1
        return fc1, fc2

    monkeypatch.setattr(speed_fixture, "predictor", one_more)
    shape = FixtureShape(density=0.1, **TINY)
    with refused(EngineError, "[102, 103]", "expected 102"):
        make_and_check(FixtureConfig(shape=shape, tokenizer=tokenizer, out=tmp_path))


@pytest.mark.powerinfer
@pytest.mark.parametrize("density", [0.05, 0.75])
def test_powerinfer_computes_the_same(
    make: Callable[[float], Made], powerinfer_bin: Path, density: float
) -> None:
    from powerinfer_bridge.programs.powerinfer import PowerInfer

    file = make(density).bundle.model_file
    engine, real = Engine(file), PowerInfer(powerinfer_bin)
    expected = engine_perplexity(engine, LONG_TEXT, 64, 4, "")
    for threshold in (None, DENSE_THRESHOLD):
        found = real.perplexity(file, LONG_TEXT, 64, 4, threads=1, threshold=threshold)
        assert found == pytest.approx(expected, rel=2e-4)
        run = real.generate(file, "The ", 40, threads=1, context=64, threshold=threshold)
        assert run.text is not None
        assert run.text.strip() == generate(engine, "The ", 40).text.strip()
