"""Scaling of rotary positions: what is accepted and written, and what PowerInfer makes of it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from conftest import ModelMaker, make_export, write_predictors
from gguf import GGUFValueType
from test_weights import Content, refusal, value

from architectures.checkpoint import Checkpoint
from architectures.rope import RopeScaling, read_rope, rope_parameters
from common.errors import CheckpointError
from gguf_export.bundle import Bundle
from gguf_export.pwri.hyperparameters import read_hyperparameters
from gguf_files.reader import GGUFFile
from powerinfer_bridge.engine.attention import Rotary
from powerinfer_bridge.engine.engine import Engine
from powerinfer_bridge.verify.verification import verify

LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
SCALED = RopeScaling(kind="yarn", factor=4.0, original_context=4096)

refused = partial(conftest.refused, CheckpointError)


def config(**values: Any) -> dict[str, Any]:
    return {"max_position_embeddings": 16384, **values}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"rope_scaling": None, "rope_parameters": None}, None),
        ({"rope_parameters": {"rope_type": "default"}}, None),
        ({"rope_scaling": LINEAR}, RopeScaling(kind="linear", factor=4.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeScaling(kind="linear", factor=2.0)),
        ({"rope_parameters": YARN}, SCALED),
        ({"rope_scaling": YARN | {"finetuned": True}}, SCALED),
        ({"rope_scaling": YARN | {"beta_fast": 32, "beta_slow": 1.0, "truncate": True}}, SCALED),
        ({"rope_scaling": YARN | {"attention_factor": 1 + 0.1 * math.log(4)}}, SCALED),
        # The second of the two makes no difference if it is 0 (transformers' default).
        ({"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.0}}, SCALED),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 2048},
            replace(SCALED, original_context=2048),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            replace(SCALED, original_context=16384),
        ),
        # transformers takes the old key where both are there.
        ({"rope_scaling": YARN, "rope_parameters": LINEAR}, SCALED),
    ],
    ids=str,
)
def test_what_powerinfer_computes_is_read(given: Any, expected: RopeScaling | None) -> None:
    assert read_rope(config(rope_theta=5e5, **given)) == (5e5, expected)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, ["rope_type is 'dynamic'", "'yarn'"]),
        ({"rope_type": "llama3", "factor": 8.0}, ["rope_type is 'llama3'", "'yarn'"]),
        ({"type": "su", "factor": 8.0}, ["rope_type is 'su'", "'yarn'"]),
        (
            {"rope_type": "longrope"},
            ["rope_type is 'longrope'", "PowerInfer scales positions in no other way"],
        ),
        ({"rope_type": "linear"}, ["factor is None", "above 0", "mend"]),
        ({"rope_type": "linear", "factor": 0.5}, ["factor is 0.5", "1 to 16777216", "mend"]),
        ({"rope_type": "linear", "factor": 1e300}, ["factor is 1e+300", "1 to 16777216", "mend"]),
        ({"rope_theta": 1e300}, ["rope_theta is 1e+300", "at most 1e+30", "mend"]),
        (YARN | {"rope_theta": 1.0}, ["rope_theta is 1.0", "above 1", "mend"]),
        ({"rope_type": "yarn", "factor": "4"}, ["factor is '4'", "above 0", "mend"]),
        (YARN | {"beta_fast": 16}, ["beta_fast is 16", "32", "PowerInfer reads no other"]),
        (YARN | {"beta_slow": 2}, ["beta_slow is 2", "1", "PowerInfer reads no other"]),
        (YARN | {"attention_factor": 1.0}, ["attention_factor is 1.0", "1.13863", "no other"]),
        (YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, ["attention_factor is 1.0", "1.13863"]),
        (YARN | {"truncate": False}, ["truncate is False", "true", "rounds the pairs"]),
        (YARN | {"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5", "whole heads"]),
        (
            YARN | {"original_max_position_embeddings": 6},
            ["embeddings is 6", "7 to 2010619", "mend"],
        ),
        (YARN | {"original_max_position_embeddings": 4.5}, ["embeddings is 4.5", "integer"]),
    ],
    ids=str,
)
def test_what_powerinfer_computes_otherwise_is_refused(given: Any, parts: list[str]) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        with refused("config.json", *parts):
            read_rope(config(**{key: given}))


@pytest.mark.parametrize("original", [7, 64, 2048, 4096, 10**6])
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("scaling", ["linear", "yarn", None])
def test_frequencies_are_transformers_own(
    exact_bundle: Bundle, scaling: Any, theta: float, original: int
) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    found = scaling and RopeScaling(
        kind=scaling, factor=8.0, original_context=original if scaling == "yarn" else 0
    )
    hyper = read_hyperparameters(GGUFFile(exact_bundle.model_file))
    hyper = replace(hyper, n_heads=1, n_kv_heads=1, rope_theta=theta, rope_scaling=found)
    settings = LlamaConfig(
        hidden_size=hyper.d_model,
        num_attention_heads=1,
        max_position_embeddings=8 * original,
        rope_parameters=rope_parameters(theta, found),
    )
    positions = torch.tensor([0, 1, 2, 77, 1000])
    cosine, sine = LlamaRotaryEmbedding(settings)(torch.zeros(1), positions[None])
    # What (1, 0) is turned into, pair by pair, is cosine and sine.
    units = torch.tensor([1.0, 0.0]).repeat(hyper.head_dim // 2).expand(1, len(positions), -1)
    turned = Rotary(hyper)(units, positions)[0]
    half = hyper.head_dim // 2
    torch.testing.assert_close(turned[:, 0::2], cosine[0, :, :half], atol=2e-4, rtol=0)
    torch.testing.assert_close(turned[:, 1::2], sine[0, :, :half], atol=2e-4, rtol=0)


@pytest.fixture(scope="module")
def scaled(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    path = tmp_path_factory.mktemp("scaled")
    parameters = rope_parameters(1e4, replace(SCALED, factor=3.3, original_context=32))
    model = make_model(path / "model", rope_parameters=parameters)
    write_predictors(model, path / "predictors")
    return model, make_export(model, path / "predictors", path / "m.powerinfer.gguf")


def test_a_scaling_is_written_under_powerinfer_s_keys(scaled: tuple[Path, Bundle]) -> None:
    file = GGUFFile(scaled[1].model_file)
    found = {
        name.removeprefix("llama.rope.scaling."): (value.kind, value.data)
        for name, value in file.values.items()
        if "scaling" in name
    }
    assert found == {
        "type": (GGUFValueType.STRING, b"yarn"),
        "factor": (GGUFValueType.FLOAT32, pytest.approx(3.3)),
        "original_context_length": (GGUFValueType.UINT32, 32),
        "finetuned": (GGUFValueType.BOOL, True),
    }


def test_without_a_scaling_there_are_no_such_keys(exact_bundle: Bundle) -> None:
    assert not [name for name in GGUFFile(exact_bundle.model_file).values if "scal" in name]


def test_only_a_scaled_model_has_it_in_its_fingerprint(
    scaled: tuple[Path, Bundle], model_dir: Path
) -> None:
    """So that of any other is what it was before scalings were known."""
    plain, other = Checkpoint.open(model_dir), Checkpoint.open(scaled[0])
    assert "rope_scaling" not in plain.shape.facts()
    assert other.shape.facts()["rope_scaling"]["factor"] == 3.3
    unscaled = replace(other, shape=replace(other.shape, rope_scaling=None))
    assert unscaled.fingerprint == plain.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("key", "data", "part"),
    [
        ("type", b"su", "type is 'su', expected 'none', 'linear' or 'yarn'"),
        ("factor", 0.0, "factor is 0, expected"),
        ("factor", math.inf, "factor is inf, expected"),
        ("factor", math.nan, "factor is nan, expected"),
    ],
)
def test_an_impossible_scaling_in_a_file_is_refused(
    scaled: tuple[Path, Bundle], tmp_path: Path, key: str, data: Any, part: str
) -> None:
    change = value(f"llama.rope.scaling.{key}", data)
    assert f"llama.rope.scaling.{part}" in refusal(scaled[1], tmp_path, change)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"type": b"none"}, None),
        ({"factor": 1.0}, None),
        ({"type": b"linear"}, RopeScaling(kind="linear", factor=3.25)),
        (
            {"original_context_length": 0},
            RopeScaling(kind="yarn", factor=3.25, original_context=128),
        ),
        ({}, RopeScaling(kind="yarn", factor=3.25, original_context=32)),
    ],
    ids=str,
)
def test_a_file_s_scaling_is_read_as_powerinfer_reads_it(
    scaled: tuple[Path, Bundle], tmp_path: Path, changes: dict[str, Any], expected: Any
) -> None:
    content = Content.of(scaled[1].model_file)
    for key, data in ({"factor": 3.25} | changes).items():
        content.set(f"llama.rope.scaling.{key}", data)
    path = content.write(tmp_path / "changed.powerinfer.gguf")
    assert Engine(path).hyper.rope_scaling == expected


@pytest.mark.parametrize(
    ("key", "data"), [("type", b"linear"), ("factor", 3.2), ("original_context_length", 33)]
)
def test_verify_finds_another_scaling_than_the_model_s(
    scaled: tuple[Path, Bundle], tmp_path: Path, key: str, data: Any
) -> None:
    model, bundle = scaled
    content = Content.of(bundle.model_file)
    for path, checks in ((tmp_path / "same.gguf", []), (tmp_path / "other.gguf", ["model sizes"])):
        document = verify(content.write(path), str(model), run=False).document()
        assert [check["name"] for check in document["checks"] if not check["ok"]] == checks
        content.set(f"llama.rope.scaling.{key}", data)


def test_a_base_that_yarn_cannot_blend_is_refused(
    scaled: tuple[Path, Bundle], tmp_path: Path
) -> None:
    """PowerInfer divides by the base's logarithm there."""
    message = refusal(scaled[1], tmp_path, value("llama.rope.freq_base", 1.0))
    assert "rope.freq_base is 1, expected a number above 1" in message
