"""The plan of `psp run`: its numbers against what is measured, its advice, and what it refuses."""

from __future__ import annotations

import io
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from run_help import SMALL, settings

from architectures.checkpoint import Checkpoint
from architectures.windows import document_windows
from common.documents import read_documents
from common.errors import DataError, OutputError, PspError, SettingsError
from common.units import duration
from pipeline import plan as plan_module
from pipeline.advice import advice, machine_advice
from pipeline.costs import Cost, Costs
from pipeline.plan import plan_table, prepare
from pipeline.probe import Rates, probe
from pipeline.progress import Progress
from pipeline.settings import RunConfig
from pipeline.steps import StepSettings
from pipeline.text import TextPlan, plan_text, write_held_out
from predictor.collection.collect import collect
from prosparse.schedule import Schedule

RATES = Rates(
    load_layer=2.0,
    token_layer=1e-3,
    row_bytes=300.0,
    sparsity=0.9,
    layer_fixed=5.0,
    layer_row=1e-2,
    jobs=1,
    write=1e8,
    read=1e9,
)
D_MODEL, D_FF, LAYERS, VOCAB = 64, 1012, 2, 320
LAYER_WEIGHTS = 3 * D_MODEL * D_FF + 2 * D_MODEL**2 + 2 * D_MODEL * 32 + 2 * D_MODEL
WEIGHTS = LAYERS * LAYER_WEIGHTS + 2 * VOCAB * D_MODEL + D_MODEL


@pytest.fixture
def costs(model_dir: Path, data_file: Path, tmp_path: Path) -> Callable[..., Costs]:
    def make(**changes: Any) -> Costs:
        config = settings(model_dir, data_file, tmp_path / "out", **changes)
        steps = StepSettings.of(config, config.tokens, config.context)
        return Costs(checkpoint=Checkpoint.open(model_dir), settings=steps, rates=RATES)

    return make


def test_costs_are_what_can_be_worked_out_by_hand(costs: Callable[..., Costs]) -> None:
    found = costs().all()
    collected = found["collect"]
    assert collected.seconds == pytest.approx(LAYERS * (1200 * 1e-3 + 2))
    assert collected.disk == LAYERS * (300 * 1200 + 2 * D_MODEL * D_FF + 4 * D_FF)
    buffers = 3 * 4 * 8 * 64 * (D_FF + 2 * D_MODEL)
    assert collected.memory == 4 * WEIGHTS + buffers
    trained = found["train-predictor"]
    assert trained.seconds == pytest.approx(LAYERS * (5 + 1e-2 * 1080))
    assert trained.disk == LAYERS * 2 * 32 * (D_MODEL + D_FF)
    norms = (2 * LAYERS + 1) * D_MODEL  # vectors stay float32
    assert found["export-gguf"].disk == 2 * (WEIGHTS + norms) + 2 * trained.disk
    assert "sparsify" in found
    assert found["sparsify"].memory == 0


def test_a_dense_file_has_a_type_of_its_own(costs: Callable[..., Costs]) -> None:
    plain, same = (costs(dense=dense).all()["export-gguf"].disk for dense in (False, True))
    assert same - plain == costs().file
    for name, block in (("bf16", 64), ("q8_0", 34), ("q4_0", 18)):
        found = costs(dense=True, dense_type=name).all()["export-gguf"].disk
        assert found - plain == pytest.approx(block / 32 * WEIGHTS)
    with refused(PspError, "--dense-type are for --dense; pass --dense"):
        costs(dense_type="q4_0")


def test_choosing_ranks_and_thresholds_costs_more(costs: Callable[..., Costs]) -> None:
    fixed, auto = (costs(rank=rank).all()["train-predictor"] for rank in (32, "auto"))
    head = VOCAB * D_MODEL / LAYER_WEIGHTS
    scouts = LAYERS * (5 + 1e-2 * 1080)  # fewer rows than a scout sees: the one epoch that there is
    measured = (1 + 3.25) * 120 * 1e-3 * (LAYERS + head)
    assert auto.seconds - fixed.seconds == pytest.approx(scouts + measured)
    assert auto.memory >= 4 * WEIGHTS + 2 * 120 * VOCAB


def test_a_streamed_model_takes_one_layer_of_memory(costs: Callable[..., Costs]) -> None:
    whole, streamed = (
        costs(weights=weights).all()["collect"].memory for weights in ("resident", "streamed")
    )
    assert whole - streamed == 4 * (LAYERS - 1) * LAYER_WEIGHTS


def test_sparsifying_costs_three_passes_a_step(
    costs: Callable[..., Costs], text_file: Path
) -> None:
    schedule = Schedule.of(("substitution", 0.0, 10))
    changes = {"sparsify": True, "schedule": schedule, "eval_data": str(text_file), "batch": 2}
    cost = costs(**changes).all()["sparsify"]
    head = VOCAB * D_MODEL / LAYER_WEIGHTS
    assert cost.seconds == pytest.approx(3 * 10 * 2 * 64 * 1e-3 * (LAYERS + head))
    token = 4 * (LAYERS * (8 * D_MODEL + 4 * D_FF) + 3 * VOCAB)
    assert cost.memory == 16 * WEIGHTS + 2 * 64 * token


def test_the_probe_measures_what_collecting_takes(
    model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    config = settings(model_dir, data_file, tmp_path / "out")
    checkpoint = Checkpoint.open(model_dir)
    steps = StepSettings.of(config, config.tokens, config.context)
    rates = probe(checkpoint, steps, "none", tmp_path)
    assert not list(tmp_path.iterdir()), "nothing stays"
    assert min(rates.token_layer, rates.layer_fixed, rates.write, rates.read) > 0
    expected = Costs(checkpoint=checkpoint, settings=steps, rates=rates).all()["collect"]
    store = collect(replace(steps.collect, out=tmp_path / "traces"))
    size = sum(path.stat().st_size for path in store.path.rglob("*.safetensors"))
    assert expected.disk == pytest.approx(size, rel=0.15)
    assert rates.sparsity == pytest.approx(store.activation_sparsity()[0], abs=0.05)


@pytest.fixture(scope="module")
def checkpoint(model_dir: Path) -> Checkpoint:
    return Checkpoint.open(model_dir)


def lengths_of(source: Path, checkpoint: Checkpoint, context: int) -> list[int]:
    """Count each document's tokens in one go, as traces have them."""
    documents = list(read_documents(str(source)))
    return [
        sum(len(window) for _, window in document_windows([text], checkpoint.tokenizer(), context))
        for text in documents
    ]


def test_held_out_documents_follow_those_of_the_traces(
    model_dir: Path, data_file: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    lengths = lengths_of(data_file, checkpoint, 64)
    tokens = sum(lengths[:3]) + 1
    config = settings(model_dir, data_file, tmp_path / "out", tokens=tokens)
    text = plan_text(config, checkpoint, "none")
    wanted = 1.2 * 2 * 64
    last = next(n for n in range(5, 13) if sum(lengths[4:n]) >= int(wanted))
    assert (text.tokens, text.documents, text.held) == (tokens, 4, (4, last))
    assert not text.ended
    write_held_out(config, text, tmp_path / "held.jsonl")
    lines = (tmp_path / "held.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == list(read_documents(str(data_file)))[
        4:last
    ]


def test_a_short_text_gives_up_its_last_documents(
    model_dir: Path, data_file: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    lengths = lengths_of(data_file, checkpoint, 64)
    config = settings(model_dir, data_file, tmp_path / "out", tokens=10**6, chunks=1000)
    text = plan_text(config, checkpoint, "none")
    share = max(int(1.2 * 2 * 64), sum(lengths) // 10)
    first = next(n for n in reversed(range(len(lengths))) if sum(lengths[n:]) >= share)
    assert text.held == (first, len(lengths))
    assert (text.tokens, text.documents, text.ended) == (sum(lengths[:first]), first, True)


def test_a_text_of_its_own_is_held_out(
    model_dir: Path, data_file: Path, text_file: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config = settings(
        model_dir, data_file, tmp_path / "out", tokens=10**6, eval_data=str(text_file)
    )
    text = plan_text(config, checkpoint, "none")
    lengths = lengths_of(data_file, checkpoint, 64)
    assert (text.tokens, text.documents, text.held) == (sum(lengths), len(lengths), None)


TEXT = TextPlan(tokens=400_000, documents=900, median=700, ended=False, held=None, template="none")


@pytest.mark.parametrize(
    ("changes", "text", "part"),
    [
        ({"context": 4096}, {}, "--context 4096 is longer than the model's 128 positions"),
        ({}, {"median": 3}, "half of the documents have at most 3 tokens"),
        (
            {"tokens": 500_000},
            {"ended": True},
            "gives 400000 tokens for traces, not --tokens 500000",
        ),
        ({}, {"tokens": 9000}, "9000 tokens are few for 1012 neurons a layer: pass --tokens 20000"),
        ({}, {"tokens": 9000, "ended": True}, "pass more text and --tokens 20000 or more"),
        ({"rank": 128}, {}, "predictors of --rank 128 alone read 71% of the FFN's bytes"),
        ({"rank": (32, 128)}, {}, "--rank 128 alone"),
    ],
)
def test_what_does_not_fit_is_said(
    model_dir: Path,
    data_file: Path,
    checkpoint: Checkpoint,
    tmp_path: Path,
    changes: dict[str, Any],
    text: dict[str, Any],
    part: str,
) -> None:
    config = settings(model_dir, data_file, tmp_path, **({"rank": "auto"} | changes))
    lines = list(advice(config, checkpoint, replace(TEXT, **text)))
    assert any(part in line for line in lines), lines
    fitting = settings(model_dir, data_file, tmp_path, rank="auto")
    assert list(advice(fitting, checkpoint, TEXT)) == []


GIANT = Cost(seconds=2e5, disk=1.0, memory=float(1 << 60))


@pytest.mark.parametrize(
    ("changes", "sparsity", "cost", "part"),
    [
        ({}, 0.3, {}, "the first layer is only 30% sparse"),
        ({"vram_budget": "24GiB"}, 0.9, {}, "--vram-budget 24GiB holds the whole file of 1.05 MB"),
        ({}, 0.9, {"collect": GIANT}, "collect needs about 1,073,741,824 GiB of memory"),
        ({}, 0.9, {"train-predictor": GIANT}, "this takes days, most of it train-predictor"),
        ({"weights": "resident"}, 0.9, {"collect": GIANT}, "pass --weights streamed"),
    ],
)
def test_what_the_machine_cannot_do_is_said(
    costs: Callable[..., Costs],
    model_dir: Path,
    data_file: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    sparsity: float,
    cost: dict[str, Cost],
    part: str,
) -> None:
    estimate = costs()
    estimate = replace(estimate, rates=replace(RATES, sparsity=sparsity))
    config = settings(model_dir, data_file, tmp_path, **changes)
    lines = list(machine_advice(config, estimate, estimate.all() | cost))
    assert any(part in line for line in lines), lines
    if not torch.cuda.is_available():
        fitting = settings(model_dir, data_file, tmp_path)
        assert list(machine_advice(fitting, costs(), costs().all())) == []


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model": "/nowhere"}, ("/nowhere", "no such directory")),
        ({"data": "/nowhere.jsonl"}, ("/nowhere.jsonl", "no such file")),
        ({"data": "ONE"}, ("one.jsonl", "in 1 documents", "--eval-data")),
        ({"data": "ONE", "eval_data": "OWN"}, ("one.jsonl", "in 1 documents", "pass more text")),
        ({"eval_data": "ONE", "context": 128}, ("one.jsonl", "tokens", "smaller --context")),
        ({"vram_budget": "much"}, ("size 'much'", "24GiB")),
        ({"vram_budget": "24"}, ("--vram-budget 24", "24GiB")),
        ({"rank": 160}, ("rank 160", "lower --rank")),
        ({"rank": (32, 32, 32)}, ("names 3 ranks", "2 layers")),
        ({"rank": 33}, ("rank 33", "multiple of 32")),
        ({"outtype": "q4_0"}, ("d_ff 1012", "choose f16")),
        ({"device": "abacus"}, ("abacus", "--device")),
        ({"out": "FILE"}, ("mine.txt", "--out")),
        ({"prompt": ""}, ("prompt is empty",)),
        ({"generate": 200}, ("the model's context is 128", "lower -n")),
        ({"powerinfer_bin": Path("/nowhere")}, ("/nowhere", "PowerInfer")),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    model_dir: Path,
    data_file: Path,
    text_file: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    parts: tuple[str, ...],
) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"text": "A single document."}) + "\n")
    (tmp_path / "mine.txt").write_text("precious")
    names = {"ONE": str(one), "OWN": str(text_file), "FILE": tmp_path / "mine.txt"}
    named = {
        key: names.get(value, value) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    chosen: dict[str, Any] = {"model": str(model_dir), "data": str(data_file)} | SMALL
    with refused(PspError, *parts):
        prepare(RunConfig(**({"out": tmp_path / "out"} | chosen | named)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "one.jsonl"]


def test_a_silu_model_is_told_the_way(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "silu"
    shutil.copytree(model_dir, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"hidden_act": "silu"}))
    with refused(PspError, "silu", "--sparsify with --eval-data"):
        prepare(settings(path, data_file, tmp_path / "out"))


def test_settings_that_contradict_each_other_are_refused(
    model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    for changes, part in (
        ({"resume": True, "force": True}, "--force begins anew"),
        ({"sparsify": True}, "--eval-data"),
        ({"schedule": Schedule.of(("substitution", 0.0, 1))}, "--schedule is for --sparsify"),
        ({"name": "a/b"}, "--name"),
    ):
        with pytest.raises(SettingsError, match=part):
            settings(model_dir, data_file, tmp_path / "out", **changes)


def test_a_full_disk_is_told_how_many_tokens_fit(
    model_dir: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 500_000))
    with refused(OutputError, "500 kB are free", "pass --tokens", "or fewer"):
        prepare(settings(model_dir, data_file, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_plan_as_text(
    model_dir: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "probe", lambda *args: RATES)
    text = plan_table(prepare(settings(model_dir, data_file, tmp_path / "out")).plan)
    assert "llama, d_model 64, d_ff 1012, n_layers 2, vocab_size 320" in text
    assert "1200 tokens of" in text
    row = next(line for line in text.splitlines() if line.startswith("collect "))
    assert row.split()[:5] == ["collect", "to", "do", "6", "s"]
    assert "note: 1200 tokens are few for 1012 neurons a layer" in text


def test_durations() -> None:
    found = [duration(seconds) for seconds in (0, 89, 91, 5399, 5401, 86_400, 200_000)]
    assert found == ["0 s", "89 s", "2 min", "90 min", "1.5 h", "24.0 h", "2.3 days"]


def test_what_is_left_follows_the_pace_so_far() -> None:
    said: list[str] = []
    progress = Progress({"a": 10.0, "b": 20.0, "c": 30.0}, said.append)
    assert progress.left(10.0, 4.0) == 56
    progress.passed("a")
    assert progress.left(0.0, 0.0) == 50, "what was passed over tells nothing of the pace"
    with progress.step("b"):
        pass
    assert progress.left(0.0, 0.0) == pytest.approx(0.1 * 30), "as fast as is believed"
    progress.close()
    assert said == ["2/3 b, about 20 s", "b took 0 s, 3 s left"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_is_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Progress({"collect": 10.0, "verify": 30.0}, said.append)
    with progress.step("collect"):
        pass
    progress.close()
    last = terminal.getvalue().split("\r")[-1]
    assert last.startswith("1/2 collect  25% |")
    assert last.rstrip().endswith("about 3 s left")
    assert said == []
    empty = Terminal()
    monkeypatch.setattr("sys.stderr", empty)
    Progress({}, said.append).close()
    assert empty.getvalue() == "", "nothing to do, nothing to show"


def test_data_errors_of_the_text_come_out(model_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "one"}\n{"text": \n')
    with refused(DataError, "broken.jsonl:2", "mend the line"):
        prepare(settings(model_dir, broken, tmp_path / "out"))
