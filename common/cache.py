"""Where psp keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Return PSP_CACHE_DIR, else XDG_CACHE_HOME/psp, else ~/.cache/psp."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("PSP_CACHE_DIR") or Path(caches) / "psp")
