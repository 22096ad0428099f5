"""Settings of `psp report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common.settings import Force, Option


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of a page; each directory holds results, or directories that hold them."""

    directories: Annotated[tuple[Path, ...], Option(metavar="DIR…", argument=True, repeat=True)]
    out: Annotated[Path, Option("Page to write.", "FILE.html")]
    force: Force = False
