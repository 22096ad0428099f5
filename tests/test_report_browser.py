"""The page in a real browser: Chromium, from `file://`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up_card import card
from made_up_density import density
from made_up_evaluation import evaluation
from made_up_results import bench, estimate, predictor_report, write
from web_browser import Browser, browser, missing_programs

from report.page import write_page
from report.settings import ReportConfig

pytestmark = pytest.mark.browser

_OPEN_ALL = "document.querySelectorAll('details').forEach(each => each.open = true)"
_BOXES = """
return [...document.querySelectorAll('svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  const drawn = svg.getBBox();
  return [box.width, box.height, drawn.width, drawn.height];
})"""
_COLOURS = """
return [...document.querySelectorAll('body, svg text')].map(
  each => [getComputedStyle(each).color, getComputedStyle(each).fill,
           getComputedStyle(document.body).backgroundColor])"""
_WIDER = """
const edge = document.documentElement.clientWidth;
return [...document.querySelectorAll('main *')].filter(each =>
  !each.closest('.scroll') && each.getBoundingClientRect().right > edge + 0.5
).map(each => each.outerHTML.slice(0, 80))"""
_TEXT_SIZES = """
return [...document.querySelectorAll('svg text')].map(
  each => each.getBoundingClientRect().height)"""


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    missing = missing_programs()
    if missing:
        pytest.skip(f"install {' and '.join(missing)} to run this")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one of them with a very long name."""
    place = tmp_path_factory.mktemp("page")
    documents = {"report": predictor_report(), "estimate": estimate(), "density": density()}
    documents |= {"card": card(), "evaluation": evaluation()}
    long = bench(n_layers=80) | {"model": "a-model-without-a-blank-in-its-name" * 5}
    runs = (
        write(place / "first", bench=bench(), **documents),
        write(place / ("x" * 200), bench=long),
    )
    write_page(ReportConfig(directories=runs, out=place / "page.html"))
    return place / "page.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_whole_and_fits(window: Browser, page: Path, width: int, scheme: str) -> None:
    window.open(page, width=width, scheme=scheme)
    assert window.run("return window.innerWidth") == width
    window.run(_OPEN_ALL)
    assert window.logs("browser") == []
    assert window.requests() == [page.as_uri()]
    boxes = window.run(_BOXES)
    assert len(boxes) == 19
    assert all(side > 60 for box in boxes for side in box)
    assert window.run("return document.documentElement.scrollWidth") <= width
    assert window.run(_WIDER) == []


def brightness(colour: str) -> float:
    """Return the mean of `rgb(r, g, b)`."""
    return sum(float(part) for part in colour[4:-1].split(",")) / 3


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_pictures_turn_with_the_page(window: Browser, page: Path, scheme: str, dark: bool) -> None:
    window.open(page, width=1280, scheme=scheme)
    rows: list[list[Any]] = window.run(_COLOURS)
    assert len(rows) > 100
    for _, fill, ground in rows[1:]:
        assert (brightness(ground) < 60) == dark
        assert abs(brightness(fill) - brightness(ground)) > 150


def test_letters_in_pictures_can_be_read_on_a_telephone(window: Browser, page: Path) -> None:
    window.open(page, width=360, scheme="light")
    sizes = window.run(_TEXT_SIZES)
    assert len(sizes) > 100
    assert min(sizes) > 9


def test_it_prints_by_day(window: Browser, page: Path) -> None:
    window.open(page, width=800, scheme="dark", media="print")
    rows = window.run(_COLOURS)
    assert all(brightness(fill) < 60 for _, fill, _ in rows[1:])


def test_the_test_would_see_what_is_wrong(window: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!DOCTYPE html><main><div style='width: 999px'>x</div></main>"
        "<img src='absent.png'><script>console.error('oh')</script>"
    )
    window.open(bad, width=360, scheme="light")
    assert len(window.logs("browser")) == 2
    assert window.requests() == [bad.as_uri(), (tmp_path / "absent.png").as_uri()]
    assert len(window.run(_WIDER)) == 1
