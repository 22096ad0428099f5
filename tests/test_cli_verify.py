"""`psp verify` and `psp inspect` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from gguf_export.bundle import Bundle

Psp = Callable[..., Result]


def test_a_good_file_passes_alone_and_with_its_model(
    psp: Psp, exact_bundle: Bundle, model_dir: Path
) -> None:
    alone = psp("verify", exact_bundle.model_file)
    assert alone.exit_code == 0, alone.output
    assert "all checks hold" in alone.stdout
    command = ("verify", exact_bundle.model_file, "--model", model_dir, "--json")
    result = psp(*command, "--max-ppl-gap", 0.5)
    document = json.loads(result.stdout)
    assert (result.exit_code, document["ok"]) == (0, True)
    assert document["ppl_gap"] == pytest.approx(document["ppl_sparse"] / document["ppl_dense"] - 1)
    assert all(check["ok"] for check in document["checks"])


@pytest.mark.parametrize("as_json", [True, False])
def test_a_damaged_file_exits_1_and_names_the_check(
    psp: Psp, exact_bundle: Bundle, tmp_path: Path, as_json: bool
) -> None:
    bad = tmp_path / "bad.powerinfer.gguf"
    data = bytearray(exact_bundle.model_file.read_bytes())
    data[-2:] = b"\x00\x7e"  # a NaN in the last predictor
    bad.write_bytes(data)
    result = psp("verify", bad, *(("--json",) if as_json else ()))
    assert result.exit_code == 1
    assert result.stderr == ""
    if as_json:
        failed = [c["name"] for c in json.loads(result.stdout)["checks"] if not c["ok"]]
        assert failed == ["predictors finite"]
    else:
        assert "predictors finite" in result.stdout
        assert "all checks hold" not in result.stdout


@pytest.mark.parametrize(
    ("name", "problem"), [("gone.gguf", "No such file or directory"), ("", "Is a directory")]
)
@pytest.mark.parametrize("options", [(), ("--json",), ("--model", "gone")])
def test_no_file_is_a_user_error_and_no_table(
    psp: Psp, tmp_path: Path, name: str, problem: str, options: tuple[str, ...]
) -> None:
    result = psp("verify", tmp_path / name, *options)
    assert (result.exit_code, result.stdout) == (1, "")
    remedy = "pass a file made by 'psp export-gguf'"
    assert result.stderr == f"Error: {tmp_path / name}: {problem}; {remedy}\n"


def test_another_model_exits_1(
    psp: Psp, exact_bundle: Bundle, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", seed=9)
    result = psp("verify", exact_bundle.model_file, "--model", other, "--json")
    failed = {c["name"] for c in json.loads(result.stdout)["checks"] if not c["ok"]}
    assert result.exit_code == 1
    assert {"model fingerprint", "model tensors"} <= failed


def test_an_unusable_model_is_a_user_error(psp: Psp, exact_bundle: Bundle, tmp_path: Path) -> None:
    result = psp("verify", exact_bundle.model_file, "--model", tmp_path / "gone")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1


def test_inspect_prints_what_is_in_the_file(psp: Psp, exact_bundle: Bundle, tmp_path: Path) -> None:
    text = psp("inspect", exact_bundle.model_file).stdout
    for part in ("PWRI", "llama.block_count", "blk.1.fc2.weight", "(1012, 128)"):
        assert part in text
    document = json.loads(psp("inspect", exact_bundle.model_file, "--json").stdout)
    assert document["file_bytes"] == exact_bundle.model_file.stat().st_size
    result = psp("inspect", tmp_path / "gone.gguf")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
