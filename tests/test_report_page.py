"""The page: whole in itself, safe whatever the results hold, and complete."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_up_card import card
from made_up_density import density
from made_up_evaluation import evaluation
from made_up_results import Document, bench, estimate, predictor_report, write

from report.page import render
from report.pictures import COLOURS, hot_pictures, page_style
from report.runs import FILES, load_runs

SECTIONS = [
    "Warnings",
    "Summary",
    "Speed",
    "Quality",
    "Answers",
    "Layers",
    "Quality against bytes",
    "Hot neurons",
    "Memory",
    "Speed by density",
    "Estimate",
    "What a GPU does",
    "How it was measured",
]
HOSTILE = (
    "</script><script>alert(1)</script>\" onload='x' $\\frac{$ \u202egnp.exe \ud800 {{ 7*7 }} \x00"
)
_VOID = {"meta", "link", "br", "hr", "img", "input"}


@dataclass
class Page(HTMLParser):
    """What a browser's parser would see."""

    source: str
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.text += data
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def rendered(place: Path, *documents: dict[str, Document]) -> str:
    directories = [write(place / f"run{n}", **each) for n, each in enumerate(documents)]
    return render(load_runs(directories))


def everything() -> dict[str, Document]:
    return {
        "bench": bench(),
        "report": predictor_report(),
        "estimate": estimate(),
        "density": density(),
        "card": card(),
        "evaluation": evaluation(),
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    second = {"bench": bench(seed=1, n_layers=6)}
    return rendered(tmp_path_factory.mktemp("page"), everything(), second)


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_every_section_is_there_in_order(page: Page) -> None:
    assert page.texts["h2"] == SECTIONS
    assert len(page.texts["h1"]) == 1
    assert page.open == []
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_the_page_needs_nothing_but_itself(source: str, page: Page) -> None:
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object"} == set()
    targets = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("href", "src", "srcset", "action", "data", "xlink:href")
    ]
    assert targets
    assert all(target is not None and target.startswith("#") for target in targets)
    assert "@import" not in source
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", source))
    (policy,) = [a["content"] for a in page.named("meta") if "http-equiv" in a]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_identifiers_are_unique_and_every_reference_has_one(source: str, page: Page) -> None:
    names = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert names.most_common(1)[0][1] == 1
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', source)) <= set(names)


def test_every_picture_is_drawn_and_described(page: Page) -> None:
    pictures = page.named("svg")
    # 2 · (speed 2, layers 3, hot 1, memory 1), search 1, density 1, budgets 1, answers 2
    assert len(pictures) == 19
    for picture in pictures:
        assert picture["role"] == "img"
        assert len(picture["aria-label"] or "") > 30
        width, height = map(float, (picture["viewbox"] or "").split()[2:])
        assert width > 200
        assert height > 80
    assert all(len(text.strip()) > 10 for text in page.texts["svg"])
    labels = " ".join(picture["aria-label"] or "" for picture in pictures)
    assert "predicted neurons 16.34 (quartiles" in labels
    assert "Memory by device: GPU 5.4 GiB; CPU 6.6 GiB" in labels


def test_pictures_take_every_colour_from_the_page(source: str) -> None:
    drawn = re.findall(r"<svg.*?</svg>", source, re.DOTALL)
    assert not [found for svg in drawn for found in re.findall(r'[:"] ?(#[0-9a-f]{3,6})\b', svg)]
    used = {name for svg in drawn for name in re.findall(r"var\(--(\w+)\)", svg)}
    assert used <= {name for name, _, _ in COLOURS.values()}


def contrast(first: str, second: str) -> float:
    """Return the contrast ratio of WCAG 2.2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(first), luminance(second)])
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_by_day_and_by_night(source: str) -> None:
    blocks = [
        dict(re.findall(r"--(\w+): (#\w{6})", block))
        for block in re.findall(r":root \{([^}]*)\}", source)
    ]
    day, night = blocks[0] | blocks[2], blocks[1] | blocks[3]
    for colours in (day, night):
        for text in ("ink", "soft", "good", "bad"):
            assert contrast(colours[text], colours["paper"]) >= 4.5, text
        for text in ("ink", "edge"):
            assert contrast(colours[text], colours["alarm"]) >= 4.5, text
        assert contrast(colours["soft"], colours["ground"]) >= 4.5
        for mark in ("dark", "middle", "accent", "grey"):
            assert contrast(colours[mark], colours["paper"]) >= 3, mark


def test_the_figures_are_in_the_tables(page: Page) -> None:
    for text in (
        "8.1273",
        "8.1021",
        "8.1019",
        "+0.31\xa0%",
        "Made-up-7B",
        "16.34",
        "1.80",
        "Imaginary CPU @ 3.00GHz",
        "9f" * 16,
        "rtx4090+ddr5",
        "h200",
        "bin/main -m out/model.gguf -n 128 -p 'Once upon a time'",
        "pass --ngl 99",
    ):
        assert text in page.text, text


def poisoned(value: Any, key: str = "") -> Any:
    """Put a hostile text in the place of every text that no reader checks, and of names."""
    if isinstance(value, dict):
        kept = {"kind", "label", "over", "arm", "engine", "end"}
        return {
            name: inner
            if name in kept or (key == "arms" and name == "name")
            else poisoned(inner, name)
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [poisoned(inner, key) for inner in value]
    if isinstance(value, str):
        return value if value == "all" else HOSTILE
    return value


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    documents = {name: poisoned(document) for name, document in everything().items()}
    documents["bench"]["model"] = HOSTILE + "x" * 100_000
    documents["bench"]["settings"][HOSTILE] = {HOSTILE: [HOSTILE]}
    source = rendered(tmp_path, documents, everything())
    page = Page(source)
    source.encode()
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.texts["h2"] == SECTIONS
    assert "</script><script>alert(1)</script>" in page.text
    assert r"\u202egnp.exe \ud800 {{ 7*7 }} \x00" in page.text
    assert not set(source) & set("\u202e\ud800\x00")
    assert len(page.texts["h1"][0]) < 300
    assert len(source) < 600_000


def test_a_directory_with_a_hostile_name_is_a_name(tmp_path: Path) -> None:
    places = [tmp_path / "<img src=x onerror=alert(1)>", tmp_path / "\u202eb"]
    source = render(load_runs([write(place, estimate=estimate()) for place in places]))
    page = Page(source)
    assert not page.named("img")
    assert "<img src=x onerror=alert(1)>" in page.text
    assert r"\u202eb" in page.text


@pytest.mark.parametrize("name", ["bench", "report", "estimate", "density", "card", "evaluation"])
def test_what_is_missing_is_named_with_its_remedy(tmp_path: Path, name: str) -> None:
    page = Page(rendered(tmp_path, {name: everything()[name]}))
    assert page.texts["h2"][-1] == "Not in this report"
    missing = page.text[page.text.index("Not in this report") :]
    for file in FILES:
        if file.name not in ("bench.json", "report.json"):
            made = f"{name}.json" == file.name or (name, file.name) == ("bench", "estimate.json")
            assert (file.maker in missing) != made, file
    assert ("Summary" in page.texts["h2"]) == (name == "bench")
    assert ("Quality against bytes" in page.texts["h2"]) == (name == "report")
    assert all(len(text.strip()) > 10 for text in page.texts.get("svg", []))


def test_a_part_that_one_run_lacks_is_said_there(page: Page) -> None:
    assert "Not measured for run1; run psp train-predictor" in page.text
    assert "Not in this report" not in page.texts["h2"]


def test_optional_parts_may_be_null(tmp_path: Path) -> None:
    document = bench(n_layers=1, rounds=1)
    for key in ("hot_neurons", "estimate", "ppl_transformers"):
        document[key] = None
    for arm in document["arms"]:
        arm["prompt"] = None
    document |= {"warnings": [], "samples": [], "greedy_text_same": True}
    page = Page(rendered(tmp_path, {"bench": document}))
    assert "Warnings" not in page.texts["h2"]
    assert "the same" in page.text
    assert "Hot neurons: run psp train-predictor" in page.text
    assert len(page.named("svg")) == 5


def test_a_curve_of_one_share_is_drawn(tmp_path: Path) -> None:
    document = bench()
    document["hot_neurons"] |= {"neuron_share": [0.0], "activation_share": [0.0]}
    (run,) = load_runs([write(tmp_path, bench=document)])
    with page_style():
        (picture,) = hot_pictures(run, "h")
    assert "tenth makes 100.00 per cent" in picture.svg


def test_what_programs_said_is_a_warning(tmp_path: Path) -> None:
    document = bench() | {"warnings": []}
    document["arms"][0]["notes"] = ["GPU index <refused>"]
    page = Page(rendered(tmp_path, {"bench": document}))
    assert page.texts["li"][0] == "predicted neurons: GPU index <refused>"


def test_a_page_without_a_dense_run_says_what_it_compares_with(tmp_path: Path) -> None:
    document = bench()
    document["arms"] = document["arms"][:2]
    document["hot_neurons"] |= {"gpu_neuron_share": None, "gpu_activation_share": None}
    page = Page(rendered(tmp_path, {"bench": document}))
    assert "here: all neurons, same engine (for want of a dense run; pass --dense-gguf" in page.text
    assert "No GPU split; to see one, run psp gpu-split" in page.text


def test_eighty_layers_stay_small(tmp_path: Path) -> None:
    documents = [{"bench": bench(seed=n, n_layers=80)} for n in range(2)]
    source = rendered(tmp_path, *documents)
    assert len(Page(source).named("svg")) == 2 * 7
    assert len(source) < 600_000


def test_the_same_results_give_the_same_bytes(tmp_path: Path, source: str) -> None:
    again = rendered(tmp_path, everything(), {"bench": bench(seed=1, n_layers=6)})
    place = r"From <bdi>[^<]*"
    assert len(re.findall(place, source)) == 2
    assert re.sub(place, "", again) == re.sub(place, "", source)


def test_a_card_shows_figures_beside_their_aims_and_what_was_not_measured(tmp_path: Path) -> None:
    page = Page(rendered(tmp_path, {"card": card()}))
    assert "NVIDIA H100 80GB HBM3" in page.text
    assert "S2 over the bound2.5 ×≤ 2missed" in page.text
    assert "S2 against dense4.25 ×≥ 4met" in page.text
    assert "placement: absent; no PowerInfer: pass --powerinfer-bin" in page.text
    assert "7b-float16: done" not in page.text
    assert "1 of 2 aims are met." in page.text
    assert "a dry run" not in page.text


def test_a_card_without_a_name_or_with_speeds_that_are_none_is_shown(tmp_path: Path) -> None:
    made = card() | {"machine": {}}
    made["figures"] = [figure | {"value": -1.0} for figure in made["figures"]]
    page = Page(rendered(tmp_path, {"card": made}))
    assert "no card" in page.text
    assert "-1 tokens/s" in page.text
    assert "several VRAM budgets" not in page.source


def test_a_dry_run_says_that_its_figures_tell_nothing(tmp_path: Path) -> None:
    page = Page(rendered(tmp_path, {"card": card() | {"dry": True}}))
    assert "a dry run on the CPU, whose figures tell nothing" in page.text
