"""Documents of results: what is written is what is read, and what readers refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import refused
from made_up_density import density
from made_up_results import Document, bench, estimate, predictor_report

from common.errors import ResultError
from common.sealed import read_sealed
from results.bench import BENCH, Bench, round_speeds
from results.density import DENSITY
from results.estimate import ESTIMATE
from results.parts import ResultFile
from results.predictors import PREDICTORS

MADE: dict[str, tuple[ResultFile[Any], Callable[[], Document]]] = {
    "bench": (BENCH, bench),
    "estimate": (ESTIMATE, estimate),
    "density": (DENSITY, density),
    "report": (PREDICTORS, predictor_report),
}


def put(directory: Path, file: ResultFile[Any], document: Any) -> Path:
    (directory / file.name).write_text(json.dumps(document))
    return directory


@pytest.mark.parametrize("name", MADE)
def test_what_is_read_is_written_again_in_the_same_order(tmp_path: Path, name: str) -> None:
    file, make = MADE[name]
    assert file.name == f"{name}.json"
    document = file.read(put(tmp_path, file, make()))
    (tmp_path / "again").mkdir()
    file.write(tmp_path / "again", document)
    written = read_sealed(tmp_path / "again" / file.name, ResultError, "")
    assert json.dumps(written) == json.dumps(make())
    assert file.read(tmp_path / "again" / file.name) == document


@pytest.mark.parametrize("name", MADE)
def test_keys_of_newer_versions_are_passed_over_and_other_schemas_refused(
    tmp_path: Path, name: str
) -> None:
    file, make = MADE[name]
    known = file.read(put(tmp_path, file, make()))
    assert file.read(put(tmp_path, file, make() | {"new": {"any": [None]}})) == known
    for schema in (2, "1", True, None):
        with refused(ResultError, file.name, "'schema_version'", f"found {schema!r}", file.maker):
            file.read(put(tmp_path, file, make() | {"schema_version": schema}))
    other = "psp.bench" if name == "estimate" else "psp.estimate"
    if name == "report":  # names no kind
        return
    with refused(ResultError, file.name, "'kind'", f"found '{other}'", file.maker):
        file.read(put(tmp_path, file, make() | {"kind": other}))


def test_optional_parts_may_be_missing(tmp_path: Path) -> None:
    perplexities = ("ppl_transformers", "ppl_threads")
    optional = (*perplexities, "greedy_text_same", "placement", "hot_neurons", "estimate")
    found = bench()
    for key in optional:
        del found[key]
    document = BENCH.read(put(tmp_path, BENCH, found))
    assert [getattr(document, key) for key in optional] == [None] * 6


def test_what_a_report_does_not_know_is_not_in_it(tmp_path: Path) -> None:
    found = predictor_report()
    for row in (found["mean"], *found["layers"], *found["curves"]):
        row.pop("missed_importance")
        row.pop("ffn_output_error")
    PREDICTORS.write(tmp_path, PREDICTORS.read(put(tmp_path, PREDICTORS, found)))
    assert read_sealed(tmp_path / "report.json", ResultError, "") == found


def test_a_report_without_epochs_is_one_of_an_older_psp(tmp_path: Path) -> None:
    found = predictor_report()
    del found["epochs"]
    assert PREDICTORS.read(put(tmp_path, PREDICTORS, found)).epochs == ()


def test_a_missing_file_is_refused_with_the_reader_s_own_remedy(tmp_path: Path) -> None:
    with refused(ResultError, "bench.json", "No such file", "; make it anew with 'psp bench-"):
        BENCH.read(tmp_path / "bench.json")
    with refused(ResultError, str(tmp_path / "bench.json"), "; pass --density"):
        BENCH.read(tmp_path, "pass --density")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null", b"[" * 100_000])
def test_what_is_no_document_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bench.json").write_bytes(content)
    with refused(ResultError, "bench.json", "make it anew"):
        BENCH.read(tmp_path)


def test_a_benchmark_knows_its_arms(tmp_path: Path) -> None:
    document: Bench = BENCH.read(put(tmp_path, BENCH, bench()))
    dense = document.arm("dense_llama_cpp")
    assert dense is not None
    assert dense.dense
    assert document.arm("none") is None
    ratio = document.over("all_neurons")
    assert ratio is not None
    assert ratio.ratio == document.speedup
    assert document.over("predicted") is None


def test_a_round_s_speed_is_its_tokens_over_its_seconds(tmp_path: Path) -> None:
    found = bench(rounds=2)
    rows = [row for row in found["samples"] if row["arm"] == "predicted"]
    slow = rows[0] | {"prompt": 1, "decode_tokens": 10, "decode_seconds": 100.0}
    slow |= {"prompt_tokens": None, "prompt_seconds": None}
    found["samples"].append(slow)
    samples = BENCH.read(put(tmp_path, BENCH, found)).samples
    seconds = [row["decode_seconds"] for row in rows]
    assert round_speeds(samples, "predicted", "decode") == {
        1: 138 / (seconds[0] + 100),
        2: 128 / seconds[1],
    }
    # A round in which a run did not tell is no round.
    assert round_speeds(samples, "predicted", "prompt") == {2: 12 / rows[1]["prompt_seconds"]}
    assert round_speeds(samples, "none", "decode") == {}


def test_the_fastest_dense_arm_is_that_of_the_median(tmp_path: Path) -> None:
    fastest = BENCH.read(put(tmp_path, BENCH, bench({"dense_powerinfer": 9.9}))).fastest_dense()
    assert fastest is not None
    assert fastest.name == "dense_powerinfer"
    found = bench()
    found["arms"] = found["arms"][:2]
    assert BENCH.read(put(tmp_path, BENCH, found)).fastest_dense() is None


def test_a_report_has_a_curve_a_layer(tmp_path: Path) -> None:
    found = predictor_report()
    found["hot_neurons"] += [
        {"layer": 3, "neuron_share": share, "activation_share": share} for share in (0, 0.5, 1)
    ]
    report = PREDICTORS.read(put(tmp_path, PREDICTORS, found))
    together, one = report.hot(), report.hot(3)
    assert together is not None
    assert one is not None
    assert (len(together.neuron_share), one.activation_share) == (101, (0, 0.5, 1))
    assert report.hot(0) is None


def test_reading_results_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "matplotlib")
    code = "import sys, results.bench, results.estimate, results.density, results.predictors\n"
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
