"""Types of tensors in a file that are not those of its export: which run, and which spoil it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXT, make_export, write_predictors
from gguf import GGMLQuantizationType as Kind
from rewriting import recast, rewritten, tensors_of

from common.errors import EngineError
from gguf_export.bundle import Bundle
from powerinfer_bridge.engine.engine import Engine
from powerinfer_bridge.engine.perplexity import engine_perplexity
from powerinfer_bridge.programs.powerinfer import PowerInfer
from powerinfer_bridge.verify.verification import verify

FFN = ("ffn_gate", "ffn_up", "ffn_down_t")
OTHERS = ("token_embd", "attn_q", "attn_k", "attn_v", "attn_output", "output.weight")


def failed(file: Path) -> dict[str, str]:
    checks = verify(file).checks
    return {name: outcome.line for name, outcome in checks.items() if not outcome.ok}


def told(file: Path) -> str:
    return verify(file).checks["predictor types"].detail


def changed(bundle: Bundle, tmp_path: Path, kind: Kind, *parts: str, **keys: Any) -> Path:
    """Return the file with some tensors in another type."""
    tensors = recast(bundle.model_file, kind, *parts)
    assert tensors
    return rewritten(bundle.model_file, tmp_path / "m.powerinfer.gguf", tensors=tensors, keys=keys)


@pytest.mark.parametrize("part", ["fc1", "fc2"])
def test_rounded_predictors_fail_verification(
    exact_bundle: Bundle, tmp_path: Path, part: str
) -> None:
    assert told(exact_bundle.model_file) == "F16, as exported"
    found = failed(changed(exact_bundle, tmp_path, Kind.Q4_0, f"1.{part}"))
    assert list(found) == ["predictor types"]
    for said in (f"tensor blk.1.{part}.weight is Q4_0", "exported as F16", "--outtype q4_0"):
        assert said in found["predictor types"]


@pytest.mark.parametrize(
    ("recipe", "holds"),
    [
        ({"name": "psp", "start": "constant"}, False),
        ({"name": "svd", "start": "pairs"}, True),
        ({"name": "imported"}, True),
        (["start"], True),
    ],
)
def test_files_from_before_the_key_are_judged_by_their_recipe(
    exact_bundle: Bundle, tmp_path: Path, recipe: object, holds: bool
) -> None:
    keys = {"psp.predictor_type": None, "psp.recipe": json.dumps(recipe)}
    file = changed(exact_bundle, tmp_path, Kind.Q4_0, "fc1", "fc2", **keys)
    assert (not failed(file)) is holds
    assert holds is ("the file says no other" in told(file))


def test_a_recipe_that_is_no_json_says_nothing(exact_bundle: Bundle, tmp_path: Path) -> None:
    for number, recipe in enumerate(("no json", "[" * 100_000)):
        keys = {"psp.predictor_type": None, "psp.recipe": recipe}
        (tmp_path / str(number)).mkdir()
        file = changed(exact_bundle, tmp_path / str(number), Kind.Q4_0, "fc1", **keys)
        assert not failed(file)


@pytest.mark.parametrize("part", FFN)
@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q4_1])
def test_the_sparse_ffn_has_two_types(
    exact_bundle: Bundle, tmp_path: Path, part: str, kind: Kind
) -> None:
    found = failed(changed(exact_bundle, tmp_path, kind, part))
    assert list(found) == ["types"]
    assert f"{part}.weight is {kind.name}, expected F16 or Q4_0" in found["types"]


@pytest.mark.parametrize("kind", [Kind.BF16, Kind.TQ1_0])
def test_types_that_powerinfer_s_ggml_does_not_have_are_refused(
    exact_bundle: Bundle, make_model: Callable[..., Path], tmp_path: Path, kind: Kind
) -> None:
    bundle = exact_bundle if kind is Kind.BF16 else _wide(make_model, tmp_path)
    found = failed(changed(bundle, tmp_path, kind, "attn_q"))
    assert f"attn_q.weight is {kind.name}, expected F16 or Q4_0 or F32" in found["types"]


def _wide(make_model: Callable[..., Path], path: Path) -> Bundle:
    """Return a model whose rows are whole blocks of K-quants, with predictors of rank 512."""
    model = make_model(path / "wide", hidden_size=256, num_hidden_layers=1)
    write_predictors(model, path / "predictors")
    return make_export(model, path / "predictors", path / "wide.powerinfer.gguf")


def compare(programs: Path, file: Path) -> None:
    """Demand the embedded engine's perplexity of PowerInfer, for a file that passes."""
    assert not failed(file)
    text = TEXT * 4
    real = PowerInfer(programs).perplexity(file, text, 64, None, threads=1)
    assert engine_perplexity(Engine(file), text, 64, None, "engine") == pytest.approx(
        real, rel=0.005
    )


@pytest.mark.powerinfer
@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_other_matrices_run_in_every_type(
    powerinfer_bin: Path, exact_bundle: Bundle, tmp_path: Path, kind: Kind
) -> None:
    compare(powerinfer_bin, changed(exact_bundle, tmp_path, kind, *OTHERS))


@pytest.mark.powerinfer
@pytest.mark.parametrize("name", ["Q2_K", "Q3_K_S", "Q4_K_S", "Q5_K_S", "Q6_K"])
def test_other_matrices_run_as_k_quants(
    powerinfer_bin: Path, make_model: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    plain, theirs = _wide(make_model, tmp_path).model_file, tmp_path / "theirs.gguf"
    command = [str(powerinfer_bin / "quantize"), "--pure", str(plain), str(theirs), name, "1"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    tensors = {
        key: tensor
        for key, tensor in tensors_of(theirs).items()
        if any(part in key for part in OTHERS)
    }
    assert {kind.name for _, kind, _ in tensors.values()} == {name.removesuffix("_S")}
    compare(powerinfer_bin, rewritten(plain, tmp_path / "k.powerinfer.gguf", tensors=tensors))


@pytest.mark.powerinfer
@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q4_1])
def test_another_down_matrix_gives_no_perplexity(
    powerinfer_bin: Path, exact_bundle: Bundle, tmp_path: Path, kind: Kind
) -> None:
    file = changed(exact_bundle, tmp_path, kind, "ffn_down_t")
    with pytest.raises(EngineError, match="perplexity"):
        PowerInfer(powerinfer_bin).perplexity(file, TEXT * 4, 64, None, threads=1)
