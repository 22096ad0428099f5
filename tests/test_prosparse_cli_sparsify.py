"""psp sparsify on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from conftest import ModelMaker

from prosparse.training_log import read_log

pytestmark = pytest.mark.usefixtures("trainer_is_imported")
Run = Callable[..., Result]
STAGES = """stages:
- {kind: substitution, lambda: 0, until_step: 20}
- {kind: progressive, lambda: 20, until_step: 80}
"""


@pytest.fixture
def run(psp: Callable[..., Result], make_model: ModelMaker, data_file: Path, tmp_path: Path) -> Run:
    """Call `psp sparsify` with a model, text, output and a small schedule."""
    model = make_model(tmp_path / "silu", hidden_act="silu", intermediate_size=96)
    (tmp_path / "stages.yaml").write_text(STAGES)

    def call(*options: object) -> Result:
        arguments = ["--model", model, "--data", data_file, "--out", tmp_path / "sparse"]
        arguments += ["--schedule", tmp_path / "stages.yaml", "--scale", 0.1, "--context", 32]
        arguments += ["--batch", 2, "--learning-rate", 5e-3, "--device", "cpu", "--threads", 1]
        return psp("sparsify", *arguments, *options)

    return call


def test_prints_layers_and_perplexity(run: Run, tmp_path: Path) -> None:
    result = run("--log-every", 2)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["layer", "sparsity", "%"]
    assert [line.split()[0] for line in lines[2:5]] == ["0", "1", "mean"]
    assert "held-out perplexity" in result.stdout
    steps = [line["step"] for line in read_log(tmp_path / "sparse" / "training" / "log.jsonl")]
    assert steps == [0, 2, 4, 6, 8, 8]


def test_json_is_one_document_alone_on_standard_output(run: Run, tmp_path: Path) -> None:
    document = json.loads(run("--json").stdout)
    assert document["steps"] == 8
    assert document["model"] == str(tmp_path / "sparse")
    assert len(document["layers"]) == 2
    again = run("--json", "--resume")  # finished: nothing is trained again
    assert json.loads(again.stdout) == document


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--scale", 0.01), "Error: --scale 0.01 leaves a stage"),
        (("--schedule", "3b"), "Error: schedule '3b' is unknown"),
        (("--batch", 1000), "Error: "),
        (("--rate", "decay"), "Error: rate decay needs a schedule with a decay stage"),
    ],
)
def test_user_errors_are_one_line(run: Run, options: tuple[object, ...], line: str) -> None:
    result = run(*options)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.strip().splitlines()[-1].startswith(line)
    assert "Traceback" not in result.stderr
