"""What export will refuse of a model, and say of it, is said by collect and sparsify already."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizer_kinds as kinds
from click.testing import Result
from conftest import ModelMaker, exact, make_export, write_predictors

from architectures.checkpoint import Checkpoint
from common.errors import ExportError
from gguf_export.requirements import foresee

Psp = Callable[..., Result]
REFUSAL = "psp export-gguf will refuse this model: "


@pytest.fixture
def lacking(make_model: ModelMaker, tmp_path: Path) -> Path:
    """A model with too few neurons whose vocabulary lacks the byte DF, which leads letters."""
    path = make_model(tmp_path / "m", vocab_size=640, intermediate_size=96)
    (path / "tokenizer.model").unlink()
    for file in kinds.byte_level(tmp_path / "t", "GPT-2", ["<s>", "<s/>"]).iterdir():
        shutil.copy(file, path)
    kinds.change(path, lambda d: d["model"]["vocab"].pop("ß"))
    return path


def test_a_model_that_export_takes_needs_no_word(model_dir: Path) -> None:
    assert list(foresee(Checkpoint.open(model_dir))) == []


def test_it_is_what_export_refuses(lacking: Path, tmp_path: Path) -> None:
    lines = list(foresee(Checkpoint.open(lacking)))
    assert [line.removeprefix(REFUSAL) for line in lines] == [
        "d_ff 96 is below 1001; PowerInfer computes smaller FFNs wrongly",
        f"{lacking}/tokenizer.json: token 'ß' of byte 223 is missing; PowerInfer needs it, use "
        "another tokenizer",
    ]
    write_predictors(lacking, tmp_path / "predictors", exact)
    with pytest.raises(ExportError) as refused:
        make_export(lacking, tmp_path / "predictors", tmp_path / "m.powerinfer.gguf")
    assert lines[0] == f"{REFUSAL}{refused.value}"


@pytest.mark.parametrize("command", ["collect", "sparsify"])
def test_both_commands_say_it_before_they_begin(
    psp: Psp, lacking: Path, tmp_path: Path, command: str
) -> None:
    data, schedule = tmp_path / "text.txt", tmp_path / "one.yaml"
    data.write_text("def main(): return 1\n" * 400)
    schedule.write_text("stages:\n- {kind: substitution, lambda: 0, until_step: 1}\n")
    more: tuple[object, ...] = ("--tokens", 300, "--context", 32)
    if command == "sparsify":
        more = ("--schedule", schedule, "--context", 32, "--batch", 1, "--device", "cpu")
    result = psp(
        command, "--model", lacking, "--data", data, "--out", tmp_path / "out", *more, "--json"
    )
    assert result.exit_code == 0, result.output
    lines = [line.removeprefix("note: ") for line in result.stderr.splitlines()]
    assert lines[0] == "tokens: those of tokenizer.json, by tokenizers"
    assert sum(line.startswith(REFUSAL) for line in lines) == 2
    assert json.loads(result.stdout)


def test_what_powerinfer_does_otherwise_is_said_with_its_share(
    lacking: Path, psp: Psp, tmp_path: Path
) -> None:
    kinds.byte_level(lacking, "Llama-3", ["<s>", "<s/>"])
    lines = list(foresee(Checkpoint.open(lacking)))
    assert any("as GPT-2 does, the model's tokenizer as Llama-3" in line for line in lines)
    assert any("% of the ids of texts of many kinds differ" in line for line in lines)
