"""bench.json and bench.csv: every key, and what reading one back refuses."""

from __future__ import annotations

import copy
import csv
import io
import json
import os
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import made_up_results
import pytest
from conftest import TEXT, refused
from xxhash import xxh3_128

from common.errors import ResultError
from common.sealed import read_sealed
from common.typed_json import plain
from gguf_export.bundle import Bundle
from powerinfer_bridge.benchmark.run import bench
from powerinfer_bridge.benchmark.settings import BenchConfig
from report.page import write_page
from report.settings import ReportConfig
from results.bench import BENCH

Document = dict[str, Any]


@pytest.fixture(scope="module")
def written(exact_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished benchmark's directory."""
    place = tmp_path_factory.mktemp("bench")
    (place / "text.txt").write_text(TEXT * 2, encoding="utf-8")
    settings: dict[str, Any] = {"context": 64, "chunks": 2, "generate": 4, "repeats": 3}
    config = BenchConfig(
        file=exact_bundle.model_file, data=str(place / "text.txt"), out=place / "out", **settings
    )
    bench(config)
    return place / "out"


@pytest.fixture
def document(written: Path) -> Document:
    return read_sealed(written / "bench.json", ResultError, "")


FREE = ("settings", "environment", "device", "bytes")
"""Objects of any keys."""


def keys(value: Any) -> Any:
    """Return the keys of an object in order, of those in it, and of an array's first."""
    if isinstance(value, list):
        return [keys(value[0])] if value else []
    if not isinstance(value, dict):
        return None
    return {key: keys(each) for key, each in value.items() if key not in FREE}


def test_the_document_has_all_keys_and_no_other(document: Document) -> None:
    expected, found = keys(made_up_results.bench()), keys(document)
    assert list(found) == list(expected)
    for part in ("inputs", "layers", "samples", "versions", "speedups", "continuations"):
        assert found[part] == expected[part]
    for part in ("hardware", "placement", "arms"):
        one, other = found[part], expected[part]
        assert list(one[0] if part == "arms" else one) == list(
            other[0] if part == "arms" else other
        )
    assert found["arms"][0]["decode"] == found["arms"][0]["prompt"] == expected["arms"][0]["decode"]
    assert (document["kind"], document["schema_version"]) == ("psp.bench", 1)
    assert document["created"].endswith("Z")
    assert len(document["layers"]) == 2
    assert [layer["rank"] for layer in document["layers"]] == [128, 128]


def test_what_is_written_is_what_is_read(written: Path, document: Document) -> None:
    found = BENCH.read(written)
    assert plain(found) == document
    assert BENCH.read(written / "bench.json") == found


def test_the_page_shows_what_the_benchmark_wrote(
    written: Path, document: Document, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    write_page(ReportConfig(directories=(written,), out=page))
    shown = unescape(page.read_text(encoding="utf-8"))
    assert document["model"] in shown
    for key in ("ppl_sparse", "ppl_dense"):
        assert f"{document[key]:.4f}" in shown
    for warning in document["warnings"]:
        assert warning["text"] in shown


def test_the_document_agrees_with_itself(document: Document) -> None:
    arms = {arm["name"]: arm for arm in document["arms"]}
    speeds = [arms[name]["decode"]["tokens_per_second"] for name in ("predicted", "all_neurons")]
    assert [document["tokens_per_second"], document["tokens_per_second_dense"]] == speeds
    assert document["speedup"] == speeds[0] / speeds[1] == document["speedups"][0]["ratio"]
    assert arms["predicted"]["speedup"]["ratio"] == document["speedup"]
    assert document["ppl_gap"] == document["ppl_sparse"] / document["ppl_dense"] - 1
    rates = sorted(
        row["decode_tokens"] / row["decode_seconds"]
        for row in document["samples"]
        if row["arm"] == "predicted"
    )
    decode = arms["predicted"]["decode"]
    assert decode["range"] == [rates[0], rates[-1]]
    assert decode["tokens_per_second"] == rates[1]
    assert decode["rounds"] == 3


def test_inputs_are_told_by_content(document: Document, exact_bundle: Bundle) -> None:
    inputs = {entry["role"]: entry for entry in document["inputs"]}
    assert set(inputs) == {"model", "text", "prompts"}
    data = exact_bundle.model_file.read_bytes()
    assert inputs["model"]["bytes"] == len(data)
    assert inputs["model"]["xxh3_128"] == xxh3_128(data).hexdigest()
    text = (TEXT * 2).encode()
    assert inputs["text"]["xxh3_128"] == xxh3_128(text).hexdigest()
    assert (
        inputs["prompts"]["xxh3_128"]
        == xxh3_128(document["settings"]["prompt"].encode()).hexdigest()
    )


def test_the_machine_is_named(document: Document) -> None:
    hardware = document["hardware"]
    assert hardware["cpus"] == len(os.sched_getaffinity(0))
    assert hardware["memory_bytes"] > 1 << 28
    assert document["versions"]["powerinfer"] is None


def test_the_csv_holds_the_samples(written: Path, document: Document) -> None:
    text = (written / "bench.csv").read_bytes().decode()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert list(rows[0]) == list(document["samples"][0])
    assert len(rows) == len(document["samples"]) == 6
    for row, sample in zip(rows, document["samples"], strict=True):
        assert row == {key: "" if value is None else str(value) for key, value in sample.items()}


def remove(*path: str | int) -> Callable[[Document], None]:
    def damage(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        del document[path[-1]]

    return damage


def put(value: Any, *path: str | int) -> Callable[[Document], None]:
    def damage(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return damage


DAMAGES: dict[str, tuple[Callable[[Document], None], str]] = {
    "another kind": (put("psp.estimate", "kind"), "'kind': expected 'psp.bench', found 'psp.est"),
    "another version": (put(2, "schema_version"), "'schema_version': expected 1, found 2"),
    "a missing key": (remove("ppl_gap"), "no 'ppl_gap'"),
    "a missing key deep down": (remove("arms", 1, "decode", "range"), "no 'arms[1].decode.range'"),
    "text for a number": (put("fast", "speedup"), "'speedup': expected a number, found 'fast'"),
    "a truth for a number": (
        put(True, "prompts"),
        "'prompts': expected a whole number, found True",
    ),
    "no finite number": (put(float("nan"), "ppl_dense"), "'ppl_dense': expected a finite number"),
    "a list that is too short": (
        put([1.0], "arms", 0, "decode", "quartiles"),
        "'arms[0].decode.quartiles': expected 2 elements",
    ),
    "an object for a list": (put({}, "samples"), "'samples': expected an array, found"),
    "a wrong optional": (put({"over": "x"}, "arms", 0, "speedup"), "no 'arms[0].speedup.ratio'"),
    "an arm that there is not": (put("fast", "arms", 0, "name"), "'arms[0].name': expected one of"),
    "no arm": (put([], "arms"), "'arms': expected at least one arm"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_document_is_refused_where_it_is_wrong(
    document: Document, tmp_path: Path, name: str
) -> None:
    damage, problem = DAMAGES[name]
    broken = copy.deepcopy(document)
    damage(broken)
    (tmp_path / "bench.json").write_text(json.dumps(broken))
    with refused(ResultError, str(tmp_path / "bench.json"), problem, "; make it anew"):
        BENCH.read(tmp_path)
