"""`psp run` on what people have: GGUF files, and text in several places."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizer_kinds as kinds
from click.testing import Result
from conftest import ModelMaker, make_export, refused, write_predictors
from run_help import RATES, contents, draw_nothing, run, settings
from test_gguf_checkpoint import write_file
from test_split_set import written

from architectures.checkpoint import Checkpoint, open_source
from common.errors import CheckpointError, DataError, OutputError
from gguf_export.bundle import export
from gguf_export.pwri.schema import parse_name
from gguf_export.settings import ExportConfig
from gguf_files.reader import GGUFFile
from pipeline import plan
from pipeline.contents import source_files
from pipeline.costs import Costs
from pipeline.layout import Layout
from pipeline.plan import plan_table, prepare
from pipeline.run import Outcome
from pipeline.state import STATE
from pipeline.steps import StepSettings
from predictor.traces.store import TraceStore


@pytest.fixture(autouse=True)
def _no_probe_no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "probe", lambda *args: RATES)
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def owned(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PowerInfer file with somebody's predictors, as its owner has it."""
    place = tmp_path_factory.mktemp("owned")
    write_predictors(model_dir, place / "predictors")
    make_export(model_dir, place / "predictors", place / "mine.powerinfer.gguf")
    return place / "mine.powerinfer.gguf"


def stored(file: Path, *, predictors: bool) -> dict[str, bytes]:
    """Return the data of a file's predictors or of its model, by tensor."""
    opened = GGUFFile(file)
    return {
        name: opened.mapped(name).tobytes()
        for name in opened.tensors
        if (parse_name(name).role == "predictor") is predictors
    }


def test_a_powerinfer_file_gets_new_predictors(
    owned: Path, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    changes = {"name": None, "rank": 64}
    made = run(settings(owned, data_file, tmp_path / "file", **changes))
    file = made.layout.bundle.model_file
    assert file == tmp_path / "file" / "export" / owned.name
    assert made.verified["ok"]
    assert {layer.rank for layer in made.bench.layers} == {64}
    assert stored(file, predictors=False) == stored(owned, predictors=False)
    assert stored(file, predictors=True).keys() == stored(owned, predictors=True).keys()
    assert stored(file, predictors=True) != stored(owned, predictors=True)
    own = run(settings(model_dir, data_file, tmp_path / "own", **changes))
    assert stored(own.layout.bundle.model_file, predictors=True) == stored(file, predictors=True)
    assert own.bench.ppl_sparse == made.bench.ppl_sparse


def test_the_plan_counts_the_types_that_a_file_keeps(
    make_model: ModelMaker, data_file: Path, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", intermediate_size=1024)
    write_predictors(model, tmp_path / "predictors")
    four = tmp_path / "four.powerinfer.gguf"
    predictors = tmp_path / "predictors"
    export(ExportConfig(model=str(model), predictors=predictors, out=four, outtype="q4_0"))
    assert "Q4_0" in {info.kind.name for info in GGUFFile(four).tensors.values()}
    steps = StepSettings.of(settings(four, data_file, tmp_path / "out"), 1200, 64)
    planned = Costs(checkpoint=Checkpoint.open(four), settings=steps, rates=RATES).file
    held = sum(map(len, stored(four, predictors=False).values()))
    assert planned == held + 2 * 2 * 32 * (64 + 1024), "two layers of rank 32, F16"


def test_a_dense_file_is_asked_for_its_activation(
    model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    file = write_file(Checkpoint.open(model_dir), tmp_path / "dense.gguf", sparse=False)
    _without_activation(file)
    config = settings(file, data_file, tmp_path / "out", name=None)
    with refused(CheckpointError, "dense.gguf", "silu", "--sparsify", f"--model {file}:relu"):
        prepare(config)
    named = replace(config, model=f"{file}:relu")
    assert prepare(named).plan.model == f"{file}:relu"
    assert Layout.of(named).name == "dense"
    assert not (tmp_path / "out").exists()


def _without_activation(file: Path) -> None:
    """Rename the key that names it, so that nothing does."""
    data = file.read_bytes()
    assert b"psp.activation" in data
    file.write_bytes(data.replace(b"psp.activation", b"xxx.activation"))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("a/ReluLLaMA-7B", "ReluLLaMA-7B"),
        ("a/llama-7b.powerinfer.gguf", "llama-7b"),
        ("a/llama-7b.Q8_0.gguf:fatrelu:0.01", "llama-7b.Q8_0"),
        ("OWNER/NAME-GGUF:llama-7b.powerinfer.gguf:relu", "llama-7b"),
        ("OWNER/NAME-GGUF:sub/big-00002-of-00004.gguf", "big"),
    ],
)
def test_names_of_files(model: str, name: str, data_file: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, data_file, tmp_path / "out", name=None)
    assert Layout.of(replace(config, model=model)).name == name


def test_every_file_of_a_set_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("architectures.gguf_model.source.config_of", lambda *args: {})
    members = written(tmp_path / "m.gguf", split_max_tensors=2)
    assert source_files(open_source(members[1])) == members
    (whole,) = written(tmp_path / "whole.gguf")
    assert source_files(open_source(whole)) == [whole]


@pytest.fixture(scope="module")
def halves(data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the twelve documents in two files."""
    place = tmp_path_factory.mktemp("halves")
    lines = data_file.read_text(encoding="utf-8").splitlines(keepends=True)
    for number in range(2):
        half = "".join(lines[6 * number : 6 * number + 6])
        (place / f"{number}.jsonl").write_text(half, encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def together(model_dir: Path, halves: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run on both."""
    out = tmp_path_factory.mktemp("together") / "out"
    files = tuple(str(halves / f"{number}.jsonl") for number in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "probe", lambda *args: RATES)
        draw_nothing(patch)
        return run(replace(settings(model_dir, halves, out), data=files))


def test_several_texts_are_one_after_the_other(
    together: Outcome, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    single = run(settings(model_dir, data_file, tmp_path / "out"))
    ours, theirs = contents(together.layout.out), contents(single.layout.out)
    assert {name for name in ours if ours[name] != theirs.get(name)} == {
        *("traces/manifest.json", "predictors/predictors.json")
    }, "which name their text"
    assert ours.keys() == theirs.keys()
    assert TraceStore.open(together.layout.traces).header.data == together_data(together)


def together_data(outcome: Outcome) -> tuple[str, ...]:
    data = TraceStore.open(outcome.layout.traces).header.data
    assert [Path(name).name for name in data] == ["0.jsonl", "1.jsonl"]
    return tuple(data)


@pytest.mark.parametrize("changed", ["0.jsonl", "1.jsonl"])
def test_a_change_of_any_text_begins_anew(
    together: Outcome, model_dir: Path, halves: Path, changed: str
) -> None:
    out = together.layout.out
    config = replace(settings(model_dir, halves, out, resume=True), data=together_data(together))
    assert {step.state for step in prepare(config).plan.steps} == {"done"}
    whole = (halves / changed).read_bytes()
    (halves / changed).write_bytes(whole.replace(b"Document", b"Dokument"))
    try:
        assert {step.state for step in prepare(config).plan.steps} == {"to do"}
    finally:
        (halves / changed).write_bytes(whole)


def test_a_folder_on_the_command_line(
    psp: Callable[..., Result], model_dir: Path, halves: Path, tmp_path: Path
) -> None:
    (halves / "README.md").write_text("no text")
    arguments = ["--model", model_dir, "--data", halves, "--data", tmp_path / "more.csv"]
    (tmp_path / "more.csv").write_text("text\nOne more document.\n\nAnother one.\n")
    arguments += ["--tokens", 10**6, "--context", 64, "--out", tmp_path / "out", "--rank", 32]
    done = psp("run", *arguments, "-n", 4, "--chunks", 2, "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert any("passed over" in note and "README.md" in note for note in document["notes"])
    assert document["text"]["documents"] + document["text"]["held"][1] >= 12
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--data", "--eval-data"])
@pytest.mark.parametrize("name", ["-", "-:csv"])
def test_standard_input_is_refused(
    psp: Callable[..., Result],
    model_dir: Path,
    data_file: Path,
    tmp_path: Path,
    option: str,
    name: str,
) -> None:
    arguments = ["--model", model_dir, "--data", data_file, "--out", tmp_path / "out"]
    done = psp("run", *arguments, option, name)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert f"{name}: psp run, which reads a text several times, cannot read" in line
    assert line.endswith("; pass a file")
    assert not (tmp_path / "out").exists()


def test_the_output_does_not_become_text(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "text.jsonl").write_bytes(data_file.read_bytes())
    inside = settings(model_dir, data, data / "out")
    with refused(OutputError, f"--out {data / 'out'}", f"folder of text {data}", "another --out"):
        prepare(inside)
    pattern = replace(inside, data=str(tmp_path / "**" / "*.jsonl"))
    with refused(OutputError, "held-out.jsonl", "which this run makes", "another --out"):
        run(pattern)
    assert sorted(path.name for path in (data / "out").iterdir()) == ["held-out.jsonl", STATE]


@pytest.mark.parametrize("own", [False, True])
def test_a_held_out_text_at_which_powerinfer_stops_is_refused(
    make_model: ModelMaker, data_file: Path, text_file: Path, tmp_path: Path, own: bool
) -> None:
    model = make_model(tmp_path / "model", vocab_size=640)
    (model / "tokenizer.model").unlink()
    for file in kinds.byte_level(tmp_path / "tokenizer", "GPT-2", ["<s>", "<s/>"]).iterdir():
        shutil.copy(file, model)
    kinds.change(model, lambda document: document["model"]["vocab"].pop("Ą"))  # of byte 4
    data = tmp_path / "data.jsonl"
    data.write_text(data_file.read_text(encoding="utf-8").replace("fox", "fox \\u0004"))
    eval_data = str(tmp_path / "held.txt") if own else ()
    (tmp_path / "held.txt").write_text(text_file.read_text(encoding="utf-8") * 3 + "\4")
    config = settings(model, data, tmp_path / "out", tokens=10**6, eval_data=eval_data)
    with refused(DataError, str(eval_data or data), "held out", "byte 0x04", "remove it"):
        prepare(config)
    clean = settings(model, data_file, tmp_path / "out", tokens=10**6)
    assert any("bytes that ordinary text does without (04" in n for n in prepare(clean).plan.notes)


def test_notes_of_files_and_text_are_in_the_plan(
    make_model: ModelMaker, data_file: Path, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model")
    (model / "adapter_config.json").write_text("{}")
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    holes = tmp_path / "holes.jsonl"
    holes.write_bytes(b'{"text": null}\n' + data_file.read_bytes())
    prepared = prepare(settings(model, holes, tmp_path / "out", tokens=10**6))
    told = "\n".join(prepared.plan.notes)
    assert "the LoRA adapter beside the model is passed over" in told
    assert told.count("names LlamaTokenizer") == 1
    assert "1 row was passed over, without text under 'text'" in told
    assert "those of tokenizer.model, by sentencepiece" in plan_table(prepared.plan)
