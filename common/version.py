"""The version that artifacts record."""

from __future__ import annotations

from functools import cache


@cache  # reading it takes 2 ms, and every artifact records it several times
def tool_version() -> str:
    """Return the installed version of psp."""
    from importlib.metadata import version

    return version("psp")


def package_version(name: str) -> str | None:
    """Return the installed version of a package, None if it is not there."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None
