"""Pictures as SVG elements inside a page, in the page's own colours and letters."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from common.plot_style import ACCENT, DARK, GREY, LIGHT, MIDDLE, style
from powerinfer_bridge.report.formats import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEAL, SAND, PLUM = "#2f8f83", "#d9a441", "#8a5a9e"
INK, PAPER, RULE = "#000000", "#ffffff", "#e3e3e3"

COLOURS = {
    INK: ("ink", "#1c2430", "#e6e9ee"),
    PAPER: ("paper", "#ffffff", "#14181f"),
    RULE: ("rule", "#e1e5ea", "#323a46"),
    DARK: ("dark", DARK, "#8fb8ec"),
    MIDDLE: ("middle", MIDDLE, "#4f81bb"),
    LIGHT: ("light", LIGHT, "#34506f"),
    GREY: ("grey", "#8b929c", "#868e99"),
    ACCENT: ("accent", ACCENT, "#ff8a6b"),
    TEAL: ("teal", TEAL, "#4fbdae"),
    SAND: ("sand", SAND, "#e3b65c"),
    PLUM: ("plum", PLUM, "#b98bcd"),
}
"""What matplotlib draws in, and the page's variable for it: name, by day, by night."""

_PAGE_STYLE: Any = {
    "svg.fonttype": "none",  # letters stay letters: the page's font, colour and search
    "font.size": 9.5,
    "figure.constrained_layout.w_pad": 0.01,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.facecolor": "none",
    "legend.framealpha": 0,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
}


@contextmanager
def page_style() -> Iterator[None]:
    """Draw for the page: no ground of its own, and text as text."""
    import matplotlib

    with style():
        matplotlib.rcParams.update(_PAGE_STYLE)
        yield


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an `svg` element.

    Args:
        figure: drawn in `page_style`, with no text in it that comes from a result.
        name: of letters and digits, unlike that of every other picture of the page: identifiers
            in a page are shared by all its pictures.
        label: what the picture shows, for those who cannot see it; escaped here.
    """
    from markupsafe import escape

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    drawn = buffer.getvalue()
    opening, body = re.split(r"(?<=>)", drawn[drawn.index("<svg") :], maxsplit=1)
    view = re.findall(r'viewBox="([^"]*)"', opening)[0]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = _renamed(body.replace("xlink:href", "href"), name)
    body = re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda found: _variable(found[0]), body)
    return f'<svg viewBox="{view}" role="img" aria-label="{escape(visible(label))}">{body.strip()}'


def _renamed(body: str, name: str) -> str:
    """Keep the identifiers that something refers to, under names of this picture's own."""
    used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', body))
    body = re.sub(
        r' id="([\w.-]+)"',
        lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "",
        body,
    )
    return re.sub(r'(url\(|href=")#', rf"\1#{name}-", body)


def _variable(colour: str) -> str:
    return f"var(--{COLOURS[colour][0]})" if colour in COLOURS else colour
