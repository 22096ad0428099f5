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

import pytest
from conftest import TEXT, refused
from xxhash import xxh3_128

from common.errors import OutputError
from gguf_export.bundle import Bundle
from powerinfer_bridge.benchmark.document import SAMPLE, SCHEMA, check_document, read_bench
from powerinfer_bridge.benchmark.run import bench
from powerinfer_bridge.benchmark.settings import BenchConfig
from powerinfer_bridge.benchmark.shape import ANYTHING, NULL, Exactly, problems
from powerinfer_bridge.report.page import write_page
from powerinfer_bridge.report.settings import ReportConfig

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
    return read_bench(written)


def test_the_document_has_exactly_the_schema_s_keys(document: Document) -> None:
    assert set(document) == set(SCHEMA)
    assert list(problems(document, SCHEMA)) == []
    assert (document["kind"], document["schema_version"]) == ("psp.bench", 1)
    assert document["created"].endswith("Z")
    assert len(document["layers"]) == 2
    assert [layer["rank"] for layer in document["layers"]] == [128, 128]


def test_the_page_shows_what_the_benchmark_wrote(
    written: Path, document: Document, tmp_path: Path
) -> None:
    """The page has a reader of its own, which must know the keys that are really written."""
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
    assert list(rows[0]) == list(SAMPLE)
    assert len(rows) == len(document["samples"]) == 6
    for row, sample in zip(rows, document["samples"], strict=True):
        assert row == {key: "" if sample[key] is None else str(sample[key]) for key in SAMPLE}


def test_a_directory_or_a_file_is_read(written: Path) -> None:
    assert read_bench(written) == read_bench(written / "bench.json")


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
    "another kind": (put("psp.estimate", "kind"), "is no benchmark"),
    "another version": (put(2, "schema_version"), "schema_version is 2, expected 1"),
    "a missing key": (remove("ppl_gap"), "document: lacks 'ppl_gap'"),
    "an unknown key": (put(1, "layers", 0, "new"), "layers[0]: has an unknown 'new'"),
    "a missing key deep down": (remove("arms", 1, "decode", "range"), "lacks 'range'"),
    "text for a number": (put("fast", "speedup"), "speedup: expected a finite number, found text"),
    "a truth for a number": (put(True, "prompts"), "prompts: expected a whole number, found bool"),
    "no finite number": (put(float("nan"), "ppl_dense"), "ppl_dense: expected a finite number"),
    "a list that is too short": (
        put([1.0], "arms", 0, "decode", "quartiles"),
        "arms[0].decode.quartiles: expected 2 elements, found 1",
    ),
    "an object for a list": (put({}, "samples"), "samples: expected a list, found"),
    "a wrong optional": (
        put({"over": "x"}, "arms", 0, "speedup"),
        "arms[0].speedup: lacks",
    ),
    "an arm too few": (remove("arms", 0), "arms are ['predicted']"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_document_is_refused_where_it_is_wrong(
    document: Document, tmp_path: Path, name: str
) -> None:
    damage, problem = DAMAGES[name]
    broken = copy.deepcopy(document)
    damage(broken)
    (tmp_path / "bench.json").write_text(json.dumps(broken))
    with refused(OutputError, str(tmp_path / "bench.json"), problem, "; pass what"):
        read_bench(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null"])
def test_what_is_no_document_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bench.json").write_bytes(content)
    with refused(OutputError, "bench.json"):
        read_bench(tmp_path)


def test_a_missing_document_is_refused(tmp_path: Path) -> None:
    with refused(OutputError, "bench.json", "No such file"):
        read_bench(tmp_path)
    with refused(OutputError, "is no benchmark"):
        check_document({}, "x")


def test_shapes_hold_what_they_say() -> None:
    shape = {"a": (float, NULL), "b": [int], "c": Exactly(1, str), "d": ANYTHING}
    good = {"a": None, "b": [1, 2], "c": ["x"], "d": {"any": [1]}}
    assert list(problems(good, shape)) == []
    assert list(problems(good | {"a": 3}, shape)) == []
    found = list(problems({"a": "x", "b": [1, 2.5], "c": []}, shape))
    assert sorted(found) == [
        "a: expected a finite number, found text",
        "b[1]: expected a whole number, found a finite number",
        "c: expected 1 elements, found 0",
        "document: lacks 'd'",
    ]
