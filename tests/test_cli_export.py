"""`psp export-gguf` on the command line: verification, whose predictors, awkward file names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from gguf import GGUFValueType

from common.errors import printable
from common.hashing import HashedFile
from gguf_export.bundle import Bundle
from gguf_export.manifest import MANIFEST
from gguf_export.writer import ModelWriter
from gguf_files.reader import GGUFFile
from powerinfer_bridge.verify import verification

Psp = Callable[..., Result]
NAMES = ("a b", 'it\'s "q"; $(x)', "-dash", "Ünï 中😀", "50%d%s", "two\nlines", "bad\udcffbyte")


def command(model: Path, predictors: Path, out: Path) -> tuple[object, ...]:
    return "export-gguf", "--model", model, "--predictors", predictors, "--out", out


def files(directory: Path) -> dict[str, bytes]:
    found = (path for path in directory.rglob("*") if path.is_file())
    kept = (path for path in found if not path.name.endswith(MANIFEST))  # which tells the time
    return {str(path.relative_to(directory)): path.read_bytes() for path in kept}


def damaging(
    monkeypatch: pytest.MonkeyPatch, damage: Callable[[GGUFFile, bytearray], None]
) -> None:
    """Let the exporter write model files with a fault."""

    write = ModelWriter.write

    def faulty(writer: ModelWriter, path: Path, *args: Any, **settings: Any) -> HashedFile:
        written = write(writer, path, *args, **settings)
        content = bytearray(path.read_bytes())
        damage(GGUFFile(path), content)
        path.write_bytes(content)
        return written

    monkeypatch.setattr(ModelWriter, "write", faulty)


def not_a_number(file: GGUFFile, content: bytearray) -> None:
    at = file.tensors["blk.1.fc2.weight"].start
    content[at : at + 2] = np.float16("nan").tobytes()


def one_bit(file: GGUFFile, content: bytearray) -> None:
    content[file.tensors["blk.1.attn_q.weight"].start] ^= 1


def transposed(file: GGUFFile, content: bytearray) -> None:
    name = b"blk.1.fc2.weight"
    at = content.index(name) + len(name) + 4
    content[at : at + 16] = content[at + 8 : at + 16] + content[at : at + 8]


def test_an_export_is_verified_against_its_model(
    psp: Psp, model_dir: Path, exact_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.powerinfer.gguf"
    result = psp(*command(model_dir, exact_dir, out), "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    verified = json.loads(result.stdout)["verified"]
    assert (verified["ok"], verified["file"]) == (True, str(out))
    names = {check["name"] for check in verified["checks"]}
    assert names >= {"types", "model tensors", "model tokenizer", "dense logits", "perplexity gap"}
    assert verified["ppl_gap"] == pytest.approx(0, abs=1e-3)
    table = psp(*command(model_dir, exact_dir, out), "--force").stdout
    assert f"verified               {len(names)} checks hold" in table


def test_a_large_model_is_not_run_and_the_way_to_do_so_is_told(
    psp: Psp, model_dir: Path, exact_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = partial(verification.ExportCheck, most_bytes=1000)
    monkeypatch.setattr(verification, "ExportCheck", small)
    out = tmp_path / "a b" / "m.powerinfer.gguf"
    result = psp(*command(model_dir, exact_dir, out), "--json")
    verified = json.loads(result.stdout)["verified"]
    names = {check["name"] for check in verified["checks"]}
    assert names >= {"predictors finite", "model tensors", "model tokenizer"}
    assert not names & {"dense logits", "sparse logits", "perplexity gap"}
    assert len(result.stderr.splitlines()) == 1
    assert f"run 'psp verify '{out}' --model {model_dir}'" in result.stderr


def test_verification_can_be_left_out(
    psp: Psp, model_dir: Path, exact_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaging(monkeypatch, one_bit)
    out = tmp_path / "m.powerinfer.gguf"
    result = psp(*command(model_dir, exact_dir, out), "--no-verify", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["verified"] is None
    assert (
        "verified               no"
        in psp(*command(model_dir, exact_dir, out), "--no-verify", "--force").stdout
    )


@pytest.mark.parametrize(
    ("damage", "check"),
    [
        (not_a_number, "predictors finite"),
        (one_bit, "model tensors"),
        (transposed, "shapes"),
    ],
)
def test_a_file_that_fails_is_not_kept_and_old_outputs_stay(
    psp: Psp,
    model_dir: Path,
    exact_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[GGUFFile, bytearray], None],
    check: str,
) -> None:
    out = tmp_path / "out" / "m.powerinfer.gguf"
    arguments = (*command(model_dir, exact_dir, out), "--dense", "--vram-budget", "1MiB")
    assert psp(*arguments).exit_code == 0
    before = files(tmp_path)
    damaging(monkeypatch, damage)
    result = psp(*arguments, "--force")
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert f"{out}: the written file failed verification at '{check}'" in line
    assert ".part" not in line
    assert "; report this" in line
    assert files(tmp_path) == before


def test_predictors_of_an_existing_file_come_by_either_option(
    psp: Psp, model_dir: Path, exact_bundle: Bundle, tmp_path: Path
) -> None:
    made = []
    for number, option in enumerate(("--predictors", "--import-predictors-from")):
        out = tmp_path / str(number) / "m.powerinfer.gguf"
        arguments = (option, exact_bundle.model_file, "--model", model_dir, "--out", out)
        assert psp("export-gguf", *arguments, "--json").exit_code == 0
        made.append(files(out.parent))
    assert made[0] == made[1]
    recipe = GGUFFile(out).value("psp.recipe", GGUFValueType.STRING)
    assert json.loads(recipe) == {"name": "made by hand"}, "the file's own"


def test_predictors_come_from_exactly_one_place(
    psp: Psp, model_dir: Path, exact_dir: Path, exact_bundle: Bundle, tmp_path: Path
) -> None:
    first = ("--predictors", exact_dir)
    second = ("--import-predictors-from", exact_bundle.model_file)
    rest = ("--model", model_dir, "--out", tmp_path / "m.powerinfer.gguf")
    not_both = "Pass --predictors or --import-predictors-from, not both."
    problems: list[tuple[tuple[object, ...], str]] = [
        ((*first, *second), not_both),
        ((*second, *first), not_both),
        ((), "Missing option '--predictors' or '--import-predictors-from'"),
        ((second[0], exact_dir), "is a directory"),
        ((second[0], tmp_path / "gone.gguf"), "does not exist"),
    ]
    for options, problem in problems:
        result = psp("export-gguf", *options, *rest)
        assert result.exit_code == 2
        assert problem in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
    text = tmp_path / "text.gguf"
    text.write_text("no model")
    result = psp("export-gguf", second[0], text, *rest)
    assert result.exit_code == 1
    assert f"Error: {text}: magic is" in result.stderr


@pytest.mark.parametrize("name", NAMES)
def test_awkward_names_work_through_the_whole_command_line(
    psp: Psp,
    model_dir: Path,
    exact_dir: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    # safetensors refuses directories whose names are not UTF-8.
    source = name.replace("\udcff", "")
    shutil.copytree(model_dir, source)
    shutil.copytree(exact_dir, f"{source} predictors")
    file = f"{name}.powerinfer.gguf"
    export = command(Path(source), Path(f"{source} predictors"), Path(file))
    bench: tuple[object, ...] = ("--data", text_file, "--ctx", 32, "--chunks", 1)
    bench += ("-n", 2, "--repeats", 1, "--threads", 1)
    budget = ("--vram-budget", "1MiB", "--force")
    for arguments, key in (
        ((*export, "--dense", *budget), "model_file"),
        (("gpu-split", *budget, "--json", "--", file), None),
        (("verify", "--model", source, "--json", "--", file), "file"),
        (("inspect", "--json", "--", file), "file"),
        (("bench-powerinfer", *bench, "--json", "--", file), None),
        (("verify", "--", file), None),
        (("inspect", "--", file), None),
        ((*export, "--no-verify", "--force"), None),
    ):
        if arguments[0] == "export-gguf" and key:
            arguments = (*arguments, "--json")
        result = psp(*arguments)
        assert result.exit_code == 0, result.output
        if key:
            assert json.loads(result.stdout)[key] == file
    shown = GGUFFile(Path(file)).value("general.name", GGUFValueType.STRING)
    assert shown == source
    result = psp("verify", "--", f"no {file}")
    assert result.exit_code == 1
    assert f"no {printable(file)}" in result.stderr


def test_a_split_without_statistics_is_refused_before_anything_is_written(
    psp: Callable[..., Result], model_dir: Path, exact_bundle: Bundle, tmp_path: Path
) -> None:
    alone = tmp_path / "alone.powerinfer.gguf"
    shutil.copy(exact_bundle.model_file, alone)
    out = tmp_path / "out" / "m.powerinfer.gguf"
    options = ("--model", model_dir, "--import-predictors-from", alone, "--out", out)
    result = psp("export-gguf", *options, "--vram-budget", "24GiB")
    assert result.exit_code == 1
    assert f"{alone}: comes without activation statistics" in result.stderr
    assert not out.parent.exists()
    assert psp("export-gguf", *options, "--no-verify").exit_code == 0


def test_a_dense_file_comes_with_its_note(
    psp: Callable[..., Result], model_dir: Path, exact_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.powerinfer.gguf"
    options = ("--model", model_dir, "--predictors", exact_dir, "--out", out, "--no-verify")
    result = psp("export-gguf", *options, "--dense", "--dense-arch", "llama")
    assert "warning: dense file for timing only" in result.stderr
    assert "SiLU" in result.stderr
    assert "warning" not in psp("export-gguf", *options, "--force").stderr
    assert "warning" not in psp("export-gguf", *options, "--force", "--dense").stderr
