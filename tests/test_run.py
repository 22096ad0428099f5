"""`psp run`: the whole way on a tiny model, resumed after kills, against the single commands."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from conftest import refused
from processes import forked, killed_at
from run_help import RATES, SMALL, Killed, contents, draw_nothing, run, run_until, settings, times

from cli import main
from common.documents import read_documents, read_text
from common.errors import OutputError, PspError
from gguf_export.bundle import export
from gguf_export.settings import ExportConfig
from pipeline import plan
from pipeline.layout import Layout
from pipeline.plan import prepare
from pipeline.run import Outcome, execute
from pipeline.state import STATE, RunState, claimed
from powerinfer_bridge.benchmark.run import bench
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.engine.engine import Engine
from powerinfer_bridge.engine.perplexity import engine_perplexity
from predictor.collection.collect import collect
from predictor.collection.settings import CollectConfig
from predictor.traces.store import TraceStore
from predictor.training.layer import LayerTrainer
from predictor.training.run import train_predictors
from predictor.training.settings import TrainConfig
from report.runs import load_runs
from results.bench import DENSE_POWERINFER, POWERINFER


@pytest.fixture(scope="module")
def whole(
    model_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Outcome, list[str]]:
    """Return an unbroken run, probe and all, and the lines that it gave."""
    said: list[str] = []
    config = settings(model_dir, data_file, tmp_path_factory.mktemp("run") / "out")
    return run(config, said), said


@pytest.fixture
def _no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "probe", lambda *args: RATES)


@pytest.fixture
def _no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)


def test_everything_is_made_and_said(whole: tuple[Outcome, list[str]]) -> None:
    outcome, said = whole
    names = [step.name for step in outcome.plan.steps]
    assert names == [
        *("hold out text", "collect", "train-predictor", "export-gguf"),
        *("verify", "bench-powerinfer", "report"),
    ]
    assert [step.state for step in outcome.plan.steps] == ["to do"] * 7
    assert set(outcome.paths) == {
        *("held-out text", "traces", "predictors", "PowerInfer model", "PowerInfer predictors"),
        *("activation statistics", "benchmark", "report"),
    }
    assert outcome.verified["ok"]
    assert outcome.bench.text == str(outcome.layout.held_out)
    assert outcome.layout.page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    found = load_runs([outcome.layout.out])[0]
    assert found.bench == outcome.bench
    assert found.predictors is not None
    begun = [line.split(",")[0] for line in said if line[0].isdigit()]
    assert begun == [f"{number}/7 {name}" for number, name in enumerate(names, 1)]


def test_its_plan_is_near_what_it_takes(whole: tuple[Outcome, list[str]]) -> None:
    expected, taken = sum(whole[0].plan.seconds.values()), sum(whole[0].taken.values())
    assert taken / 20 < expected < 20 * taken, "of a model whose steps take no time to speak of"


def test_the_single_commands_give_the_same_bytes(
    whole: tuple[Outcome, list[str]], model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    outcome, made = whole[0], contents(whole[0].layout.out)
    model, tokens = str(model_dir), outcome.plan.text.tokens
    data, context = str(data_file), SMALL["context"]
    collect(
        CollectConfig(
            model=model, data=data, out=tmp_path / "traces", tokens=tokens, context=context
        )
    )
    train_predictors(
        TrainConfig(traces=tmp_path / "traces", out=tmp_path / "predictors", rank=SMALL["rank"])
    )
    file = tmp_path / "export" / "tiny.powerinfer.gguf"
    export(ExportConfig(model=model, predictors=tmp_path / "predictors", out=file))
    own = contents(tmp_path)
    assert own == {name: data for name, data in made.items() if name in own}
    assert set(made) - set(own) == {"held-out.jsonl", "verify.json"}
    measured = bench(
        BenchConfig(
            file=file,
            data=str(outcome.layout.held_out),
            context=context,
            **{key: SMALL[key] for key in ("chunks", "generate", "repeats", "threads")},
        )
    )
    assert measured.ppl_sparse == outcome.bench.ppl_sparse
    assert measured.layers == outcome.bench.layers


def test_no_trace_is_made_of_held_out_documents(
    whole: tuple[Outcome, list[str]], data_file: Path
) -> None:
    outcome = whole[0]
    documents = list(read_documents(str(data_file)))
    held = list(read_documents(str(outcome.layout.held_out)))
    store = TraceStore.open(outcome.layout.traces)
    traced = {number for number, _ in store.segments}
    assert store.rows == outcome.plan.text.tokens
    assert len(traced) == outcome.plan.text.documents
    assert outcome.plan.text.held is not None
    assert held == documents[slice(*outcome.plan.text.held)]
    assert not {documents[number] for number in traced} & set(held)


def test_again_reuses_every_step(
    whole: tuple[Outcome, list[str]], model_dir: Path, data_file: Path
) -> None:
    outcome, _ = whole
    before = times(outcome.layout.out)
    config = settings(model_dir, data_file, outcome.layout.out, resume=True)
    prepared = prepare(config)
    assert {step.state for step in prepared.plan.steps} == {"done"}
    assert prepared.plan.rates is None, "nothing to do needs no probe"
    assert execute(prepared).document() | {"plan": None} == outcome.document() | {"plan": None}
    assert times(outcome.layout.out) == before


def test_what_exists_is_refused(
    whole: tuple[Outcome, list[str]], model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    out = whole[0].layout.out
    with refused(OutputError, str(out), "--resume", "--force"):
        run(settings(model_dir, data_file, out))
    (tmp_path / "mine.txt").write_text("precious")
    for changes in ({"force": True}, {"resume": True}, {}):
        with refused(OutputError, str(tmp_path)):
            run(settings(model_dir, data_file, tmp_path, **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.usefixtures("_no_probe")
def test_force_begins_anew(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    RunState(out).write()
    (out / "left over").write_text("of an earlier run")
    with pytest.raises(Killed):
        run_until(0, settings(model_dir, data_file, out, force=True))
    assert [path.name for path in out.iterdir()] == [STATE]
    inside = out / "text.jsonl"
    inside.write_bytes(data_file.read_bytes())
    with refused(OutputError, "--force would remove", str(inside), "choose another --out"):
        run(settings(model_dir, inside, out, force=True))
    assert inside.exists()


@pytest.mark.usefixtures("_no_probe", "_no_drawing")
def test_killed_at_every_boundary_it_ends_with_the_same_bytes(
    whole: tuple[Outcome, list[str]], model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    config = settings(model_dir, data_file, tmp_path / "out")
    kills = 0
    while True:
        try:
            run_until(0, config)
            break
        except Killed:
            kills, config = kills + 1, replace(config, resume=True)
    assert kills == 14, "each of seven steps as it begins and as it ends"
    assert contents(tmp_path / "out") == contents(whole[0].layout.out)


@pytest.mark.usefixtures("_no_probe", "_no_drawing")
def test_another_setting_redoes_that_step_and_those_after(
    whole: tuple[Outcome, list[str]], model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole[0].layout.out, out)
    before, said = times(out), list[str]()
    config = settings(model_dir, data_file, out, resume=True, rank=64)
    prepared = prepare(config)
    states = {step.name: step.state for step in prepared.plan.steps}
    assert states["collect"] == "done"
    assert states["train-predictor"] == states["report"] == "to do"
    outcome = execute(prepared, said.append)
    changed = {name.partition("/")[0] for name, at in times(out).items() if before.get(name) != at}
    assert changed == {
        *("predictors", "export", "verify.json", "bench", "bench.json", STATE),
        *("predictor-report", "report.html"),
    }
    again = [line for line in said if line.endswith("done again")]
    assert [line.partition(":")[0] for line in again] == [
        *("train-predictor", "export-gguf", "verify", "bench-powerinfer", "report")
    ]
    assert {layer.rank for layer in outcome.bench.layers} == {64}


@pytest.mark.usefixtures("_no_probe", "_no_drawing")
def test_another_bound_needs_no_new_training(
    model_dir: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(model_dir, data_file, tmp_path / "out", ffn_bytes=0.7)
    first = run(config)
    with monkeypatch.context() as patch:
        patch.setattr(LayerTrainer, "run", lambda *args: pytest.fail("trained again"))
        second = run(replace(config, ffn_bytes=0.6, resume=True))
    assert second.bench.predicted_sparsity > first.bench.predicted_sparsity
    with pytest.raises(Killed):  # as verify ends: what follows is measured, not determined
        run_until(9, settings(model_dir, data_file, tmp_path / "own", ffn_bytes=0.6))
    own = contents(tmp_path / "own")
    assert "verify.json" in own
    assert own == contents(second.layout.out)


@pytest.mark.usefixtures("_no_probe", "_no_drawing")
def test_a_result_that_was_changed_is_made_again(
    whole: tuple[Outcome, list[str]], model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole[0].layout.out, out)
    (out / "report.html").write_text("mine")
    (out / "verify.json").unlink()
    run(settings(model_dir, data_file, out, resume=True))
    assert (out / "verify.json").exists()
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.usefixtures("_no_probe")
def test_one_run_at_a_time(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepared = prepare(settings(model_dir, data_file, out))
    with claimed(out, resume=False, force=False):
        with refused(OutputError, str(out), "being written by pid"):
            execute(prepared)
        assert not out.exists()


@pytest.mark.usefixtures("_no_probe", "_no_drawing")
def test_killed_for_good_it_goes_on(
    whole: tuple[Outcome, list[str]], model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = {f"--{key}": str(value) for key, value in SMALL.items() if key != "generate"}
    arguments = ["run", "--model", str(model_dir), "--data", str(data_file), "--out", str(out)]
    arguments += [part for pair in options.items() for part in pair] + ["-n", "4"]
    said = tmp_path / "said"
    child = forked(lambda: main(arguments), prints_to=said)
    begun = [out / "traces", out / "predictors"]
    ended = killed_at(child, lambda: any(begun[0].rglob("*.part")) or begun[1].exists())
    assert ended == -signal.SIGKILL, said.read_text()
    assert (out / STATE).exists()
    assert not (out / "report.html").exists()
    run(settings(model_dir, data_file, out, resume=True))
    assert contents(out) == contents(whole[0].layout.out)


@pytest.mark.usefixtures("_no_probe")
def test_on_the_command_line(
    psp: Callable[..., Result], model_dir: Path, data_file: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["run", "--model", model_dir, "--data", data_file, "--out", out, "--rank", 32]
    arguments += ["--tokens", 1200, "--context", 64, "--chunks", 2, "-n", 4, "--repeats", 1]
    arguments += ["--threads", 1, "--eval-data", text_file, "--vram-budget", "2MiB"]
    shown = psp(*arguments, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "train-predictor" in shown.stdout
    assert not out.exists()
    planned = json.loads(psp(*arguments, "--dry-run", "--json").stdout)
    assert planned["steps"][0]["name"] == "collect", "there is a held-out text already"
    done = psp(*arguments)
    assert done.exit_code == 0, done.output
    for part in (
        "perplexity gap",
        "checks hold",
        str(out / "report.html"),
        "--vram-budget 0.00195",
    ):
        assert part in done.stdout
    assert (out / "export" / f"{model_dir.name}.powerinfer.gguf.generated.gpuidx").exists()
    again = psp(*arguments, "--resume", "--json")
    document = json.loads(again.stdout)
    assert document["verified"]["ok"]
    assert document["bench"]["text"] == str(text_file)
    assert Layout(out, model_dir.name).result.exists()


def test_a_failing_step_says_how_to_go_on(
    psp: Callable[..., Result],
    model_dir: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(config: object) -> None:
        raise PspError("the disk is full", "free some space")

    monkeypatch.setattr(plan, "probe", lambda *args: RATES)
    monkeypatch.setattr("pipeline.steps.collect", refuse)
    out = tmp_path / "out"
    arguments = ["--model", model_dir, "--data", data_file, "--out", out, "--context", 64]
    done = psp("run", *arguments, "-n", 4)
    assert done.exit_code == 1
    assert "Error: the disk is full; free some space" in done.stderr
    assert f"note: finished steps are kept in {out}; the same with --resume goes on" in done.stderr


@pytest.fixture
def silu(model_dir: Path, tmp_path: Path) -> Path:
    """A SiLU model: the same weights under another config."""
    path = tmp_path / "silu"
    shutil.copytree(model_dir, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"hidden_act": "silu"}))
    return path


@pytest.mark.usefixtures("_no_probe", "trainer_is_imported")
def test_a_model_is_made_sparse_first(
    silu: Path, data_file: Path, text_file: Path, tmp_path: Path
) -> None:
    from prosparse.schedule import Schedule

    schedule = Schedule.of(("substitution", 0.0, 2), ("progressive", 1e-2, 4))
    changes = {"sparsify": True, "schedule": schedule, "batch": 2, "eval_data": str(text_file)}
    holes, said = tmp_path / "holes.jsonl", list[str]()
    holes.write_bytes(b'{"text": null}\n' + data_file.read_bytes())
    outcome = run(settings(silu, holes, tmp_path / "out", **changes), said)
    assert outcome.plan.steps[0].name == "sparsify"
    assert sum("1 row was passed over" in line for line in outcome.plan.notes) == 1
    assert not [line for line in said if "passed over, without" in line], "the plan said it"
    config = json.loads((outcome.paths["sparse model"] / "config.json").read_text())
    assert config["hidden_act"] == "relu"
    assert TraceStore.open(outcome.layout.traces).header.model == str(outcome.layout.sparse_model)
    assert outcome.verified["ok"]


@pytest.mark.powerinfer
@pytest.mark.usefixtures("_no_probe")
def test_measured_in_real_powerinfer(
    model_dir: Path, data_file: Path, powerinfer_bin: Path, tmp_path: Path
) -> None:
    changes = {"powerinfer_bin": powerinfer_bin, "dense": True, "dense_arch": "llama"}
    outcome = run(settings(model_dir, data_file, tmp_path / "out", **changes))
    assert outcome.bench.engine == POWERINFER
    assert [arm.name for arm in outcome.bench.arms if arm.dense] == [DENSE_POWERINFER]
    assert outcome.paths["dense model"].exists()
    text = read_text(str(outcome.layout.held_out))
    own = engine_perplexity(Engine(outcome.layout.bundle.model_file), text, 64, 2, "ours")
    assert own == pytest.approx(outcome.bench.ppl_sparse, rel=5e-3)
