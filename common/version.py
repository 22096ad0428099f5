"""The version that artifacts record."""

from __future__ import annotations


def tool_version() -> str:
    """Return the installed version of psp."""
    from importlib.metadata import version

    return version("psp")
