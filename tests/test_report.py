"""Reading results for the page, and judging them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import refused
from made_up_card import card
from made_up_density import density
from made_up_evaluation import evaluation
from made_up_results import (
    MACHINE,
    Document,
    bench,
    estimate,
    predictor_report,
    write,
)

from common.errors import OutputError, ResultError
from report.runs import load_runs
from report.words import comparison, verdict, warnings
from results.bench import Bench

Change = Callable[[Document], Any]
Psp = Callable[..., Result]


def loaded(directory: Path, document: Document) -> Bench:
    (run,) = load_runs([write(directory, bench=document)])
    assert run.bench is not None
    return run.bench


def test_results_are_found_in_a_directory_and_directly_below(tmp_path: Path) -> None:
    write(tmp_path / "run" / "bench", bench=bench())
    write(tmp_path / "run" / "predictors", report=predictor_report())
    write(tmp_path / "run", estimate=estimate(), density=density(), card=card())
    write(tmp_path / "run" / "eval", evaluation=evaluation())
    (run,) = load_runs([tmp_path / "run"])
    assert run.name == "run"
    assert run.bench is not None
    assert run.predictors is not None
    assert run.estimate is not None
    assert run.density is not None
    assert run.card is not None
    assert run.evaluation is not None
    assert len(run.predictors.search) == 10
    assert len(run.points) == 9  # the tenth has no gap


def test_equal_names_take_as_much_of_the_path_as_they_need(tmp_path: Path) -> None:
    places = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"]
    runs = load_runs([write(place, bench=bench()) for place in places])
    assert [run.name for run in runs] == ["a/run", "b/run", "c"]
    with refused(ResultError, "run", "given twice"):
        load_runs([places[0], tmp_path / "b" / ".." / "a" / "run"])


def test_a_directory_without_results_or_with_two_of_a_kind_is_refused(tmp_path: Path) -> None:
    with refused(ResultError, str(tmp_path), "bench.json", "psp bench-powerinfer"):
        load_runs([tmp_path])
    with refused(ResultError, "absent", "psp bench-powerinfer"):
        load_runs([tmp_path / "absent"])
    for name in ("a", "b"):
        write(tmp_path / name, bench=bench())
    with refused(ResultError, "a and b both hold bench.json", "one by one"):
        load_runs([tmp_path])


def delete(*keys: str | int) -> Change:
    def change(document: Document) -> None:
        where: Any = document
        for key in keys[:-1]:
            where = where[key]
        del where[keys[-1]]

    return change


def put(value: Any, *keys: str | int) -> Change:
    def change(document: Document) -> None:
        where: Any = document
        for key in keys[:-1]:
            where = where[key]
        where[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (put("psp.estimate", "kind"), ("'kind'", "'psp.bench'", "'psp.estimate'")),
        (put(2, "schema_version"), ("'schema_version'", "found 2")),
        (delete("kind"), ("no 'kind'",)),
        (delete("arms", 1, "decode", "quartiles"), ("no 'arms[1].decode.quartiles'",)),
        (put(float("nan"), "ppl_sparse"), ("'ppl_sparse'", "finite", "nan")),
        (put(float("inf"), "settings", "x"), ("'settings.x'", "finite", "inf")),
        (put(10**400, "layers", 0, "rank"), ("'layers[0].rank'", "finite")),
        (put("8", "ppl_dense"), ("'ppl_dense'", "expected a number", "found '8'")),
        (put(True, "ppl_dense"), ("'ppl_dense'", "expected a number")),
        (put(0, "ppl_dense"), ("'ppl_dense'", "above 0")),
        (put(1.5, "activation_recall"), ("'activation_recall'", "from 0 to 1")),
        (put([], "arms"), ("'arms'", "at least one arm")),
        (put({}, "arms"), ("'arms'", "an array")),
        (put(3, "arms", 0), ("'arms[0]'", "an object")),
        (put("fast", "arms", 0, "name"), ("'arms[0].name'", "all_neurons", "'fast'")),
        (put([2, 1], "arms", 0, "decode", "quartiles"), ("decode.quartiles'", "ascending")),
        (put([1, 2], "arms", 0, "decode", "quartiles"), ("decode.quartiles'", "about the median")),
        (put(0, "samples", 0, "decode_seconds"), ("'samples[0].decode_seconds'", "above 0")),
        (put("no", "greedy_text_same"), ("'greedy_text_same'", "true or false")),
        (put(7, "model"), ("'model'", "a text")),
        (put([0.5], "hot_neurons", "activation_share"), ("hot_neurons.activation_share'", "101")),
        (put(-1, "placement", "devices", 0, "bytes", "norms"), ("bytes.norms'", "at least 0")),
    ],
)
def test_a_damaged_benchmark_is_named_by_file_and_key(
    tmp_path: Path, change: Change, parts: tuple[str, ...]
) -> None:
    document = bench()
    change(document)
    write(tmp_path, bench=document)
    with refused(ResultError, str(tmp_path / "bench.json"), *parts, "make it anew with"):
        load_runs([tmp_path])


@pytest.mark.parametrize(
    ("name", "document", "change", "parts"),
    [
        ("report", predictor_report(), delete("layers"), ("no 'layers'", "train-predictor")),
        ("report", predictor_report(), put([], "layers"), ("'layers'", "at least one")),
        ("report", predictor_report(), put("yes", "search", 0, "chosen"), ("search[0].chosen'",)),
        ("estimate", estimate(), put("psp.bench", "kind"), ("'kind'", "psp estimate")),
        ("estimate", estimate(), put(-1, "tokens_per_second", "dense"), ("dense'", "above 0")),
        ("density", density(), put(2, "points", 0, "density"), ("points[0].density'", "0 to 1")),
        ("density", density(), put([], "points"), ("'points'", "at least one")),
        ("evaluation", evaluation(), put([], "arms"), ("'arms'", "at least one arm")),
        ("evaluation", evaluation(), put("other", "scores", 0, "arm"), ("scores[0].arm'",)),
        ("card", card(), put("lost", "steps", 0, "end"), ("steps[0].end'", "done")),
        ("card", card(), put("fast", "figures", 1, "value"), ("figures[1].value'", "a number")),
        ("density", density(), put("<b>", "shape", "d_ff"), ("'shape.d_ff'", "a whole number")),
    ],
)
def test_other_damaged_results_are_named_too(
    tmp_path: Path, name: str, document: Document, change: Change, parts: tuple[str, ...]
) -> None:
    change(document)
    write(tmp_path, **{name: document})
    with refused(ResultError, f"{name}.json", *parts):
        load_runs([tmp_path])


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]", b"[" * 100_000, b"null"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bench.json").write_bytes(data)
    with refused(ResultError, "bench.json", "make it anew with"):
        load_runs([tmp_path])


@pytest.mark.parametrize(
    ("speeds", "outcome", "words"),
    [
        ({}, "faster", "times as fast as the dense model in llama.cpp"),
        ({"predicted": 5.0}, "slower", "slower: 0.5"),
        ({"predicted": 9.02}, "even", "neither faster nor slower than"),
        ({"dense_powerinfer": 9.9}, "faster", "as fast as the dense model in PowerInfer"),
    ],
)
def test_the_verdict_is_against_the_fastest_dense_run(
    tmp_path: Path, speeds: dict[str, float], outcome: str, words: str
) -> None:
    judged = verdict(loaded(tmp_path, bench(speeds)))
    assert judged is not None
    assert judged.outcome == outcome
    assert words in judged.sentence
    assert "0.31\xa0% above that of all neurons (8.1273 against 8.1021)" in judged.sentence
    assert "in the middle half of 9)" in judged.sentence


def test_the_verdict_says_what_is_missing(tmp_path: Path) -> None:
    document = bench(rounds=1) | {"engine": "embedded engine", "ppl_gap": -0.02, "warnings": []}
    for key in ("arms", "speedups"):
        named = "name" if key == "arms" else "over"
        document[key] = [row for row in document[key] if not row[named].startswith("dense")]
    judged = verdict(loaded(tmp_path, document))
    assert judged is not None
    assert "computing all neurons in the same engine" in judged.sentence
    for words in (
        "whose speed is not PowerInfer's",
        "one round, spread unknown",
        "2.00\xa0% below",
        "No dense baseline was measured.",
    ):
        assert words in judged.sentence
    assert "warnings" not in judged.sentence
    document["arms"] = document["arms"][:1]
    assert verdict(loaded(tmp_path, document)) is None


def test_runs_compare_only_on_one_machine(tmp_path: Path) -> None:
    write(tmp_path / "a", bench=bench() | {"warnings": []})
    write(tmp_path / "b", bench=bench({"predicted": 33.0}))
    runs = load_runs([tmp_path / "a", tmp_path / "b"])
    line = comparison(runs)
    assert line is not None
    assert "Fastest of 2 with predictors: b, " in line
    assert [name for name, _ in warnings(runs)] == ["b"]
    assert comparison(runs[:1]) is None
    another = MACHINE | {"cpu": "another"}
    write(tmp_path / "b", bench=bench() | {"hardware": another, "text": "other.txt"})
    runs = load_runs([tmp_path / "a", tmp_path / "b"])
    assert comparison(runs) is None
    lines = [line for name, line in warnings(runs) if name == "all runs"]
    assert ["different machines" in line for line in lines] == [True, False]
    assert "other texts" in lines[1]


def test_the_benchmarks_of_a_sweep_are_not_runs_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, density=density())
    for name in ("bench-0.10", "bench-0.20"):
        write(tmp_path / name, bench=bench())
    [run] = load_runs([tmp_path])
    assert run.density is not None
    assert run.bench is None


def test_no_model_is_called_the_fastest_of_another(tmp_path: Path) -> None:
    write(tmp_path / "a", bench=bench() | {"warnings": []})
    write(tmp_path / "b", bench=bench() | {"model": "Other-13B", "warnings": []})
    runs = load_runs([tmp_path / "a", tmp_path / "b"])
    assert comparison(runs) is None
    [(name, line)] = warnings(runs)
    assert name == "all runs"
    assert "different models" in line


def test_the_command_writes_a_page_and_keeps_an_old_one(psp: Psp, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    directory = write(tmp_path / "run", estimate=estimate())
    done = psp("report", directory, "--out", out)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{out}\n"
    page = out.read_bytes()
    done = psp("report", directory, "--out", out)
    assert done.exit_code == 1
    assert "--force" in done.stderr
    write(tmp_path / "run", estimate=estimate() | {"hardware": "other"})
    assert psp("report", directory, "--out", out, "--force").exit_code == 0
    assert out.read_bytes() != page


def test_the_command_explains_what_is_wrong(psp: Psp, tmp_path: Path) -> None:
    done = psp("report", tmp_path, "--out", tmp_path / "page.html")
    assert done.exit_code == 1
    assert done.stderr.startswith(f"Error: {tmp_path}: holds none of bench.json")
    assert done.stderr.count("\n") == 1
    assert psp("report", "--out", "page.html").exit_code == 2
    write(tmp_path, bench=json.loads("{}"))
    assert psp("report", tmp_path, "--out", tmp_path / "page.html").exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    from report.page import write_page
    from report.settings import ReportConfig

    write(tmp_path, estimate=estimate())
    (tmp_path / "file").touch()
    with refused(OutputError, "cannot write"):
        write_page(ReportConfig(directories=(tmp_path,), out=tmp_path / "file" / "page.html"))
    with refused(ResultError, "no directory"):
        write_page(ReportConfig(directories=(), out=tmp_path))
