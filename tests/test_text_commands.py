"""Commands on text as people keep it: its forms give the same traces; what is refused."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cli import main
from predictor.traces.store import TraceStore

TOKENS, CONTEXT = 900, 64
Collect = Callable[..., Result]


@pytest.fixture
def collect(model_dir: Path, tmp_path: Path) -> Collect:
    """Collect to `out` from sources, or from what is piped in."""

    def run(*sources: object, piped: bytes = b"", out: str = "out", options: str = "") -> Result:
        named = [part for source in sources for part in ("--data", str(source))]
        paths = ["--model", str(model_dir), "--out", str(tmp_path / out)]
        sizes = ["--tokens", str(TOKENS), "--context", str(CONTEXT), *options.split()]
        return CliRunner().invoke(
            main, ["collect", *paths, *named, *sizes], input=io.BytesIO(piped)
        )

    return run


@pytest.fixture
def halves(data_file: Path, tmp_path: Path) -> list[Path]:
    """The session's text in two files, of which the second is packed."""
    lines = data_file.read_bytes().splitlines(keepends=True)
    paths = [tmp_path / "text" / "a.jsonl", tmp_path / "text" / "b.jsonl.gz"]
    paths[0].parent.mkdir()
    paths[0].write_bytes(b"".join(lines[:2]))
    paths[1].write_bytes(gzip.compress(b"".join(lines[2:])))
    return paths


def recorded(path: Path) -> dict[str, bytes]:
    """Return every file but the manifest, which names the source."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*.safetensors")}


def one_line(result: Result) -> str:
    assert result.exit_code == 1, result.output
    told = ("disk: ", "tokens: ", "note: tokens: ")
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith(told)]
    return line


def of_rows(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if "passed over" in line]


def test_every_form_of_a_text_gives_the_same_traces(
    collect: Collect, data_file: Path, halves: list[Path], tmp_path: Path
) -> None:
    assert collect(data_file, out="plain").exit_code == 0
    plain = recorded(tmp_path / "plain")
    assert plain
    packed = gzip.compress(data_file.read_bytes())
    forms: dict[str, dict[str, Any]] = {
        "several": {"sources": halves},
        "folder": {"sources": [halves[0].parent]},
        "pattern": {"sources": [halves[0].parent / "*.jsonl*"]},
        "piped": {"sources": ["-"], "piped": data_file.read_bytes()},
        "packed": {"sources": ["-:jsonl"], "piped": packed},
    }
    for out, form in forms.items():
        result = collect(*form["sources"], piped=form.get("piped", b""), out=out)
        assert result.exit_code == 0, result.output
        assert recorded(tmp_path / out) == plain, out
    several = TraceStore.open(tmp_path / "several")
    assert several.header.data == tuple(map(str, halves))
    assert TraceStore.open(tmp_path / "piped").header.data == "-"
    again = collect(*halves, out="several", options="--resume")
    assert again.exit_code == 0, again.output
    other = collect(*halves[::-1], out="several", options="--resume")
    assert "was collected with data" in one_line(other)


def test_rows_without_text_are_told_and_kept_in_the_manifest(
    collect: Collect, tmp_path: Path
) -> None:
    text = "A sentence of some words. " * 20
    rows = [{"text": text}, {"text": None}, {"text": text}, {"body": "x"}, {"text": text}]
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows))
    result = collect(path, options="--tokens 9000 --json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["skipped_rows"] == 2
    line = "2 rows were passed over, without text under 'text'"
    assert of_rows(result) == [f"{line}, the first is {path}:2"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["progress"]["skipped_rows"] == 2
    again = collect(path, options="--tokens 9000 --resume")
    assert of_rows(again) == [line]


def test_rows_without_text_are_told_once_and_only_those_that_were_met(
    collect: Collect, data_file: Path, tmp_path: Path
) -> None:
    """The look before the run goes further than the run."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": null}\n' + data_file.read_bytes() + b'{"text": null}\n' * 3)
    result = collect(path, options="--tokens 100 --json")
    assert json.loads(result.stdout)["skipped_rows"] == 1
    line = "1 row was passed over, without text under 'text', the first is"
    assert of_rows(result) == [f"{line} {path}:1"]


def test_bad_text_is_one_line_and_nothing_is_written(
    collect: Collect, halves: list[Path], tmp_path: Path
) -> None:
    packed = gzip.compress(b'{"text": "a text"}\n' * 3)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-6])
    (tmp_path / "text" / "c.txt").write_text("text")
    cases = {
        "cut.jsonl.gz": "cut.jsonl.gz: cut off after line 3",
        "*.parquet": "*.parquet: matches no file",
        "text": "text: holds mixed kinds (2 .jsonl, 1 .txt)",
        "text/*.md": "matches no file",
    }
    for name, problem in cases.items():
        assert problem in one_line(collect(tmp_path / name))
    # The first file has fewer tokens than are wanted: the second is met before the work begins.
    assert "cut off after line 3" in one_line(collect(halves[0], tmp_path / "cut.jsonl.gz"))
    assert not (tmp_path / "out").exists()


def test_standard_input_cannot_be_resumed(collect: Collect, tmp_path: Path) -> None:
    line = one_line(collect("-", piped=b"text", options="--resume"))
    assert line == (
        "Error: -: --resume cannot read standard input again; collect anew, or from a file"
    )


def test_a_gap_cannot_be_measured_on_what_came_from_standard_input(
    collect: Collect, data_file: Path, tmp_path: Path
) -> None:
    assert collect("-", piped=data_file.read_bytes()).exit_code == 0
    train = ["train-predictor", "--traces", str(tmp_path / "out"), "--out", str(tmp_path / "p")]
    result = CliRunner().invoke(main, [*train, "--rank", "32", "--max-ppl-gap", "1%"])
    assert "cannot read standard input again; pass --data" in one_line(result)
    assert not (tmp_path / "p").exists()
    gone = [*train, "--rank", "32", "--max-ppl-gap", "1%", "--data", "gone.jsonl"]
    assert "gone.jsonl: no such file" in one_line(CliRunner().invoke(main, gone))
    assert not (tmp_path / "p").exists()


def test_standard_input_is_one_of_the_texts_of_sparsify_at_most(
    model_dir: Path, tmp_path: Path
) -> None:
    command = ["sparsify", "--model", str(model_dir), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*command, "--data", "-", "--eval-data", "-:txt"])
    assert "standard input is one text only" in one_line(result)
    result = CliRunner().invoke(main, [*command, "--data", "-", "--resume", "--device", "cpu"])
    assert "--resume cannot read standard input again" in one_line(result)
