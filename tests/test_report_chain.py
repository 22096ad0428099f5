"""The chain from checkpoint to file that a report draws."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import refused
from made_up_results import bench

from common.errors import ResultError
from common.hashing import HashedFile
from common.provenance import PROVENANCE, Ingredient, record
from report.chain import chain_of
from report.page import render
from report.runs import load_runs

FILES = (HashedFile(name="model.safetensors", bytes=3_000_000_000, xxh3_128="0f"),)
MODEL = Ingredient(role="model", name="…/<llama>", identity="a" * 64, files=FILES)


def write(path: Path, artifact: str, identity: str | None, *ingredients: Ingredient) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    record(
        path,
        "2026-01-02T03:04:05Z",
        artifact=artifact,
        identity=identity,
        seed=7,
        settings={},
        ingredients=[MODEL, *ingredients],
    )


def made(directory: Path, *, traces: str = "t" * 32) -> None:
    used = Ingredient(role="traces", name="traces", identity="t" * 32)
    chosen = Ingredient(role="predictors", name="predictors", identity="p" * 32)
    write(directory / "traces" / PROVENANCE, "traces", traces)
    write(directory / "predictors" / PROVENANCE, "predictors", "p" * 32, used)
    file = directory / "export" / "m.powerinfer.gguf.manifest.json"
    write(file, "exported model", None, chosen)
    write(directory / "other" / PROVENANCE, "something new", "x")


def test_it_leads_from_the_model_to_the_file(tmp_path: Path) -> None:
    made(tmp_path)
    links = chain_of(tmp_path)
    assert [(link.what, link.name, link.identity) for link in links] == [
        ("model", "…/<llama>", "a" * 12),
        ("traces", "traces", "t" * 12),
        ("predictors", "predictors", "p" * 12),
        ("exported model", "m.powerinfer.gguf", ""),
    ]
    assert links[0].facts == ("1 files, 3.00 GB",)
    assert links[1].facts[0].startswith("2026-01-02T03:04:05Z to ")
    assert "seed 7" in links[1].facts
    assert not any(link.broken for link in links)


def test_what_was_made_from_something_else_is_told(tmp_path: Path) -> None:
    made(tmp_path, traces="u" * 32)
    broken = {link.what: link.broken for link in chain_of(tmp_path) if link.broken}
    assert broken == {"predictors": ("made from other traces (tttttttttttt)",)}


def test_the_page_draws_it(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "bench.json").write_text(json.dumps(bench()))
    page = render(load_runs([tmp_path]))
    assert "Where it comes from" in page
    assert "…/&lt;llama&gt;" in page
    assert page.index("<b>traces</b>") < page.index("<b>predictors</b>")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "bench.json").write_text(json.dumps(bench()))
    assert "Where it comes from" not in render(load_runs([tmp_path / "bare"]))


def test_damage_is_one_line(tmp_path: Path) -> None:
    made(tmp_path)
    file = tmp_path / "traces" / PROVENANCE
    file.write_text(file.read_text().replace('"seed": 7', '"seed": 8'))
    with refused(ResultError, str(file), "its checksum differs"):
        chain_of(tmp_path)
